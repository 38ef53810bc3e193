"""`c2i` as a script uses it: output, exit codes, errors of one line that name the file's line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny
from tests.live import REPOSITORY, Api, WorkerProcess


def c2i(api: Api | None, *arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a command against a service and check its exit code."""
    url = api.url if api else "http://127.0.0.1:9"
    result = subprocess.run(
        [sys.executable, "-m", "service.cli", *map(str, arguments)],
        cwd=REPOSITORY,
        env={**os.environ, "C2I_URL": url, "NO_COLOR": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == code, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return result


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "task.jsonl", *tiny.learnable_examples(12))


def test_a_job_from_file_to_adapter(api: Api, worker: WorkerProcess, file: Path, tmp_path: Path) -> None:
    job_id = c2i(api, "submit", file, "--model", "tiny-llama", "--passes", "2").stdout.strip()
    watched = c2i(api, "watch", job_id)
    assert "succeeded: no significant improvement" in watched.stdout
    assert "attempt 1 began" in watched.stderr
    assert json.loads(c2i(api, "watch", job_id, "--json").stdout)["status"] == "succeeded"
    told = c2i(api, "report", job_id).stdout
    assert "exact_match" in told
    assert "drift 0 nats a token on neutral text" in told
    assert json.loads(c2i(api, "report", job_id, "--json").stdout)["passes_requested"] == 2
    out = tmp_path / "out"
    listed = json.loads(c2i(api, "download", job_id, "--out", out, "--json").stdout)["files"]
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()) == [
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "report.json",
    ]
    assert len(listed) == 3
    # What was damaged is fetched again, what is whole is not.
    (out / "report.json").write_text("damaged")
    before = (out / "adapter" / "adapter_model.safetensors").stat().st_ino
    c2i(api, "download", job_id, "--out", out, "--model")
    assert json.loads((out / "report.json").read_text())["seed"] == 0
    assert (out / "model" / "model.safetensors").is_file()
    assert (out / "adapter" / "adapter_model.safetensors").stat().st_ino == before


def test_submit_can_wait_for_the_end(api: Api, worker: WorkerProcess, file: Path) -> None:
    done = c2i(api, "submit", file, "--model", "tiny-llama", "--wait", "--json")
    assert json.loads(done.stdout)["status"] == "succeeded"
    assert json.loads(c2i(api, "models", "--json").stdout)[0]["id"] == "tiny-llama"


def test_a_job_that_fails_is_exit_code_1(api: Api, worker: WorkerProcess) -> None:
    job_id = api.submit(metadata={"do": "refuse"})
    assert "its blocks hold no matrices" in c2i(api, "watch", job_id, code=1).stderr


def test_cancel_waits_until_the_job_is_gone(api: Api, file: Path) -> None:
    job_id = c2i(api, "submit", file, "--model", "tiny-llama").stdout.strip()
    assert "cancelled" in c2i(api, "cancel", job_id).stdout
    assert json.loads(c2i(api, "cancel", job_id, "--json").stdout)["status"] == "cancelled"
    assert "cancelled" in c2i(api, "watch", job_id, code=1).stdout
    assert "conflict" not in c2i(api, "download", job_id, code=2).stderr


GOOD = {"prompt": "p", "completion": "c"}


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([GOOD, "{", GOOD], ":2: not JSON"),
        ([GOOD, "", '{"prompt": NaN}'], ":3: not JSON"),
        ([GOOD, '{"prompt": "\\ud800"}'], ":2: not JSON"),
        (["[" * 100_000], ":1: not JSON"),
        (["", *({"prompt": f"p{i}", "completion": "c"} for i in range(8)), {"prompt": "p9"}], ":10: completion:"),
        ([*({"prompt": f"p{i}", "completion": "c"} for i in range(8)), "", ["x"]], ":10: "),
        ([GOOD], "examples: at least 8 examples"),
        ([], "examples: at least 8 examples"),
    ],
)
def test_a_bad_line_is_named(shared_api: Api, tmp_path: Path, lines: list[object], expected: str) -> None:
    file = write(tmp_path / "bad.jsonl", *lines)
    result = c2i(shared_api, "submit", file, "--model", "tiny-llama", code=2)
    assert expected in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    if expected.startswith(":"):
        assert str(file) in result.stderr


def test_a_bad_line_of_the_test_file_is_named_by_its_own_file(shared_api: Api, file: Path, tmp_path: Path) -> None:
    test = write(tmp_path / "test.jsonl", GOOD, {"prompt": "q", "completion": ""})
    result = c2i(shared_api, "submit", file, "--test", test, "--model", "tiny-llama", code=2)
    assert f"{test}:2: completion:" in result.stderr


def test_what_does_not_exist_is_exit_code_2_and_says_what_to_try(shared_api: Api, file: Path, tmp_path: Path) -> None:
    assert "No such file" in c2i(shared_api, "submit", tmp_path / "no.jsonl", "--model", "tiny-llama", code=2).stderr
    assert "c2i models add" in c2i(shared_api, "submit", file, "--model", "nobody", code=2).stderr
    assert "no job" in c2i(shared_api, "watch", "nonsense", code=2).stderr
    assert "no job" in c2i(shared_api, "report", "job_00000000000000000000", code=2).stderr
    binary = tmp_path / "binary.jsonl"
    binary.write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in c2i(shared_api, "submit", binary, "--model", "tiny-llama", code=2).stderr
    c2i(shared_api, "submit", file, code=2)
    for bound in ("nan", "inf", "0", "much"):
        bad = c2i(shared_api, "submit", file, "--model", "tiny-llama", "--max-drift", bound, code=2)
        assert "max" in bad.stderr
        assert "drift" in bad.stderr


def test_a_service_that_is_not_there_is_exit_code_3_and_says_how_to_start_it(file: Path) -> None:
    result = c2i(None, "submit", file, "--model", "tiny-llama", code=3)
    assert result.stderr.splitlines() == [
        "error: http://127.0.0.1:9 is not reachable",
        "try:   start it with `c2i serve`, or name another with --url or C2I_URL",
    ]


def test_a_worker_without_a_queue_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REDIS_URL", raising=False)
    assert "REDIS_URL" in c2i(None, "worker", "--data", tmp_path, code=3).stderr
