"""`c2i` as a script uses it: output, exit codes, errors of one line that name the file's line."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import structlog
import typer
from typer.testing import CliRunner

from service.cli import JOBS, LOCAL, OPERATE, assemble, main
from service.jobs import JobSpec
from tests import tiny
from tests.live import REPOSITORY, Api, WorkerProcess, spec
from tests.stand_in import make_report


@pytest.fixture(autouse=True)
def _logs_elsewhere() -> Iterator[None]:
    """The API runs in this process too: its log is no command's output."""
    before = structlog.get_config()
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.__stderr__))
    yield
    structlog.configure(**before)


@dataclass(frozen=True)
class Ended:
    """What a command said."""

    stdout: str
    stderr: str


def c2i(api: Api | None, *arguments: str | Path, code: int = 0, stdin: str | None = None) -> Ended:
    """Run a command against a service, in this process, and check its exit code."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["c2i", *map(str, arguments)])
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((stdin or "").encode())))
        patch.setenv("C2I_URL", api.url if api else "http://127.0.0.1:9")
        with redirect_stdout(stdout), redirect_stderr(stderr), pytest.raises(SystemExit) as end:
            main()
            sys.exit(0)
    assert (end.value.code or 0) == code, stdout.getvalue() + stderr.getvalue()
    return Ended(stdout.getvalue(), stderr.getvalue())


def program(api: Api | None, *arguments: str | Path, code: int = 0) -> Ended:
    """The same in a process of its own, as a shell starts it."""
    result = subprocess.run(
        [sys.executable, "-m", "service.cli", *map(str, arguments)],
        cwd=REPOSITORY,
        env={**os.environ, "C2I_URL": api.url if api else "http://127.0.0.1:9"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == code, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return Ended(result.stdout, result.stderr)


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a program `c2i`, as an installation has it."""
    program = tmp_path_factory.mktemp("bin") / "c2i"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m service.cli "$@"\n')
    program.chmod(0o755)
    return program.parent


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
    assert "exact match" in told
    assert "drift 0 nats a token on neutral text" in told
    assert json.loads(c2i(api, "report", job_id, "--json").stdout)["passes_requested"] == 2
    out = tmp_path / "out"
    listed = json.loads(c2i(api, "download", job_id, "--out", out, "--json").stdout)["files"]
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()) == [
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "report.html",
        "report.json",
    ]
    assert len(listed) == 4
    # What was damaged is fetched again, what is whole is not.
    (out / "report.json").write_text("damaged")
    before = (out / "adapter" / "adapter_model.safetensors").stat().st_ino
    c2i(api, "download", job_id, "--out", out, "--model")
    assert json.loads((out / "report.json").read_text())["seed"] == 0
    assert (out / "model" / "model.safetensors").is_file()
    assert (out / "adapter" / "adapter_model.safetensors").stat().st_ino == before


def test_submit_can_wait_for_the_end(api: Api, worker: WorkerProcess, file: Path) -> None:
    done = program(api, "submit", file, "--model", "tiny-llama", "--wait", "--json")
    assert json.loads(done.stdout)["status"] == "succeeded"
    assert json.loads(c2i(api, "models", "--json").stdout)[0]["id"] == "tiny-llama"


def test_a_job_that_fails_is_exit_code_1_and_says_what_to_do(api: Api, worker: WorkerProcess) -> None:
    job_id = api.submit(metadata={"do": "refuse"})
    assert program(api, "watch", job_id, code=1).stderr.splitlines()[-2:] == [
        f"{job_id} failed: its blocks hold no matrices (model)",
        "try:   mend that, then submit it again",
    ]


def test_jobs_are_listed_and_deleted(api: Api, file: Path) -> None:
    assert "c2i submit" in c2i(api, "jobs").stdout
    ids = [api.submit() for _ in range(2)]
    listed = c2i(api, "jobs").stdout.splitlines()
    assert [line.split()[0] for line in listed] == ["job", *ids[::-1]]
    assert "queued, place 2" in listed[1]
    assert [job["id"] for job in json.loads(c2i(api, "jobs", "--limit", "1", "--json").stdout)] == [ids[1]]
    c2i(api, "cancel", ids[0])
    assert "is deleted" in c2i(api, "delete", ids[0]).stdout
    assert c2i(api, "watch", ids[0], code=2).stderr.splitlines()[-1] == "try:   `c2i jobs` lists your jobs"


def test_a_dry_run_tells_what_a_job_takes_and_makes_none(shared_api: Api, file: Path) -> None:
    before = len(json.loads(c2i(shared_api, "jobs", "--json").stdout))
    command = ("submit", file, "--model", "tiny-llama", "--dry-run")
    assert "It would take about 0:0" in c2i(shared_api, *command).stdout
    assert json.loads(c2i(shared_api, *command, "--json").stdout)["tokens"] > 0
    assert "c2i models" in c2i(shared_api, *command, "--model", "nobody", code=2).stderr
    webhook = ("--webhook", "https://example.com/hook")
    assert "webhooks off" in c2i(shared_api, *command, *webhook, code=2).stderr
    assert len(json.loads(c2i(shared_api, "jobs", "--json").stdout)) == before


def test_examples_come_from_csv_and_stdin_too(api: Api, file: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    rows = [f'"{one["prompt"]}","{one["completion"]}","{"|".join(one["choices"])}"' for one in lines]
    table = write(tmp_path / "task.csv", "prompt,completion,choices", *rows)
    options = ("--model", "tiny-llama", "--json")
    stored = []
    for given, text in ((file, None), (table, None), ("-", file.read_text()), ("-", table.read_text())):
        job_id = json.loads(c2i(api, "submit", given, *options, stdin=text).stdout)["id"]
        stored.append(api.service.store.get_input(job_id))
    assert stored[0] == stored[1] == stored[2] == stored[3]
    assert stored[0].examples[0].choices == lines[0]["choices"]
    bad = c2i(api, "submit", "-", *options, stdin=file.read_text() + "{", code=2)
    assert f"stdin:{len(lines) + 1}: not JSON" in bad.stderr


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["prompt,answer", "p,c"], ":1: the first line must name the columns"),
        (["p,c"], ":1: the first line must name the columns"),
        (["prompt,completion", "p,c,d"], ":2: 3 columns"),
        (["prompt,completion", '"two', 'lines",c', 'p,"c'], ":4: not CSV"),
        (["prompt,completion", *(f"p{i},c" for i in range(8)), '"two', 'lines",'], ":10: completion:"),
    ],
)
def test_a_bad_line_of_a_csv_is_named(shared_api: Api, tmp_path: Path, lines: list[object], expected: str) -> None:
    file = write(tmp_path / "bad.csv", *lines)
    assert f"{file}{expected}" in c2i(shared_api, "submit", file, "--model", "tiny-llama", code=2).stderr


def test_ctrl_c_says_that_the_job_goes_on(shared_api: Api) -> None:
    job_id = shared_api.submit()
    with subprocess.Popen(
        [sys.executable, "-m", "service.cli", "watch", job_id, "--url", shared_api.url],
        cwd=REPOSITORY,
        stderr=subprocess.PIPE,
        text=True,
    ) as watching:
        assert watching.stderr is not None
        while not watching.stderr.readline().endswith("%  queued\n"):  # the event, behind its place in the queue
            assert watching.poll() is None
        watching.send_signal(signal.SIGINT)
        said = watching.stderr.read().splitlines()
    assert watching.returncode == 130
    assert said == [
        f"{job_id} goes on without you.",
        f"try:   `c2i watch {job_id}` shows it again, `c2i cancel {job_id}` stops it",
    ]
    assert shared_api.job(job_id)["status"] == "queued"


def test_a_report_is_read_from_the_disk_too(tmp_path: Path) -> None:
    text = make_report(JobSpec.parse(spec())).model_dump_json()
    folder = tmp_path / "downloaded"
    folder.mkdir()
    assert "holds no report.json" in c2i(None, "report", folder, code=2).stderr
    (folder / "report.json").write_text(text)
    assert "no significant improvement" in c2i(None, "report", folder).stdout
    assert json.loads(c2i(None, "report", folder / "report.json", "--json").stdout) == json.loads(text)
    (folder / "report.json").write_text("{}")
    assert "is no report" in c2i(None, "report", folder, code=2).stderr
    assert "no such file" in c2i(None, "report", tmp_path / "report.json", code=2).stderr


def commands() -> dict[str, Any]:
    """Every command and group by what is typed."""
    found: dict[str, Any] = {}
    todo = [("c2i", typer.main.get_command(assemble()))]
    while todo:
        name, command = todo.pop()
        found[name] = command
        todo += [(f"{name} {below}", one) for below, one in getattr(command, "commands", {}).items()]
    return found


@pytest.mark.parametrize("name", sorted(commands()))
def test_every_help_has_an_example_that_can_be_typed(name: str) -> None:
    result = CliRunner().invoke(assemble(), [*name.split()[1:], "--help"], env={"COLUMNS": "200"}, prog_name="c2i")
    assert result.exit_code == 0
    (example,) = re.findall(r"Example: (c2i .*?) *$", result.output, re.MULTILINE)
    words = shlex.split(example)
    assert " ".join(words).startswith(name)
    named = max((known for known in commands() if f"{example} ".startswith(f"{known} ")), key=len)
    rest = words[len(named.split()) :]
    commands()[named].make_context(named, rest)  # raises where an option or an argument is wrong


def test_the_panels_of_the_help_stand_in_order() -> None:
    text = CliRunner().invoke(assemble(), ["--help"], env={"COLUMNS": "80"}, prog_name="c2i").output
    places = [text.index(f" {panel} ") for panel in (JOBS, LOCAL, OPERATE)]
    assert places == sorted(places)
    assert max(map(len, text.splitlines())) <= 80


def complete(shell: Path, url: str, *lines: str) -> list[list[str]]:
    """What bash offers for each line when Tab is pressed behind it."""
    script = ['eval "$(c2i --show-completion bash)"', "tab=$(complete -p c2i | sed 's/.*-F \\([^ ]*\\).*/\\1/')"]
    for line in lines:
        words = line.split() + ([""] if line.endswith(" ") else [])
        typed = " ".join(shlex.quote(word) for word in words)
        script.append(f'COMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}; $tab c2i; echo "${{COMPREPLY[@]}}"')
    result = subprocess.run(
        ["bash", "-c", "\n".join(script)],
        env={
            **os.environ,
            "PATH": f"{shell}:{os.environ['PATH']}",
            "C2I_URL": url,
            "PYTHONPATH": str(REPOSITORY),
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert result.stderr == ""
    return [line.split() for line in result.stdout.splitlines()]


def test_bash_completes_commands_options_jobs_and_models(shared_api: Api, shell: Path) -> None:
    job_id = shared_api.submit()
    command, option, jobs, model = complete(
        shell,
        shared_api.url,
        "c2i wa",
        "c2i submit --stra",
        f"c2i report {job_id[:-1]}",
        "c2i submit task.jsonl --model ",
    )
    assert command == ["watch"]
    assert option == ["--strategy", "--strategy-options"]
    assert jobs == [job_id]
    assert model == ["tiny-llama"]
    assert complete(shell, "http://127.0.0.1:9", "c2i watch ") == [[]]


def test_a_terminal_sees_a_bar_that_redraws(api: Api, worker: WorkerProcess, file: Path) -> None:
    master, slave = os.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "service.cli", "submit", str(file), "--model", "tiny-llama", "--wait"],
        cwd=REPOSITORY,
        env={**os.environ, "C2I_URL": api.url, "TERM": "xterm", "COLUMNS": "80"},
        stdout=subprocess.PIPE,
        stderr=slave,
        text=True,
    ) as process:
        os.close(slave)
        seen = b""
        with contextlib.suppress(OSError):  # EIO: the other end is closed
            while piece := os.read(master, 65536):
                seen += piece
        os.close(master)
        assert process.stdout is not None
        assert "succeeded: no significant improvement" in process.stdout.read()
    assert process.returncode == 0
    assert b"\x1b[2K" in seen
    assert b"next:  `c2i report" in seen


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
    wrong, step = result.stderr.splitlines()
    assert wrong.startswith("error: ")
    assert step.startswith(
        "try:   mend the line" if expected.startswith(":") and "not JSON" not in expected else "try: "
    )
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
    result = program(None, "submit", file, "--model", "tiny-llama", code=3)
    assert result.stderr.splitlines() == [
        "error: http://127.0.0.1:9 is not reachable",
        "try:   start it with `c2i serve`, or name another with --url or C2I_URL",
    ]


def test_a_worker_without_a_queue_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REDIS_URL", raising=False)
    assert "REDIS_URL" in program(None, "worker", "--data", tmp_path, code=3).stderr
