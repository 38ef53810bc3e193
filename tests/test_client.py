"""`service.client`, blocking and asynchronous, against the real service and a bad network before it."""

from __future__ import annotations

import hashlib
import inspect
import socket
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

import service.client
from service.client import AsyncClient, Client
from service.errors import (
    Conflict,
    InternalError,
    InvalidInput,
    JobNotFound,
    TooManyRequests,
    Unauthenticated,
    Unavailable,
)
from service.jobs import JobSpec, JobStatus
from tests.between import Between, Cut, answer
from tests.live import Api, WorkerProcess, spec, wait_until

Call = Callable[..., Any]
KEY = "Idempotency-Key"


@pytest.fixture(params=["blocking", "asynchronous"])
def call(request: pytest.FixtureRequest) -> Call:
    """`call(url, "get", job_id)` asks with either client; what is iterated comes as a list."""

    def blocking(url: str, name: str, *args: Any, patience: float = 10.0, **kwargs: Any) -> Any:
        with Client(url, patience=patience) as client:
            found = getattr(client, name)(*args, **kwargs)
            return list(found) if inspect.isgenerator(found) else found

    def asynchronous(url: str, name: str, *args: Any, patience: float = 10.0, **kwargs: Any) -> Any:
        async def run() -> Any:
            async with AsyncClient(url, patience=patience) as client:
                found = getattr(client, name)(*args, **kwargs)
                return [one async for one in found] if inspect.isasyncgen(found) else await found

        return anyio.run(run)

    return blocking if request.param == "blocking" else asynchronous


@pytest.fixture(scope="module")
def done(shared_api: Api) -> Iterator[str]:
    """A job that has succeeded."""
    worker = WorkerProcess(shared_api.settings.data, shared_api.redis_url)
    job_id = shared_api.submit()
    shared_api.await_status(job_id, "succeeded")
    yield job_id
    worker.kill()


def test_a_job_from_spec_to_files(shared_api: Api, done: str, call: Call, tmp_path: Path) -> None:
    url = shared_api.url
    assert call(url, "models")[0].id == "tiny-llama"
    parsed = JobSpec.parse(spec(metadata={"do": "slow"}))
    assert call(url, "estimate", parsed).seconds > 0
    job_id = call(url, "submit", parsed).id
    messages = [event.message for event in call(url, "events", job_id)]
    assert messages[0] == "queued"
    assert "at work" in messages
    ended = call(url, "wait", job_id)
    assert ended.status is JobStatus.SUCCEEDED
    assert ended.metadata == {"do": "slow"}
    assert call(url, "events", job_id, after=call(url, "events", job_id)[-1].id) == []
    assert call(url, "report", job_id).verdict == ended.result.verdict
    paths = call(url, "download", job_id, tmp_path / "out")
    published = call(url, "files", job_id)
    assert [path.relative_to(tmp_path / "out").as_posix() for path in paths] == [file.path for file in published]
    assert all(_sha256(path) == file.sha256 for path, file in zip(paths, published, strict=True))
    assert call(url, "delete", job_id) is None
    with pytest.raises(JobNotFound):
        call(url, "get", job_id)


def test_jobs_come_newest_first_over_as_many_pages_as_there_are_and_a_wait_has_an_end(
    api: Api, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.client.operations.PAGE", 2)
    ids = [api.submit() for _ in range(5)]
    assert [job.id for job in call(api.url, "jobs")] == ids[::-1]
    assert [job.id for job in call(api.url, "jobs", limit=3)] == ids[:1:-1]
    with pytest.raises(TimeoutError, match=ids[0]):
        call(api.url, "wait", ids[0], timeout=0.05)
    cancelled = call(api.url, "cancel", ids[0])
    assert cancelled.status is JobStatus.CANCELLED
    with pytest.raises(Conflict):
        call(api.url, "report", ids[0])


def test_the_example_of_the_documentation_runs(
    shared_api: Api, done: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (service.client.__doc__ or "").partition("\n\n")[2].partition("\n\n`AsyncClient`")[0]
    text = text.replace("http://127.0.0.1:8000", shared_api.url).replace("smollm2-135m-instruct", "tiny-llama")
    monkeypatch.chdir(tmp_path)
    exec(textwrap.dedent(text), {})
    assert "no significant improvement" in capsys.readouterr().out
    assert len(list(tmp_path.glob("job_*/adapter/adapter_model.safetensors"))) == 1


def test_a_download_that_is_cut_off_goes_on_where_it_was(
    shared_api: Api, done: str, call: Call, tmp_path: Path
) -> None:
    held: list[int] = []
    # The manifest's connection is used for the file too, until it is cut.
    with Between(shared_api.url, Cut(400_000), Cut(300_000)) as between:
        only, told = ("adapter/adapter_model",), lambda file, bytes_held: held.append(bytes_held)
        (path,) = call(between.url, "download", done, tmp_path, only=only, on_bytes=told)
        ranges = between.headers("range")
        tags = between.headers("if-range")
    assert path.read_bytes() == bytes(range(256)) * 4096
    assert len(ranges) == 2
    begins = [int(value.removeprefix("bytes=").removesuffix("-")) for value in ranges]
    assert 0 < begins[0] < begins[1] < 2**20
    assert set(tags) == {f'"{_sha256(path)}"'}
    assert held == sorted(held)
    assert held[-1] == 2**20
    assert [one.name for one in path.parent.iterdir()] == [path.name]


def test_a_download_whose_process_died_goes_on_and_trusts_no_damaged_part(
    shared_api: Api, done: str, call: Call, tmp_path: Path
) -> None:
    only = ("adapter/adapter_model",)
    with Between(shared_api.url, Cut(500_000)) as between, pytest.raises(Unavailable):
        call(between.url, "download", done, tmp_path, only=only, patience=-1)
    (part,) = (tmp_path / "adapter").iterdir()
    assert part.suffix == ".part"
    size = part.stat().st_size
    assert 0 < size < 2**20
    part.write_bytes(b"x" * size)
    with Between(shared_api.url) as between:
        (path,) = call(between.url, "download", done, tmp_path, only=only)
        assert between.headers("range") == [f"bytes={size}-"]
    assert path.read_bytes() == bytes(range(256)) * 4096
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    call(shared_api.url, "download", done, tmp_path, only=only)
    assert path.read_bytes() == bytes(range(256)) * 4096


@pytest.mark.parametrize(
    ("path", "url"), [("../outside", "/v1/x"), ("/etc/outside", "/v1/x"), ("inside", "http://elsewhere/v1/x")]
)
def test_a_file_is_never_written_outside_nor_fetched_elsewhere(call: Call, tmp_path: Path, path: str, url: str) -> None:
    files = [
        {"path": name, "bytes": 1, "sha256": "0" * 64, "url": place} for name, place in (("a", "/v1/a"), (path, url))
    ]
    with Between("http://127.0.0.1:9", answer(200, {"data": files})) as between:
        with pytest.raises(InternalError, match="nothing is fetched"):
            call(between.url, "download", "job", tmp_path / "folder")
        assert b"/v1/a" not in between.seen
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("content", [b"short", b"too long for it", b"damaged!!!"])
def test_a_file_that_is_not_what_was_said_is_not_kept(call: Call, tmp_path: Path, content: bytes) -> None:
    file = {"path": "file", "bytes": 10, "sha256": hashlib.sha256(b"0123456789").hexdigest(), "url": "/v1/file"}
    sent = f"HTTP/1.1 200 OK\r\nContent-Length: {len(content)}\r\nConnection: close\r\n\r\n".encode() + content
    manifest = answer(200, {"data": [file]})
    with Between("http://127.0.0.1:9", manifest, sent) as between, pytest.raises(InternalError):
        call(between.url, "download", "job", tmp_path)
    assert not (tmp_path / "file").exists()


def test_a_stream_that_is_cut_off_loses_and_doubles_no_event(shared_api: Api, done: str, call: Call) -> None:
    whole = call(shared_api.url, "events", done)
    with Between(shared_api.url, Cut(500), Cut(700)) as between:
        assert call(between.url, "events", done) == whole
        resumed = between.headers("last-event-id")
    assert len(resumed) >= 1
    assert set(resumed) <= {event.id for event in whole}


@pytest.mark.parametrize(("status", "operation"), [(429, "models"), (503, "events")])
def test_a_busy_service_is_asked_again_when_it_says(
    shared_api: Api, done: str, call: Call, status: int, operation: str
) -> None:
    arguments = (done,) if operation == "events" else ()
    with Between(shared_api.url, answer(status, None, {"Retry-After": "1"})) as between:
        began = time.monotonic()
        assert call(between.url, operation, *arguments) == call(shared_api.url, operation, *arguments)
        assert time.monotonic() - began >= 1


def test_patience_is_bounded_and_the_error_says_when_to_come_again(call: Call) -> None:
    error = {"error": {"code": "too_many_requests", "message": "too fast", "param": None}}
    with Between("http://127.0.0.1:9", answer(429, error, {"Retry-After": "3600"})) as between:
        began = time.monotonic()
        with pytest.raises(TooManyRequests, match="too fast") as refusal:
            call(between.url, "models", patience=5)
        assert time.monotonic() - began < 3
    assert refusal.value.retry_after == 3600


def test_what_is_refused_for_good_is_not_sent_again(shared_api: Api, call: Call) -> None:
    with Between(shared_api.url) as between:
        with pytest.raises(InvalidInput) as refusal:
            call(between.url, "submit", spec(passes=99))
        assert refusal.value.param == "passes"
        assert between.seen.count(b"POST /v1/jobs") == 1


def test_a_submission_whose_answer_is_lost_creates_one_job(api: Api, call: Call) -> None:
    with Between(api.url, Cut(0), Cut(100)) as between:
        job = call(between.url, "submit", spec())
        keys = between.headers(KEY)
    assert len(keys) == 3
    assert len(set(keys)) == 1
    assert [one.id for one in call(api.url, "jobs")] == [job.id]
    # Two calls are two jobs, unless the caller's own key says that they are one.
    assert call(api.url, "submit", spec()).id != job.id
    mine = call(api.url, "submit", spec(), idempotency_key="mine")
    assert call(api.url, "submit", spec(), idempotency_key="mine").id == mine.id


def test_a_deletion_whose_answer_is_lost_is_no_error(api: Api, call: Call) -> None:
    job_id = api.submit()
    call(api.url, "cancel", job_id)
    with Between(api.url, Cut(0)) as between:
        assert call(between.url, "delete", job_id) is None
    with pytest.raises(JobNotFound):
        call(api.url, "delete", job_id)


def test_a_service_that_starts_late_is_waited_for(shared_api: Api, call: Call) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    started: list[Between] = []

    def start() -> None:
        wait_until(lambda: time.monotonic() > began + 0.3, 5, "the client has been refused")
        started.append(Between(shared_api.url, port=port))

    began = time.monotonic()
    starting = threading.Thread(target=start)
    starting.start()
    try:
        assert call(f"http://127.0.0.1:{port}", "models")
    finally:
        starting.join()
        started[0].__exit__()


def test_a_service_that_is_not_there_is_unavailable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    began = time.monotonic()
    with Client(url, expect_running=True) as client, pytest.raises(Unavailable, match="not reachable"):
        client.models()
    assert time.monotonic() - began < 1
    with Client(url, patience=1.2) as client, pytest.raises(Unavailable, match="not reachable"):
        client.models()
    assert time.monotonic() - began > 0.5


def test_url_and_key_are_arguments_or_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = answer(401, {"error": {"code": "unauthenticated", "message": "no", "param": None}})
    with Between("http://127.0.0.1:9", refused, refused) as between:
        monkeypatch.setenv("C2I_URL", between.url)
        monkeypatch.setenv("C2I_KEY", "c2i_environment")
        for key in (None, "c2i_argument"):
            with Client(key=key) as client, pytest.raises(Unauthenticated, match=r"^no$"):
                client.models()
        assert between.headers("authorization") == ["Bearer c2i_environment", "Bearer c2i_argument"]
    for url in ("127.0.0.1:8000", "ftp://127.0.0.1", "http://", "nonsense"):
        with pytest.raises(InvalidInput) as refusal:
            Client(url)
        assert refusal.value.param == "url"


def test_an_answer_of_something_else_is_told_as_that(call: Call) -> None:
    with Between("http://127.0.0.1:9", answer(200, ["hello"]), answer(302, None, {"Location": "/"})) as between:
        for _ in range(2):
            with pytest.raises(InternalError, match="as this service does"):
                call(between.url, "models")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
