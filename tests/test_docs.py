"""The documents: what is made from the code is as the code is now, commands and snippets run, links lead somewhere."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import socket
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from service import division
from service.jobs import MIN_EXAMPLES, JobSpec
from service.models import resolve
from service.routes.events import HEARTBEAT_SECONDS
from service.routes.jobs import LONGEST_WAIT_SECONDS
from service.settings import MAX_BODY_BYTES
from tests import tiny
from tests.conftest import single_thread
from tests.docs.curls import CURLS
from tests.docs.not_run import NOT_RUN, not_run
from tests.docs.own_redis import OwnRedis
from tests.docs.pages import DOCS, OPERATING, all_pages, made_pages, openapi
from tests.docs.reference import anchor, operations
from tests.docs.shared import Shared
from tests.docs.snippets import USUAL_URL, Sandbox, blocks
from tests.live import REPOSITORY, ServeProcess, install, wait_until

MODEL = "smollm2-135m-instruct"
EXAMPLES = tiny.learnable_examples(24)
BODY: dict[str, Any] = {"model": MODEL, "passes": 2, "examples": EXAMPLES}
LONG = BODY | {"passes": 8, "examples": tiny.learnable_examples(2_000)}
LONGER = LONG | {"examples": tiny.learnable_examples(9_000)}
PAGES = {page.relative_to(REPOSITORY).as_posix(): page for page in all_pages()}


def test_what_is_made_from_the_code_is_what_the_code_says_now() -> None:
    for path, text in made_pages().items():
        assert path.read_text() == text, (
            f"{path.relative_to(REPOSITORY)} is out of date: `python -m tests.docs` renews it"
        )


def test_every_route_has_a_command_in_the_reference() -> None:
    routes = {(method, path) for method, path, _ in operations(openapi())}
    assert routes == CURLS.keys(), "tests/docs/curls.py needs a line for each route"


def test_what_is_not_run_is_listed_with_a_reason_and_nothing_else_is_listed() -> None:
    found = [block for page in all_pages() for block in blocks(page)]
    unknown = [b for b in found if b.language == "unknown" and not not_run(b, b.text)]
    assert not unknown, f"neither run nor listed in NOT_RUN: {', '.join(map(str, unknown))}"
    used = {not_run(block, text) for block in found for text in [block.text, *block.commands()]}
    assert NOT_RUN.keys() <= used, f"no such command: {NOT_RUN.keys() - used}"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tiny_models: Callable[..., Path]) -> Path:
    """A data folder with a tiny model under the name that the pages use."""
    folder = tmp_path_factory.mktemp("docs") / "data"
    install(tiny_models("llama"), folder, MODEL)
    return folder


@pytest.fixture(scope="module")
def shared(data: Path) -> Iterator[Shared]:
    process = ServeProcess(data, env={"OMP_NUM_THREADS": "1"})
    # Its worker takes seconds to start: pages that need no job are read meanwhile.
    yield Shared(process, str(process.http.post("/v1/jobs", json=BODY).json()["id"]))
    process.stop()


@pytest.fixture(scope="module")
def finished(shared: Shared) -> str:
    """The ID of a job that has succeeded."""
    job = shared.ended(shared.first)
    assert job["status"] == "succeeded", job
    return shared.first


@pytest.fixture
def two_redis(tmp_path: Path) -> Iterator[tuple[OwnRedis, OwnRedis]]:
    """One that runs, and one that does not yet."""
    old, new = OwnRedis(), OwnRedis()
    old.start("--dir", str(tmp_path))
    yield old, new
    old.stop()
    new.stop()


@pytest.fixture
def sandbox(name: str, data: Path, shared: Shared, tmp_path: Path, request: pytest.FixtureRequest) -> Sandbox:
    """A folder with what the page takes for granted: the model, a job's body, examples, and where the page speaks of a
    job, its adapter."""
    (tmp_path / "data").symlink_to(data)
    (tmp_path / "docs").symlink_to(DOCS)
    (tmp_path / "job.json").write_text(json.dumps(BODY))
    (tmp_path / "task.jsonl").write_text("".join(json.dumps(one) + "\n" for one in EXAMPLES))
    made = Sandbox(tmp_path, shared.process.url, {"OMP_NUM_THREADS": "1", "C2I_DATA": str(data)}, str)
    if not speaks_of_a_job(name):
        return made
    finished: str = request.getfixturevalue("finished")
    archive = tmp_path / "adapter.zip"
    archive.write_bytes(shared.process.http.get(f"/v1/jobs/{finished}/adapter.zip").content)
    zipfile.ZipFile(archive).extractall(tmp_path)

    def job_for(text: str) -> str:
        """The finished job; one of its own, which takes long, for what ends or deletes it."""
        if not re.search("cancel|DELETE", text):
            return finished
        job_id = shared.submit(LONG)
        if "DELETE" in text:
            shared.process.http.post(f"/v1/jobs/{job_id}/cancel")
            shared.ended(job_id)
        return job_id

    made.job_for = job_for
    return made


def speaks_of_a_job(name: str) -> bool:
    return bool(re.search(rf"{USUAL_URL}|\bJOB\b", PAGES[name].read_text()))


def run_page(name: str, sandbox: Sandbox) -> None:
    with single_thread():
        for block in blocks(PAGES[name]):
            if not_run(block, block.text) and block.language != "sh":
                continue
            match block.language:
                case "sh":
                    for command in block.commands():
                        if not not_run(block, command):
                            sandbox.shell(block, command)
                case "python":
                    sandbox.python(block)
                case "diff":
                    sandbox.diff(block)
                case "json":
                    json.loads(block.text)


OTHERS = sorted((n for n, page in PAGES.items() if blocks(page) and page != OPERATING), key=speaks_of_a_job)


@pytest.mark.parametrize("name", OTHERS)
def test_every_command_and_snippet_of_the_page_runs(name: str, sandbox: Sandbox) -> None:
    run_page(name, sandbox)


@pytest.mark.parametrize("name", ["docs/operating.md"])
def test_back_ups_that_were_made_while_the_service_ran_bring_back_jobs_and_artifacts(
    name: str, sandbox: Sandbox, shared: Shared, finished: str, two_redis: tuple[OwnRedis, OwnRedis]
) -> None:
    old, new = two_redis
    sandbox.stands_for = {"127.0.0.1:6379": f"127.0.0.1:{old.port}", "6380": str(new.port)}
    mine = old.create_job(BODY)
    under_way = shared.submit(LONGER)
    wait_until(lambda: shared.job(under_way)["status"] == "running", 60, "a job is under way")
    run_page(name, sandbox)
    shared.process.http.post(f"/v1/jobs/{under_way}/cancel")

    restored = ServeProcess(sandbox.folder / "restored", "--workers", "0")
    try:
        for path in (f"/v1/jobs/{finished}", f"/v1/jobs/{finished}/report", f"/v1/jobs/{finished}/files"):
            assert restored.http.get(path).json() == shared.process.http.get(path).json()
        for file in restored.http.get(f"/v1/jobs/{finished}/files").json()["data"]:
            content = restored.http.get(file["url"]).content
            assert hashlib.sha256(content).hexdigest() == file["sha256"]
        assert restored.http.get(f"/v1/jobs/{under_way}").json()["status"] in ("queued", "running")
    finally:
        restored.stop()
    # As the page says: once restored, it is started with its append-only file.
    assert new.jobs() == {mine}
    new.stop()
    new.start("--dir", str(sandbox.folder / "redis"), "--appendonly", "yes")
    assert new.jobs() == {mine}


@pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx (apt-get install nginx-light) is not installed")
def test_behind_nginx_as_the_page_configures_it_requests_and_streams_come_through(
    shared: Shared, finished: str, tmp_path: Path
) -> None:
    (block,) = [block for block in blocks(OPERATING) if block.language == "nginx"]
    certificate = ["-subj", "/CN=c2i", "-keyout", str(tmp_path / "c2i.key"), "-out", str(tmp_path / "c2i.pem")]
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", *certificate]
    subprocess.run(made, check=True, capture_output=True)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    server = block.text.replace("/etc/ssl", str(tmp_path)).replace("listen 443", f"listen 127.0.0.1:{port}")
    server = server.replace(USUAL_URL, shared.process.url)
    # In this process's hands, whoever it runs as.
    here = f"pid {tmp_path}/pid; daemon off; master_process off; error_log {tmp_path}/log;"
    folders = "".join(f"{kind}_temp_path {tmp_path};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    configuration = tmp_path / "nginx.conf"
    configuration.write_text(f"{here}\nevents {{}}\nhttp {{ access_log off; {folders}\n{server}}}\n")
    nginx = subprocess.Popen(["nginx", "-c", configuration, "-e", tmp_path / "log"])
    try:
        with httpx.Client(base_url=f"https://127.0.0.1:{port}", verify=False) as http:
            ready = wait_until(lambda: answer(http, "/readyz"), 10, "nginx answers")
            assert ready.status_code == 200
            assert re.fullmatch("[0-9a-f]{32}", ready.headers["X-Request-Id"])
            stream = http.get(f"/v1/jobs/{finished}/events", headers={"Accept": "text/event-stream"})
            assert stream.headers["Content-Type"].startswith("text/event-stream")
            assert '"status":"succeeded"' in stream.text
    finally:
        nginx.terminate()
        nginx.wait(10)


def answer(http: httpx.Client, path: str) -> httpx.Response | None:
    try:
        return http.get(path)
    except httpx.TransportError:
        return None


def test_the_figure_shows_every_size_that_a_run_tried(data: Path, tmp_path: Path) -> None:
    from tests.docs.figure import make_figure  # and with it, torch and matplotlib

    spec = JobSpec.parse(BODY | {"passes": 1})
    with single_thread():
        report = make_figure(
            spec, resolve(data / "models", MODEL), tmp_path / "cache", tmp_path / "figure.svg", "title"
        )
    texts = re.findall(r"<!-- (.*?) -->", (tmp_path / "figure.svg").read_text())
    assert {str(c.size) for c in report.passes[0].candidates if c.size > 1 and " and " not in c.description} <= {*texts}
    assert f"all {report.model.components:,} components" in texts
    assert f"the {report.removed.components} removed" in texts


def test_the_pages_tell_the_numbers_that_the_code_has() -> None:
    from workers import climbing, nested, ranking, spectrum, trials  # and with them, torch
    from workers.answering import TERMS

    words = {4: "four", 8: "eight", 16: "16"}
    method, operating = (" ".join(page.read_text().split()) for page in (DOCS / "method.md", OPERATING))
    assert f"Under {division.CROSS_FIT_BELOW} examples, and without" in method
    assert f"over {words[division.FOLDS]} folds" in method
    assert f"Fewer than {words[MIN_EXAMPLES]} examples are refused" in method
    assert f"by a fifth, at most {words[ranking.SMALLEST]}. " in method and ranking.FIRST_STEP == 1 / 5
    assert "over a tenth of the loss" in method and ranking.CREDIBLE == 1 / 10
    assert "with `t > 2`" in method and ranking.CERTAIN == 2
    assert "two sizes beyond" in method and climbing.PATIENCE == 2
    assert "or until a fifth of the gain is gone" in method and climbing.BEHIND == 4 / 5
    assert "the current model (p < .25)" in method and trials.SUSPICION == 1 / 4
    assert "that gains four fifths as much" in method and trials.NEARLY == 4 / 5
    assert "from the third size" in method and climbing.BEGIN == 2
    assert "a quarter of the first one's best" in method and climbing.SECOND_PART == 1 / 4
    assert "on a fifth of the selection split" in method and nested.STRIDE == 5
    assert f"at p < {trials.SIGNIFICANCE:g}".replace("0.", ".") in method
    assert f"go at {spectrum.CACHE_LIMIT_BYTES / 2**30:g} GiB" in operating
    assert f"for up to {LONGEST_WAIT_SECONDS:g} s" in operating
    assert f"silent for over {HEARTBEAT_SECONDS:g} s" in operating
    assert f"{MAX_BODY_BYTES:,} bytes" in operating
    assert f"each try has {TERMS.seconds} s" in operating


def test_the_index_has_every_page() -> None:
    index = LINK.findall((DOCS / "README.md").read_text())
    assert {page.name for page in DOCS.glob("*.md")} - {"README.md"} <= set(index)


LINK = re.compile(r"\]\(([^)\s]+)\)")


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in LINK.findall(re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)):
        if link.startswith(("http://", "https://")):
            assert httpx.URL(link).host
            continue
        path, _, fragment = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        if fragment:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert fragment in {anchor(heading) for heading in headings}, f"{page.name}: {link}"
