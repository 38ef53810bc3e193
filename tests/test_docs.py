"""The documents: what is made from the code is as the code is now, commands and snippets run, links lead somewhere."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests import tiny
from tests.conftest import single_thread
from tests.docs.curls import CURLS
from tests.docs.pages import all_pages, made_pages, openapi
from tests.docs.reference import anchor, operations
from tests.docs.snippets import Block, Sandbox, blocks
from tests.live import REPOSITORY, ServeProcess, install

MODEL = "smollm2-135m-instruct"
PAGES = {page.relative_to(REPOSITORY).as_posix(): page for page in all_pages()}

# What is not run: the page, how the command or the block begins, and why. A new one stands here or runs; the test
# below fails too where one that stands here is gone.

NOT_RUN = {
    ("README.md", "make demo"): "tests/test_demo.py runs it on a tiny model",
    ("README.md", "make test"): "the test suite itself",
    ("README.md", "make chaos"): "half an hour; tests/test_chaos.py runs a part",
    ("README.md", "make fuzz"): "minutes; tests/test_fuzz.py runs a part",
    ("README.md", "make load"): "minutes and needs wrk; tests/test_load.py runs a part",
    ("README.md", "c2i serve"): "serves until it is stopped: the sandbox has one",
    ("README.md", "c2i bench"): "hours; tests/test_benchmark.py runs a small one",
    ("README.md", "service/ "): "the tree; no code",
    ("docs/metrics.md", "max(rate("): "PromQL; tests/test_seeing.py runs what docker/ has of it",
    ("docs/service.md", "python -m tests.chaos"): "half an hour; tests/test_chaos.py runs a part",
    ("docs/service.md", "python -m tests.fuzz"): "minutes; tests/test_fuzz.py runs a part",
    ("docs/service.md", "python -m tests.load"): "minutes and needs wrk; tests/test_load.py runs a part",
    ("docs/webhooks.md", '{"model"'): "cut short; tests/test_webhooks.py sends such a body",
    ("docs/webhooks.md", "c2i webhooks secret"): "needs the ID of a key; tests/test_webhooks.py runs it",
    ("docs/webhooks.md", '"webhook":'): "a part of an answer",
}


def test_what_is_made_from_the_code_is_what_the_code_says_now() -> None:
    for path, text in made_pages().items():
        assert path.read_text() == text, (
            f"{path.relative_to(REPOSITORY)} is out of date: `python -m tests.docs` renews it"
        )


def test_every_route_has_a_command_in_the_reference() -> None:
    routes = {(method, path) for method, path, _ in operations(openapi())}
    assert routes == CURLS.keys(), "tests/docs/curls.py needs a line for each route"


def not_run(block: Block, begins: str) -> tuple[str, str] | None:
    """The line of `NOT_RUN` that is meant."""
    page = block.page.relative_to(REPOSITORY).as_posix()
    return next((key for key in NOT_RUN if key[0] == page and begins.startswith(key[1])), None)


def test_what_is_not_run_is_listed_with_a_reason_and_nothing_else_is_listed() -> None:
    found = [block for page in all_pages() for block in blocks(page)]
    unknown = [b for b in found if b.language not in ("sh", "python", "json", "nginx") and not not_run(b, b.text)]
    assert not unknown, f"neither run nor listed in NOT_RUN: {', '.join(map(str, unknown))}"
    used = {not_run(block, text) for block in found for text in [block.text, *block.commands()]}
    assert NOT_RUN.keys() <= used, f"no such command: {NOT_RUN.keys() - used}"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, tiny_models: Callable[..., Path]) -> Iterator[ServeProcess]:
    """`c2i serve` with a tiny model under the name that the pages use."""
    data = tmp_path_factory.mktemp("docs") / "data"
    install(tiny_models("llama"), data, MODEL)
    process = ServeProcess(data, env={"OMP_NUM_THREADS": "1", "C2I_DATA": str(data)})
    process.data = data  # type: ignore[attr-defined]
    yield process
    process.stop()


def body() -> dict[str, object]:
    return {"model": MODEL, "passes": 2, "examples": tiny.learnable_examples(24)}


@pytest.fixture(scope="module")
def finished(service: ServeProcess) -> str:
    """The ID of a job that has succeeded."""
    job_id = str(service.http.post("/v1/jobs", json=body()).json()["id"])
    job = service.http.get(f"/v1/jobs/{job_id}", params={"wait": 60}).json()
    assert job["status"] == "succeeded", job
    return job_id


@pytest.fixture
def sandbox(service: ServeProcess, finished: str, tmp_path: Path) -> Sandbox:
    """A folder with what the pages take for granted: the model, a job's body, examples, an adapter."""
    data: Path = service.data  # type: ignore[attr-defined]
    (tmp_path / "data").symlink_to(data)
    (tmp_path / "job.json").write_text(json.dumps(body()))
    (tmp_path / "task.jsonl").write_text("".join(json.dumps(one) + "\n" for one in tiny.learnable_examples(24)))
    archive = tmp_path / "adapter.zip"
    archive.write_bytes(service.http.get(f"/v1/jobs/{finished}/adapter.zip").content)
    zipfile.ZipFile(archive).extractall(tmp_path)

    def job_for(text: str) -> str:
        """A finished job; one of its own for what would end or delete it."""
        if not re.search("cancel|DELETE", text):
            return finished
        job_id = str(service.http.post("/v1/jobs", json=body()).json()["id"])
        if "DELETE" in text:
            service.http.post(f"/v1/jobs/{job_id}/cancel")
            service.http.get(f"/v1/jobs/{job_id}", params={"wait": 60})
        return job_id

    return Sandbox(tmp_path, service.url, {"OMP_NUM_THREADS": "1"}, job_for)


@pytest.mark.parametrize("name", [name for name, page in PAGES.items() if blocks(page)])
def test_every_command_and_snippet_of_the_page_runs(name: str, sandbox: Sandbox) -> None:
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
                case "json":
                    json.loads(block.text)


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
