"""A job's events as a list and as a stream: the same events, each once, through cuts, restarts and slow readers."""

from __future__ import annotations

import asyncio
import json
import resource
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from redis import Redis

from service import watching
from service.client import Client
from service.connections import connect
from service.embedded import EmbeddedRedis
from service.errors import Unavailable
from service.jobs import JobEvent, Progress, Stage
from service.keys import Scope
from service.queue import JobQueue
from service.routes import events
from service.server import OPEN_FILES
from service.watching import Watcher
from tests.live import Api, ServeProcess, spec, wait_until

STREAM = {"Accept": "text/event-stream"}


@pytest.fixture
def queue(redis: EmbeddedRedis) -> Iterator[JobQueue]:
    """As a worker has it: connections of its own."""
    client = connect(redis.url)
    yield JobQueue(client, timedelta(hours=1))
    client.close()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as threads:
        yield threads


class Listener:
    """A stream that is read in a thread: what came so far, and its end."""

    def __init__(self, pool: ThreadPoolExecutor, url: str, job_id: str, after: str | None = None) -> None:
        self.events: list[dict[str, str]] = []
        self.comments = 0
        self.opened = threading.Event()
        self.end: Future[None] = pool.submit(self._read, f"{url}/v1/jobs/{job_id}/events", after)

    def _read(self, url: str, after: str | None) -> None:
        headers = STREAM | ({"Last-Event-ID": after} if after else {})
        with httpx.stream("GET", url, headers=headers, timeout=30) as response:
            assert response.status_code == 200, response.read()
            assert response.headers["content-type"].startswith("text/event-stream")
            self.opened.set()
            fields: dict[str, str] = {}
            for line in response.iter_lines():
                name, _, value = line.partition(": ")
                if line and name:
                    fields[name] = value
                elif line:
                    self.comments += 1
                elif fields:
                    self.events.append(fields)
                    fields = {}

    @property
    def messages(self) -> list[str]:
        return [json.loads(event["data"])["message"] for event in self.events]

    def await_message(self, message: str) -> None:
        wait_until(lambda: message in self.messages, 15, f"{message!r} is heard; {self.messages} are")


def listed(api: Api, job_id: str, after: str = "") -> list[dict[str, Any]]:
    response = api.http.get(f"/v1/jobs/{job_id}/events", params={"after": after} if after else {})
    return list(response.json()["data"])


def tell(queue: JobQueue, job_id: str, message: str, percent: float = 1.0) -> None:
    queue.progress(job_id, 1, Progress(stage=Stage.SEARCHING, percent=percent), message)


def end(queue: JobQueue, job_id: str) -> None:
    queue.cancel(job_id)
    queue.cancelled(job_id, 1)


def test_a_stream_tells_what_the_list_does_and_ends_with_the_job(
    api: Api, queue: JobQueue, pool: ThreadPoolExecutor
) -> None:
    job_id = api.submit()
    listener = Listener(pool, api.url, job_id)
    listener.await_message("queued")
    queue.start(job_id)
    tell(queue, job_id, "half of it", 50)
    listener.await_message("half of it")
    end(queue, job_id)
    listener.end.result(10)
    expected = listed(api, job_id)
    assert [event["status"] for event in expected] == ["queued", "running", "running", "cancelling", "cancelled"]
    assert [json.loads(event["data"]) for event in listener.events] == expected
    assert [event["id"] for event in listener.events] == [event["id"] for event in expected]
    assert [event["event"] for event in listener.events] == [event["kind"] for event in expected]


def test_a_stream_goes_on_behind_the_last_event_that_the_client_has(
    api: Api, queue: JobQueue, pool: ThreadPoolExecutor
) -> None:
    job_id = api.submit()
    queue.start(job_id)
    tell(queue, job_id, "before the cut")
    first, *later = listed(api, job_id)
    resumed = Listener(pool, api.url, job_id, after=first["id"])
    resumed.await_message("before the cut")
    end(queue, job_id)
    resumed.end.result(10)
    assert [event["id"] for event in resumed.events[: len(later)]] == [event["id"] for event in later]
    assert resumed.messages[-1] == "cancelled while it ran"

    # In the query as well; a browser that reconnects sends both, and its header is the newer one.
    url, last = f"/v1/jobs/{job_id}/events", listed(api, job_id)[-1]["id"]
    by_query = api.http.get(url, params={"after": first["id"]}, headers=STREAM)
    assert by_query.text.count("\nid: ") == len(resumed.events)
    both = api.http.get(url, params={"after": first["id"]}, headers=STREAM | {"Last-Event-ID": later[-1]["id"]})
    assert both.text.count("\nid: ") == 2
    # Nothing is left: 204 keeps a browser from asking again.
    assert api.http.get(url, headers=STREAM | {"Last-Event-ID": last}).status_code == 204


def test_a_job_that_ends_while_its_events_are_read_still_tells_its_end(
    api: Api, queue: JobQueue, redis: EmbeddedRedis
) -> None:
    job_id = api.submit()

    class EndsMeanwhile(Redis):
        def xrange(self, *arguments: Any, **options: Any) -> Any:
            found = super().xrange(*arguments, **options)
            queue.cancel(job_id)
            return found

    client = EndsMeanwhile.from_url(redis.url)
    reading = JobQueue(client, timedelta(hours=1))
    status, before = reading.history(job_id)
    assert (status, [event.status for event in before]) == ("queued", ["queued"])
    status, after = reading.history(job_id, before[-1].id)
    assert (status, [event.status for event in after]) == ("cancelled", ["cancelled"])
    client.close()


def test_what_is_no_event_is_refused_by_the_name_it_was_sent_under(api: Api) -> None:
    job_id = api.submit()
    response = api.http.get(f"/v1/jobs/{job_id}/events", headers=STREAM | {"Last-Event-ID": "yesterday"})
    assert response.status_code == 422
    assert response.json()["error"]["param"] == "Last-Event-ID"
    unknown = api.http.get("/v1/jobs/job_00000000000000000000/events", headers=STREAM)
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "job_not_found")


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("*/*", "application/json"),
        ("application/json, text/event-stream", "application/json"),
        ("text/event-stream, application/json", "text/event-stream"),
        ("Text/Event-Stream;q=0.9", "text/event-stream"),
    ],
)
def test_the_client_says_whether_it_wants_a_stream(api: Api, accept: str, kind: str) -> None:
    job_id = api.submit()
    api.service.queue.cancel(job_id)
    response = api.http.get(f"/v1/jobs/{job_id}/events", headers={"Accept": accept})
    assert response.headers["content-type"].partition(";")[0] == kind


def test_both_kinds_are_documented(api: Api) -> None:
    operation = api.http.get("/openapi.json").json()["paths"]["/v1/jobs/{job_id}/events"]["get"]
    content = operation["responses"]["200"]["content"]
    assert content["application/json"]["schema"]["$ref"].endswith("/EventList")
    assert "text/event-stream" in content
    assert {"after", "last-event-id"} <= {parameter["name"] for parameter in operation["parameters"]}


def test_a_silent_stream_is_kept_alive(api: Api, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "HEARTBEAT_SECONDS", 0.05)
    job_id = api.submit()
    listener = Listener(pool, api.url, job_id)
    wait_until(lambda: listener.comments >= 3, 10, "three comments came")
    assert listener.messages == ["queued"]
    api.service.queue.cancel(job_id)
    listener.end.result(10)


def test_streams_and_long_polls_outlast_a_restart_of_redis(
    api: Api, queue: JobQueue, redis: EmbeddedRedis, pool: ThreadPoolExecutor
) -> None:
    job_id = api.submit()
    queue.start(job_id)
    listener = Listener(pool, api.url, job_id)
    poll = pool.submit(api.job, job_id, 30)
    wait_until(lambda: api.service.watcher.waiting == 2, 10, "both wait")
    redis.stop()
    redis.start()
    tell(queue, job_id, "after the restart")
    listener.await_message("after the restart")
    end(queue, job_id)
    listener.end.result(10)
    assert poll.result(10)["status"] == "cancelled"
    assert listener.messages == [event["message"] for event in listed(api, job_id)]


def test_a_stream_ends_where_its_job_is_deleted(api: Api, pool: ThreadPoolExecutor) -> None:
    job_id = api.submit()
    listener = Listener(pool, api.url, job_id)
    wait_until(lambda: api.service.watcher.waiting, 10, "it waits")
    # Both in one transaction, as if the listener had slept through the job's end.
    pipe = api.service.queue.redis.pipeline()
    for key in api.service.queue.redis.scan_iter(f"c2i:job:{job_id}*"):
        pipe.delete(key)
    pipe.publish("c2i:changes", job_id)
    pipe.execute()
    listener.end.result(10)
    assert listener.messages == ["queued"]


def test_a_long_poll_ends_with_its_job(api: Api, queue: JobQueue, pool: ThreadPoolExecutor) -> None:
    job_id = api.submit()
    queue.start(job_id)
    polls = [pool.submit(api.job, job_id, 60) for _ in range(3)]
    wait_until(lambda: api.service.watcher.waiting == 3, 10, "all wait")
    tell(queue, job_id, "not yet the end")
    end(queue, job_id)
    assert [poll.result(5)["status"] for poll in polls] == ["cancelled"] * 3
    wait_until(lambda: api.service.watcher.waiting == 0, 5, "none waits any more")


def open_socket(api: Api, job_id: str) -> socket.socket:
    """A listener that has asked and reads nothing."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(10)
    client.connect(("127.0.0.1", int(api.url.rpartition(":")[2])))
    request = f"GET /v1/jobs/{job_id}/events HTTP/1.1\r\nHost: test\r\nAccept: text/event-stream\r\n\r\n"
    client.sendall(request.encode())
    return client


def test_listeners_that_are_gone_are_let_go(api: Api) -> None:
    job_id = api.submit()
    clients = [open_socket(api, job_id) for _ in range(20)]
    wait_until(lambda: api.service.watcher.waiting == 20, 10, "all listen")
    for client in clients:
        client.close()
    wait_until(lambda: api.service.watcher.waiting == 0, 10, "none is waited for")


def test_one_caller_takes_no_more_connections_than_its_part(
    api: Api, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "MAX_WAITING", 2)
    job_id = api.submit()
    listeners = [Listener(pool, api.url, job_id) for _ in range(2)]
    wait_until(lambda: api.service.watcher.waiting == 2, 10, "both listen")
    for refused in (
        api.http.get(f"/v1/jobs/{job_id}/events", headers=STREAM),
        api.http.get(f"/v1/jobs/{job_id}", params={"wait": 1}),
    ):
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_requests")
        assert int(refused.headers["Retry-After"]) > 0
    assert api.job(job_id)["status"] == "queued"
    with api.service.watcher.watch(job_id, "another"):
        api.service.watcher.check_room("another")
    api.service.queue.cancel(job_id)
    for listener in listeners:
        listener.end.result(10)
    assert api.job(job_id, wait=1)["status"] == "cancelled"


def test_a_revoked_key_hears_no_more_and_no_other_key_ever(
    data: Path, redis: EmbeddedRedis, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "HEARTBEAT_SECONDS", 0.05)
    monkeypatch.setattr(events, "LONGEST_STREAM_SECONDS", 0.5)
    api = Api(data, redis.url, require_keys=True)
    try:
        scopes = frozenset({Scope.SUBMIT, Scope.READ})
        (text, key), (other, _) = (api.service.keys.create(name, scopes) for name in ("owner", "other"))
        api.http.headers["Authorization"] = f"Bearer {text}"
        job_id = api.submit()
        url = f"{api.url}/v1/jobs/{job_id}/events"
        stranger = httpx.get(url, headers=STREAM | {"Authorization": f"Bearer {other}"})
        assert (stranger.status_code, stranger.json()["error"]["code"]) == (404, "job_not_found")
        assert httpx.get(url, headers=STREAM).status_code == 401
        with api.http.stream("GET", url, headers=STREAM) as response:
            lines = response.iter_lines()
            next(lines)
            api.service.keys.revoke(key.id)
            for _ in lines:
                pass  # to its end, which is not the job's
        assert api.service.queue.status(job_id) == "queued"
        assert api.http.get(url, headers=STREAM).status_code == 401
    finally:
        api.stop()


def test_a_slow_reader_misses_nothing_and_holds_up_nobody(api: Api, queue: JobQueue, pool: ThreadPoolExecutor) -> None:
    job_id = api.submit()
    queue.start(job_id)
    slow, quick = open_socket(api, job_id), Listener(pool, api.url, job_id)
    wait_until(lambda: api.service.watcher.waiting == 2, 10, "both listen")
    for number in range(100):  # 6 MB: more than the kernel takes for a reader that does not read
        tell(queue, job_id, f"{number} " + "x" * 60_000)
    end(queue, job_id)
    quick.end.result(20)
    received = b""
    while not received.endswith(b"0\r\n\r\n"):
        received += slow.recv(1 << 20)
    slow.close()
    assert received.count(b"event: progress") == 100
    assert len(quick.events) == 104


def test_three_hundred_listeners_cost_redis_what_one_does(api: Api, queue: JobQueue) -> None:
    job_id = api.submit()
    queue.start(job_id)

    def reads() -> int:
        return int(queue.redis.info("commandstats").get("cmdstat_xrange", {"calls": 0})["calls"])

    async def listen(client: httpx.AsyncClient) -> list[JobEvent]:
        found = []
        async with client.stream("GET", f"{api.url}/v1/jobs/{job_id}/events", headers=STREAM) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: "):
                    found.append(JobEvent.model_validate_json(line.removeprefix("data: ")))
        return found

    async def everyone() -> tuple[list[list[JobEvent]], int]:
        async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=None)) as client:
            listeners = [asyncio.create_task(listen(client)) for _ in range(300)]
            await asyncio.to_thread(wait_until, lambda: api.service.watcher.waiting == 300, 30, "all listen")
            before = reads()
            for number in range(10):
                await asyncio.to_thread(tell, queue, job_id, f"step {number}")
            await asyncio.to_thread(end, queue, job_id)
            return await asyncio.gather(*listeners), reads() - before

    heard, cost = asyncio.run(everyone())
    assert heard == [api.service.queue.events(job_id)] * 300
    assert cost < 100


def test_the_service_raises_its_limit_of_connections_as_far_as_it_may(data: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        server = ServeProcess(data, "--workers", "0")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    try:
        assert psutil.Process(server.process.pid).rlimit(psutil.RLIMIT_NOFILE)[0] == min(hard, OPEN_FILES)
    finally:
        server.stop()


def test_open_streams_and_long_polls_end_at_once_when_the_service_stops(data: Path, pool: ThreadPoolExecutor) -> None:
    server = ServeProcess(data, "--workers", "0")
    asked = threading.Event()

    def note(event: str, _: dict[str, Any]) -> None:
        if event == "http11.send_request_body.complete":
            asked.set()

    def ask() -> httpx.Response:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            return client.get(f"/v1/jobs/{job_id}", params={"wait": 60}, extensions={"trace": note})

    try:
        job_id = server.http.post("/v1/jobs", json=spec()).json()["id"]
        listeners = [Listener(pool, server.url, job_id) for _ in range(3)]
        poll = pool.submit(ask)
        for listener in listeners:
            listener.await_message("queued")
        assert asked.wait(10)
        # The server's loop has turned since the poll was sent: it has read it.
        for _ in range(2):
            server.http.get("/healthz")
    finally:
        assert server.stop() == 0
    for listener in listeners:
        listener.end.result(1)  # a stream that was cut off raises
    assert poll.result(1).json()["status"] == "queued"


def test_who_follows_a_job_goes_on_where_the_service_has_restarted(data: Path, pool: ThreadPoolExecutor) -> None:
    server = ServeProcess(data, "--workers", "0")
    port = server.url.rpartition(":")[2]
    heard: list[str] = []

    def follow() -> None:
        with Client(f"http://127.0.0.1:{port}") as client:
            for event in client.events(job_id):
                heard.append(event.message)

    try:
        job_id = server.http.post("/v1/jobs", json=spec()).json()["id"]
        following = pool.submit(follow)
        wait_until(lambda: "queued" in heard, 10, "the first event is heard")
        server.kill()
        assert not following.done()
        server = ServeProcess(data, "--workers", "0", "--port", port)
        server.http.post(f"/v1/jobs/{job_id}/cancel")
        following.result(20)
    finally:
        server.stop()
    assert heard == ["queued", "cancelled before it began"]
    with Client(f"http://127.0.0.1:{port}", expect_running=True) as client, pytest.raises(Unavailable):
        next(client.events(job_id))


def test_a_watcher_without_redis_waits_for_it(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path)

    async def wait() -> bool:
        watcher = Watcher(server.url)
        watcher.start()
        with watcher.watch("job_00000000000000000000") as watch:
            assert await watch.wait(0)
            assert not await watch.wait(0.1)
            await asyncio.to_thread(server.start)
            woken = await watch.wait(20)
        await watcher.close()
        return woken

    try:
        assert asyncio.run(wait())
    finally:
        server.stop()


def test_a_read_is_shared_by_those_who_ask_at_once_but_not_across_a_change(redis: EmbeddedRedis) -> None:
    begun, release = threading.Semaphore(0), threading.Event()

    def read() -> object:
        begun.release()
        release.wait(10)
        return object()

    async def ask() -> list[object]:
        watcher = Watcher(redis.url)
        watcher.start()
        with watcher.watch("job_00000000000000000000") as watch:
            await watch.wait(0)
            await watch.wait(10)  # it is subscribed
            before = [asyncio.create_task(watcher.share("key", read)) for _ in range(2)]
            assert await asyncio.to_thread(begun.acquire, timeout=10)
            client = connect(redis.url)
            client.publish("c2i:changes", "job_00000000000000000000")
            client.close()
            assert await watch.wait(10)
            after = asyncio.create_task(watcher.share("key", read))
            assert await asyncio.to_thread(begun.acquire, timeout=10)
            release.set()
            results = await asyncio.gather(*before, after)
        await watcher.close()
        return results

    first, second, third = asyncio.run(ask())
    assert first is second
    assert first is not third
