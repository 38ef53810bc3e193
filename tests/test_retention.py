"""What is kept and what goes: record and files together, nothing that is in use, nothing that somebody still reads."""

from __future__ import annotations

import asyncio
import gc
import io
import os
import socket
import struct
import time
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest
from fastapi import Response
from starlette.types import Message

from service.artifacts import ArtifactStore
from service.connections import connect
from service.embedded import EmbeddedRedis
from service.jobs import JobSpec, JobStatus
from service.queue import JobQueue
from service.reaper import ORPHAN, Reaper
from service.records import new_job_id
from service.routes.authentication import Caller
from service.routes.files import get_file, get_model
from service.settings import Settings
from tests.live import Api, spec, wait_until
from tests.stand_in import make_report

GIVEN = JobSpec.parse(spec())
MONTH = timedelta(days=30)


@pytest.fixture
def queue(redis: EmbeddedRedis) -> Iterator[JobQueue]:
    made = JobQueue(connect(redis.url), MONTH)
    yield made
    made.redis.close()


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "store")


def create(queue: JobQueue, store: ArtifactStore) -> str:
    job_id = new_job_id()
    store.put_input(job_id, GIVEN)
    return queue.create(job_id, GIVEN).id


def finish(queue: JobQueue, store: ArtifactStore, job_id: str, content: bytes = b"") -> str:
    attempt = queue.start(job_id)
    with store.workspace(job_id, attempt) as out:
        (out / "model").mkdir()
        (out / "model" / "weights").write_bytes(content or job_id.encode())
        store.publish(job_id, attempt, out)
    queue.succeed(job_id, attempt, make_report(GIVEN).brief())
    return job_id


def age(path: Path, by: timedelta) -> None:
    then = time.time() - by.total_seconds()
    os.utime(path, (then, then))


def test_a_job_is_kept_for_its_time_and_then_record_and_files_go_together(
    queue: JobQueue, store: ArtifactStore, tmp_path: Path
) -> None:
    done = finish(queue, store, create(queue, store))
    running, waiting = create(queue, store), create(queue, store)
    assert queue.redis.ttl(f"c2i:job:{done}") == -1, "the reaper alone ends a job"
    Reaper(queue, store, MONTH).look()
    assert queue.status(done) is JobStatus.SUCCEEDED
    short = JobQueue(queue.redis, timedelta(0))
    attempt = queue.start(waiting)
    reaper = Reaper(short, store, timedelta(0))
    reaper.look()
    reaper.clean()
    # By ID, and those of one millisecond have no order of their own.
    assert [job.id for job in queue.list_jobs(10)] == sorted([waiting, running], reverse=True)
    assert sorted(folder.name for folder in (tmp_path / "store" / "jobs").iterdir()) == sorted([running, waiting])
    assert list((tmp_path / "store" / "blobs").glob("*/*")) == []
    assert short.deleted() == []
    queue.renew_lease(waiting, attempt)
    assert finish(queue, store, running)  # what was left can be worked with


def test_files_of_a_job_whose_deletion_was_cut_off_go_at_the_next_look(
    queue: JobQueue, store: ArtifactStore, tmp_path: Path
) -> None:
    cut_off, kept = (finish(queue, store, create(queue, store)) for _ in range(2))
    queue.delete(cut_off)
    assert len(store.files(cut_off, 1)) == 1
    Reaper(queue, store, MONTH).look()
    assert [folder.name for folder in (tmp_path / "store" / "jobs").iterdir()] == [kept]
    assert len(list((tmp_path / "store" / "blobs").glob("*/*"))) == 1
    assert queue.deleted() == []


def test_what_is_being_downloaded_comes_whole_though_its_job_is_deleted(api: Api) -> None:
    content = os.urandom(32_000_000)
    job_id = finish(api.service.queue, api.service.store, create(api.service.queue, api.service.store), content)
    with (
        api.http.stream("GET", f"/v1/jobs/{job_id}/model.zip") as archive,
        api.http.stream("GET", f"/v1/jobs/{job_id}/files/model/weights") as file,
    ):
        assert (archive.status_code, file.status_code) == (200, 200)
        assert api.http.delete(f"/v1/jobs/{job_id}").status_code == 204
        assert list((api.settings.artifacts / "blobs").glob("*/*")) == []
        assert file.read() == content
        with zipfile.ZipFile(io.BytesIO(archive.read())) as unpacked:
            assert unpacked.read(f"{job_id}-model/model/weights") == content
    assert api.http.get(f"/v1/jobs/{job_id}/model.zip").status_code == 404


@pytest.mark.parametrize("path", ["model.zip", "files/model/weights"])
def test_a_job_may_be_deleted_between_a_request_and_the_first_byte_of_its_answer(api: Api, path: str) -> None:
    content = os.urandom(1_000_000)
    service = api.service
    job_id = finish(service.queue, service.store, create(service.queue, service.store), content)
    caller = Caller("", None)
    answer = (
        get_model(caller, service, job_id)
        if path == "model.zip"
        else get_file(caller, service, job_id, path.removeprefix("files/"))
    )
    service.queue.delete(job_id)
    service.store.delete(job_id)
    assert content in asyncio.run(body_of(answer))


async def body_of(answer: Response) -> bytes:
    """What a server is told to send."""
    body = bytearray()

    async def receive() -> Message:
        await asyncio.Event().wait()
        return {}

    async def send(message: Message) -> None:
        body.extend(message.get("body", b""))

    await answer({"type": "http", "method": "GET", "headers": [], "asgi": {"spec_version": "2.4"}}, receive, send)
    return bytes(body)


@pytest.mark.parametrize("path", ["model.zip", "files/model/weights"])
def test_a_client_that_goes_away_leaves_no_file_open(api: Api, path: str) -> None:
    blobs = api.settings.artifacts / "blobs"
    content = os.urandom(32_000_000)
    job_id = finish(api.service.queue, api.service.store, create(api.service.queue, api.service.store), content)
    gc.disable()  # which would close the files at some time
    try:
        for received in (1, 100_000):
            with socket.create_connection(("127.0.0.1", api.http.base_url.port or 0), timeout=10) as client:
                client.sendall(f"GET /v1/jobs/{job_id}/{path} HTTP/1.1\r\nHost: c2i\r\n\r\n".encode())
                assert client.recv(received).startswith(b"H")
                wait_until(lambda: opened(blobs), 5, "it is being sent")
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
        wait_until(lambda: not opened(blobs), 10, "nothing is held open")
    finally:
        gc.enable()


def opened(folder: Path) -> list[Path]:
    """What this process, in which the API runs, holds open below a folder."""
    links = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            links.append(descriptor.readlink())
    return [link for link in links if link.is_relative_to(folder)]


def test_files_without_a_record_stay_for_a_day_if_an_input_and_for_the_jobs_time_if_a_result(
    queue: JobQueue, store: ArtifactStore, tmp_path: Path
) -> None:
    fresh, cut_off, lost = new_job_id(), new_job_id(), finish(queue, store, create(queue, store))
    waiting = create(queue, store)
    for job_id in (fresh, cut_off):
        store.put_input(job_id, GIVEN)
    queue.redis.delete(f"c2i:job:{lost}")
    jobs = tmp_path / "store" / "jobs"
    for job_id in (cut_off, lost, waiting):
        age(jobs / job_id, 2 * ORPHAN)
    Reaper(queue, store, MONTH).clean()
    assert sorted(folder.name for folder in jobs.iterdir()) == sorted([fresh, lost, waiting])
    for job_id in (lost, waiting):
        age(jobs / job_id, 2 * MONTH)
    Reaper(queue, store, MONTH).clean()
    assert sorted(folder.name for folder in jobs.iterdir()) == sorted([fresh, waiting])


def test_workspaces_of_attempts_that_are_over_go_and_others_stay(
    queue: JobQueue, store: ArtifactStore, tmp_path: Path
) -> None:
    work = tmp_path / "store" / "work"
    running, again, given_back = (create(queue, store) for _ in range(3))
    done = finish(queue, store, create(queue, store))
    for job_id in (running, again, given_back):
        queue.start(job_id)
    for job_id in (again, given_back):
        queue.give_back(job_id, 1, "a power cut", crashed=True)
    queue.start(again)
    for name in (f"{running}.1", f"{again}.1", f"{again}.2", f"{given_back}.1", f"{done}.1", f"{new_job_id()}.1"):
        (work / name).mkdir()
        (work / name / "half").write_text("half")
    Reaper(queue, store, MONTH).look()
    assert sorted(folder.name for folder in work.iterdir()) == sorted([f"{running}.1", f"{again}.2"])


def test_a_manifest_that_a_dead_process_left_half_written_is_swept(store: ArtifactStore, tmp_path: Path) -> None:
    store.put_input("job", GIVEN)
    half = tmp_path / "store" / "jobs" / "job" / ".1.manifest.json.4194304"
    half.write_text("[{")
    store.sweep()
    assert not half.exists()
    assert store.get_input("job") == GIVEN


def test_how_long_a_job_is_kept_is_set_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("C2I_JOB_TTL_SECONDS", "3600")
    assert Settings().job_ttl == timedelta(hours=1)
