"""`c2i adapt`: files in, a whole folder out or none, errors that name the file's line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from service.errors import C2IError, InvalidInput, ModelNotFound
from service.reports import Report
from service.settings import Settings
from tests import live
from tests.live import REPOSITORY
from tests.planted import Planted
from workers import local
from workers.adaptation import adapt

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # peft 0.21 asks transformers 5 for a property under its old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


@pytest.fixture(scope="session")
def settings(planted: Planted, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A data folder with the planted model."""
    data = tmp_path_factory.mktemp("local")
    live.install(planted.folder, data, "tiny/planted")
    return Settings(data=data)


@pytest.fixture
def lines(planted: Planted) -> list[str]:
    return [example.model_dump_json() for example in planted.examples]


def write(path: Path, lines: Sequence[str]) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def run(
    file: Path,
    out: Path,
    settings: Settings,
    rows: local.Rows = (None, 0, None),
    *,
    as_json: bool = False,
    fields: dict[str, object] | None = None,
) -> None:
    local.run(file, {"model": "tiny/planted"} | (fields or {}), out, settings, rows=rows, as_json=as_json)


def test_the_command_writes_what_a_job_does_and_prints_the_report(
    settings: Settings, lines: list[str], tmp_path: Path
) -> None:
    file, out = write(tmp_path / "task.jsonl", lines), tmp_path / "new" / "out"
    options = ["--model", "tiny/planted", "--gradient", "50", "--selection", "30", "--test", "40", "--seed", "3"]
    options += ["--max-drift", "100"]
    result = subprocess.run(
        [sys.executable, "-m", "service.cli", "adapt", str(file), "--out", str(out), *options, "--json"],
        cwd=REPOSITORY,
        env={**os.environ, "C2I_DATA": str(settings.data), "NO_COLOR": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    printed = Report.model_validate_json(result.stdout)
    assert printed == Report.model_validate_json((out / "report.json").read_text())
    assert (printed.splits.gradient, printed.splits.selection, printed.splits.test) == (50, 30, 40)
    assert printed.seed == 3
    assert printed.max_drift == 100
    assert printed.improved
    assert sorted(path.name for path in out.iterdir()) == ["adapter", "model", "report.html", "report.json"]
    assert (out.stat().st_mode & 0o777) == 0o755
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_the_rows_of_each_split_are_those_that_were_asked_for(
    settings: Settings, lines: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases: list[tuple[local.Rows, tuple[int, int, int, int | None]]] = [
        ((None, 0, None), (48, 36, 36, None)),
        ((50, 30, 40), (50, 30, 40, None)),
        ((50, 30, 10), (50, 30, 10, None)),  # the last thirty are left out
        ((50, 30, None), (50, 30, 40, None)),
        ((16, 0, 100), (16, 16, 100, 4)),
    ]
    file = write(tmp_path / "task.jsonl", lines)
    for k, (rows, expected) in enumerate(cases):
        run(file, tmp_path / str(k), settings, rows, as_json=True)
        splits = json.loads(capsys.readouterr().out)["splits"]
        assert (splits["gradient"], splits["selection"], splits["test"], splits["folds"]) == expected, rows


def test_without_json_a_person_reads_the_verdict_and_a_table(
    settings: Settings, lines: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(write(tmp_path / "task.jsonl", lines), tmp_path / "out", settings)
    printed = capsys.readouterr().out
    report = Report.model_validate_json((tmp_path / "out" / "report.json").read_text())
    assert printed.startswith(report.verdict)
    accuracy = next(line for line in printed.splitlines() if line.startswith("accuracy"))
    assert f"{report.base.accuracy:.3f}  " in accuracy
    assert f"{report.adapted.accuracy:.3f}  " in accuracy
    assert f"Removed {report.removed.components:,} of " in printed
    assert "components removed: · none" in printed
    assert str(tmp_path / "out") in printed
    assert str(report.drift) in printed


def bad_json(lines: list[str]) -> None:
    lines[4] = '{"prompt": "x", '


def bad_field(lines: list[str]) -> None:
    lines[70] = '{"prompt": "x", "completion": "y", "label": 1}'


def bad_choice(lines: list[str]) -> None:
    row: dict[str, Any] = json.loads(lines[85])
    lines[85] = json.dumps(row | {"completion": "no such choice"})


def too_long(lines: list[str]) -> None:
    row: dict[str, Any] = json.loads(lines[60])
    lines[60] = json.dumps(row | {"prompt": "red " * 400})


@pytest.mark.parametrize(("spoil", "line"), [(bad_json, 5), (bad_field, 72), (bad_choice, 87), (too_long, 62)])
@pytest.mark.parametrize("rows", [(None, 0, None), (50, 30, 40)], ids=["one list", "three splits"])
def test_a_bad_line_is_named_and_nothing_is_written(
    rows: local.Rows,
    spoil: Callable[[list[str]], None],
    line: int,
    settings: Settings,
    lines: list[str],
    tmp_path: Path,
) -> None:
    spoil(lines)
    if line != 5:
        lines.insert(20, "")  # an empty line is skipped and counted
    file = write(tmp_path / "task.jsonl", lines)
    with pytest.raises(InvalidInput) as refused:
        run(file, tmp_path / "out", settings, rows)
    assert f"{file}:{line}:" in refused.value.message
    assert [path.name for path in tmp_path.iterdir()] == ["task.jsonl"]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ((100, 30, None), "130 rows are asked for; the file has 120"),
        ((50, 30, 41), "121 rows are asked for; the file has 120"),
        ((None, 30, None), "--gradient"),
        ((None, 0, 10), "--gradient"),
        ((-10, 30, None), "numbers of rows"),
        ((50, -1, None), "numbers of rows"),
        ((50, 30, -2), "numbers of rows"),
    ],
)
def test_rows_that_cannot_be_had_are_refused(
    rows: local.Rows, said: str, settings: Settings, lines: list[str], tmp_path: Path
) -> None:
    file = write(tmp_path / "task.jsonl", lines)
    with pytest.raises(InvalidInput, match=said):
        run(file, tmp_path / "out", settings, rows)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_exists_is_left_alone(settings: Settings, lines: list[str], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    with pytest.raises(InvalidInput, match="exists already") as refused:
        run(write(tmp_path / "task.jsonl", lines), tmp_path / "out", settings)
    assert refused.value.param == "out"
    assert [path.read_text() for path in (tmp_path / "out").iterdir()] == ["kept"]


@pytest.mark.parametrize(
    ("fields", "error", "param"),
    [
        ({"model": "tiny/absent"}, ModelNotFound, "model"),
        ({"passes": 9}, InvalidInput, "passes"),
        ({"strategy": "magic"}, InvalidInput, "strategy"),
        ({"strategy": "laser", "strategy_options": {"x": 1}}, InvalidInput, "strategy_options.x"),
        ({"objective": "fun"}, InvalidInput, "objective"),
        ({"seed": -1}, InvalidInput, "seed"),
    ],
)
def test_options_are_checked_before_anything_is_done(
    fields: dict[str, object],
    error: type[C2IError],
    param: str,
    settings: Settings,
    lines: list[str],
    tmp_path: Path,
) -> None:
    file = write(tmp_path / "task.jsonl", lines)
    with pytest.raises(error) as refused:
        run(file, tmp_path / "out", settings, fields=fields)
    assert refused.value.param == param
    assert [path.name for path in tmp_path.iterdir()] == ["task.jsonl"]


def test_an_interruption_leaves_nothing_half_written(
    settings: Settings, lines: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any, **more: Any) -> Report:
        adapt(*arguments, **more)
        assert len(list(tmp_path.iterdir())) == 2  # everything is there, under another name
        raise KeyboardInterrupt

    monkeypatch.setattr("workers.local.adapt", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(write(tmp_path / "task.jsonl", lines), tmp_path / "out", settings)
    assert [path.name for path in tmp_path.iterdir()] == ["task.jsonl"]
