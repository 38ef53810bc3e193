"""Webhooks: every end of a job arrives, signed, once it can; nothing else is reached and nobody is held up."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from standardwebhooks import Webhook as Verifier
from standardwebhooks import WebhookVerificationError
from structlog.testing import capture_logs

from service import counters
from service.connections import connect
from service.embedded import EmbeddedRedis
from service.errors import InvalidInput, UnusableModel
from service.jobs import JobSpec
from service.keys import KeyStore, Scope
from service.queue import MAX_CRASHES, JobQueue
from service.records import new_job_id
from service.webhooks import outbox
from service.webhooks.addresses import is_public, resolve
from service.webhooks.contract import PORTS, DeliveryStatus, Target, WebhookState
from service.webhooks.posting import TOTAL_SECONDS, Poster
from service.webhooks.sender import LONGEST_RETRY_AFTER, RETRIES, Sender
from service.webhooks.signing import SigningSecrets
from tests.live import REPOSITORY, Api, ServeProcess, spec, wait_until
from tests.receiver import Authority, Network, Receiver, Request
from tests.stand_in import make_report

HOST = "hooks.example"
URL = f"https://{HOST}/job?token=t0ken"
RESULT = make_report(JobSpec.parse(spec())).brief()
AT_ONCE = [timedelta()] * 20


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def network(authority: Authority) -> Iterator[Network]:
    made = Network(authority)
    yield made
    made.stop()


@pytest.fixture
def queue(redis: EmbeddedRedis) -> Iterator[JobQueue]:
    made = JobQueue(connect(redis.url), timedelta(days=1))
    yield made
    made.redis.close()


@pytest.fixture
def send(queue: JobQueue, network: Network) -> Iterator[Callable[..., Sender]]:
    started: list[Sender] = []

    def start(total_seconds: float = 5.0, **how: Any) -> Sender:
        sender = Sender(queue, network.poster(total_seconds), **{"retries": AT_ONCE} | how)
        sender.start()
        started.append(sender)
        return sender

    yield start
    for sender in started:
        sender.stop()


def create(queue: JobQueue, url: str = URL, owner: str = "") -> str:
    return queue.create(new_job_id(), JobSpec.parse(spec(webhook={"url": url})), owner).id


def create_ended(queue: JobQueue, url: str = URL, owner: str = "") -> str:
    job_id = create(queue, url, owner)
    queue.cancel(job_id)
    return job_id


def state(queue: JobQueue, job_id: str) -> WebhookState:
    found = queue.get(job_id).webhook
    assert found is not None
    return found


def await_state(queue: JobQueue, job_id: str, status: str, timeout: float = 10) -> WebhookState:
    return wait_until(
        lambda: found if (found := state(queue, job_id)).status == status else None, timeout, f"{job_id} is {status}"
    )


def due_in(queue: JobQueue, lane: str, job_id: str) -> float:
    """Seconds until the next attempt."""
    score = queue.redis.zscore(f"c2i:webhooks:due:{lane}", job_id)
    assert score is not None
    return float(score) / 1000 - time.time()


def verify(queue: JobQueue, request: Request, owner: str = "") -> dict[str, Any]:
    return dict(Verifier(SigningSecrets(queue.redis).of(owner)).verify(request.body, request.headers))


# --- what is refused before anything is sent ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "http://hooks.example/a",
        "ftp://hooks.example/a",
        "hooks.example/a",
        "https:///a",
        "https://",
        "",
        "https://user@hooks.example/",
        "https://user:password@hooks.example/",
        "https://@hooks.example/",
        "https://hooks.example:22/",
        "https://hooks.example:0/",
        "https://hooks.example:80/",
        "https://hooks.example:99999/",
        "https://hooks.example:x/",
        "https://hooks.example:443:443/",
        "https://hooks.example/#fragment",
        "https://hooks.example/a b",
        "https://hooks.example/\n",
        "https://hooks.example\t/",
        "https://hooks.example\\@10.0.0.1/",
        "https://10.0.0.1\\.hooks.example/",
        "https://hööks.example/",
        "https://localhost/",
        "https://intranet/",
        "https://hooks.example./",
        "https://hooks..example/",
        "https://-hooks.example/",
        "https://hooks_.example/",
        f"https://{'a' * 64}.example/",
        f"https://{'a.' * 130}example/",
        "https://127.0.0.1/",
        "https://127.1/",
        "https://2130706433/",
        "https://0x7f.0.0.1/",
        "https://0x7f000001/",
        "https://0177.0.0.1/",
        "https://169.254.169.254/latest/meta-data/",
        "https://[::1]/",
        "https://[::]/",
        "https://[::ffff:127.0.0.1]/",
        "https://[::ffff:93.184.215.14]/",
        "https://[fe80::1%25eth0]/",
        "https://[2606:4700:4700::1111%25eth0]/",
        "https://[64:ff9b::10.0.0.1]/",
        "https://[v1.a]/",
        "https://[::1/",
        "https://hooks.example/" + "a" * 2048,
    ],
)
def test_a_url_that_is_not_https_to_a_public_host_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        JobSpec.parse(spec(webhook={"url": url}))
    assert refused.value.param == "webhook.url"
    assert not url or url not in refused.value.message


@pytest.mark.parametrize(
    ("url", "target"),
    [
        ("https://hooks.example", Target("hooks.example", 443, "/")),
        ("https://HOOKS.Example:443/A?b=%20c", Target("hooks.example", 443, "/A?b=%20c")),
        ("https://a-b.xn--bcher-kva.example:8443/", Target("a-b.xn--bcher-kva.example", 8443, "/")),
        ("https://9.9.9.9/", Target("9.9.9.9", 443, "/")),
        ("https://[2606:4700:4700::1111]:8443?a", Target("2606:4700:4700::1111", 8443, "/?a")),
    ],
)
def test_a_url_is_taken_apart_once(url: str, target: Target) -> None:
    given = JobSpec.parse(spec(webhook={"url": url})).webhook
    assert given is not None
    assert given.target == target
    assert url not in repr(given)


def test_the_host_header_names_a_port_only_where_it_is_unusual() -> None:
    assert Target("hooks.example", 443, "/").authority == "hooks.example"
    assert Target("2606:4700:4700::1111", 8443, "/").authority == "[2606:4700:4700::1111]:8443"


@pytest.mark.parametrize(
    ("public", "addresses"),
    [
        (
            True,
            "1.1.1.1 8.8.8.8 93.184.215.14 100.63.255.255 100.128.0.0 172.15.0.1 172.32.0.1 192.0.1.1 223.255.255.1",
        ),
        (True, "2606:4700:4700::1111 2a00:1450:4001:82a::200e 2001:4860:4860::8888 2001:200::1 2003::1"),
        (False, "0.0.0.0 0.1.2.3 255.255.255.255 240.0.0.1 10.0.0.1 172.16.0.1 172.31.255.255 192.168.0.1"),
        (False, "127.0.0.1 127.255.255.254 169.254.169.254 100.64.0.1 100.100.100.200 100.127.255.255"),
        (False, "192.0.0.1 192.0.0.9 192.0.0.192 192.0.2.1 198.51.100.1 203.0.113.1 198.18.0.1 192.88.99.1"),
        (False, "224.0.0.1 224.0.1.1 232.1.1.1 239.255.255.255 168.63.129.16"),
        (False, ":: ::1 ::127.0.0.1 ::8.8.8.8 ::ffff:127.0.0.1 ::ffff:8.8.8.8 ::ffff:0:8.8.8.8"),
        (False, "64:ff9b::10.0.0.1 64:ff9b::8.8.8.8 64:ff9b:1::1 2002:7f00:1:: 2002:808:808::1 2001:0:7f00:1::"),
        (False, "2001:db8::1 3fff::1 2001:10::1 2001:20::1 100::1 5f00::1 fc00::1 fd00:ec2::254 fe80::1 fec0::1"),
        (False, "ff02::1 ff0e::1 ff05::2 2606:4700:4700::1111%eth0 4000::1 e000::1"),
    ],
)
def test_an_address_of_any_family_is_public_or_not(public: bool, addresses: str) -> None:
    wrong = [one for one in addresses.split() if is_public(ipaddress.ip_address(one)) is not public]
    assert wrong == []


def test_an_address_resolves_to_itself_and_a_name_of_this_machine_to_nothing_public() -> None:
    assert resolve("9.9.9.9", 443) == [("9.9.9.9", 443)]
    assert resolve("2606:4700:4700::1111", 8443) == [("2606:4700:4700::1111", 8443)]
    try:
        found = resolve("localhost", 443)
    except OSError:
        found = []
    assert not any(is_public(ipaddress.ip_address(address)) for address, _ in found)


def test_webhooks_are_off_unless_the_operator_says_otherwise(api: Api) -> None:
    response = api.http.post("/v1/jobs", json=spec(webhook={"url": URL}))
    assert response.status_code == 422
    assert response.json()["error"]["param"] == "webhook"
    assert "C2I_WEBHOOKS" in response.json()["error"]["message"]
    assert api.job(api.submit())["webhook"] is None


# --- what arrives ---------------------------------------------------------------------------------------------------


def test_every_end_of_a_job_is_told_once_and_nothing_else(
    queue: JobQueue, network: Network, send: Callable[..., Sender]
) -> None:
    receiver = network.receiver(HOST)
    send()
    done, failed, poisonous, cancelled, stopped = (create(queue) for _ in range(5))
    queue.succeed(done, queue.start(done), RESULT)
    queue.succeed(done, 1, RESULT)  # by a try whose answer was lost
    queue.fail(failed, queue.start(failed), UnusableModel("no"))
    for _ in range(MAX_CRASHES):
        queue.give_back(poisonous, queue.start(poisonous), "it died", crashed=True)
    queue.cancel(cancelled)
    attempt = queue.start(stopped)
    queue.cancel(stopped)
    assert state(queue, stopped) == WebhookState(status=DeliveryStatus.PENDING)
    queue.cancelled(stopped, attempt)
    for job_id in (done, failed, poisonous, cancelled, stopped):
        assert await_state(queue, job_id, "delivered") == WebhookState(status=DeliveryStatus.DELIVERED, attempts=1)
    told = {verified["data"]["id"]: verified for verified in (verify(queue, one) for one in receiver.requests)}
    assert len(receiver.requests) == 5
    assert {job_id: told[job_id]["type"] for job_id in told} == {
        done: "job.succeeded",
        failed: "job.failed",
        poisonous: "job.failed",
        cancelled: "job.cancelled",
        stopped: "job.cancelled",
    }
    for job_id, verified in told.items():
        job = json.loads(queue.get(job_id).model_dump_json(exclude={"webhook"}))
        assert verified["data"] == job
        assert datetime.fromisoformat(verified["timestamp"]) == queue.get(job_id).finished_at
    assert queue.redis.keys("c2i:webhooks:due*") == []


def test_a_job_over_http_ends_in_a_message_and_its_url_is_nowhere_else(
    data: Path, redis: EmbeddedRedis, network: Network, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    receiver = network.receiver(HOST, "503", "200")
    api = Api(data, redis.url, network.poster(), webhooks=True)
    with contextlib.ExitStack() as stack:
        logged = stack.enter_context(capture_logs())
        stack.callback(api.stop)
        job_id = api.submit(webhook={"url": URL})
        assert api.job(job_id)["webhook"] == {"status": "pending", "attempts": 0, "last_error": None}
        stored = [path.read_bytes() for path in data.rglob("*") if path.is_file() and "redis" not in str(path)]
        api.http.post(f"/v1/jobs/{job_id}/cancel")
        wait_until(lambda: api.job(job_id)["webhook"]["attempts"], 10, "one attempt was made")
        assert api.job(job_id)["webhook"] == {
            "status": "pending",
            "attempts": 1,
            "last_error": "the receiver answered 503",
        }
        request = receiver.requests[0]
        assert (request.line, request.sni) == ("POST /job?token=t0ken HTTP/1.1", HOST)
        assert (request.headers["host"], request.headers["content-type"]) == (HOST, "application/json")
        assert verify(api.service.queue, request)["type"] == "job.cancelled"
        assert "Item 0" not in request.body.decode()
        shown = [api.http.get(path).text for path in ("/v1/jobs", f"/v1/jobs/{job_id}", f"/v1/jobs/{job_id}/events")]
    (told,) = [one for one in logged if one["event"] == "a webhook was not delivered"]
    assert (told["job_id"], told["reason"]) == (job_id, "the receiver answered 503")
    assert stored
    assert not any(b"t0ken" in one for one in stored)
    assert "t0ken" not in "".join([*shown, str(logged), caplog.text])


def test_a_message_is_sent_until_it_is_answered_with_a_2xx_under_one_id(
    queue: JobQueue, network: Network, send: Callable[..., Sender]
) -> None:
    receiver = network.receiver(HOST, "500", "reset", "429 Retry-After: 0", "close", "302 Location: /", "204")
    send()
    assert await_state(queue, create_ended(queue), "delivered").attempts == 6
    assert receiver.connections == 6
    assert len({request.headers["webhook-id"] for request in receiver.requests}) == 1
    assert len({verify(queue, request)["data"]["id"] for request in receiver.requests}) == 1
    assert len({request.body for request in receiver.requests}) == 1
    assert not queue.redis.exists(f"c2i:webhooks:due:{HOST}")


def test_a_redirect_is_not_followed(queue: JobQueue, network: Network, send: Callable[..., Sender]) -> None:
    elsewhere = network.receiver("elsewhere.example")
    receiver = network.receiver(
        HOST, *(f"{code} Location: https://elsewhere.example/" for code in (301, 302, 307, 308))
    )
    send(retries=AT_ONCE[:3])
    assert await_state(queue, create_ended(queue), "failed") == WebhookState(
        status=DeliveryStatus.FAILED, attempts=4, last_error="the receiver answered 308; redirects are not followed"
    )
    assert (receiver.connections, elsewhere.connections) == (4, 0)
    assert set(network.asked) == {HOST}


def test_it_ends_with_a_410_or_with_the_schedule(
    queue: JobQueue, network: Network, send: Callable[..., Sender]
) -> None:
    gone = network.receiver("gone.example", "410", "200")
    network.receiver("broken.example", "500")
    send(retries=AT_ONCE[:3])
    first, second = create_ended(queue, "https://gone.example/"), create_ended(queue, "https://broken.example/")
    assert await_state(queue, first, "failed") == WebhookState(
        status=DeliveryStatus.FAILED, attempts=1, last_error="the receiver answered 410 Gone"
    )
    assert await_state(queue, second, "failed") == WebhookState(
        status=DeliveryStatus.FAILED, attempts=4, last_error="the receiver answered 500"
    )
    assert gone.connections == 1
    assert counters.read(queue.redis)[counters.WEBHOOKS_ENDED, "failed"] == 2


def test_retries_wait_longer_and_longer_for_three_days() -> None:
    assert list(RETRIES) == sorted(RETRIES)
    assert timedelta(days=3) < sum(RETRIES, timedelta()) < timedelta(days=4)


@pytest.mark.parametrize(
    ("answer", "least", "most"),
    [
        ("500", 100, 120),
        ("503 Retry-After: 30", 100, 120),
        ("429 Retry-After: 1000", 1000, 1200),
        ("503 Retry-After: 99999999999999999999", 36_000, 43_200),
        ("503 Retry-After: -5", 100, 120),
        ("503 Retry-After: soon", 100, 120),
        ("503 Retry-After: Fri, 31 Dec 9999 23:59:59 GMT", 36_000, 43_200),
        ("503 Retry-After: Thu, 01 Jan 1970 00:00:00 GMT", 100, 120),
        ("503 Retry-After: IN AN HOUR", 3500, 4320),
    ],
)
def test_a_receiver_may_ask_for_more_time_within_bounds(
    queue: JobQueue, network: Network, send: Callable[..., Sender], answer: str, least: float, most: float
) -> None:
    in_an_hour = format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True)
    network.receiver(HOST, answer.replace("IN AN HOUR", in_an_hour))
    send(retries=[timedelta(seconds=100)])
    job_id = create_ended(queue)
    wait_until(lambda: state(queue, job_id).attempts, 10, "one attempt was made")
    assert least - 5 < due_in(queue, HOST, job_id) <= most


def test_a_key_has_a_secret_of_its_own(queue: JobQueue, network: Network, send: Callable[..., Sender]) -> None:
    receiver = network.receiver(HOST)
    send()
    for owner in ("key_a", "key_b"):
        await_state(queue, create_ended(queue, owner=owner), "delivered")
    theirs, other = receiver.requests
    assert verify(queue, theirs, "key_a")["type"] == verify(queue, other, "key_b")["type"] == "job.cancelled"
    with pytest.raises(WebhookVerificationError):
        verify(queue, theirs, "key_b")


def test_the_message_of_a_deleted_job_is_not_sent(
    queue: JobQueue, network: Network, send: Callable[..., Sender]
) -> None:
    receiver = network.receiver(HOST)
    gone, lost, kept = (create_ended(queue) for _ in range(3))
    queue.delete(gone)
    assert queue.redis.zcard(f"c2i:webhooks:due:{HOST}") == 2
    queue.redis.delete(f"c2i:job:{lost}")
    send()
    await_state(queue, kept, "delivered")
    wait_until(lambda: not queue.redis.exists(f"c2i:webhooks:due:{HOST}"), 10, "nothing is left to be sent")
    assert [verify(queue, request)["data"]["id"] for request in receiver.requests] == [kept]


# --- where it goes --------------------------------------------------------------------------------------------------


def test_the_name_is_resolved_once_an_attempt_and_what_it_means_later_changes_nothing(
    queue: JobQueue, network: Network, send: Callable[..., Sender]
) -> None:
    receiver, inside = network.receiver(HOST, "500"), network.receiver("inside.example")
    allowed = network.names[HOST]
    # Another loopback address stands for one of a private network: the rule of this test allows 127.0.0.1 alone.
    answers = [allowed, [("127.0.0.2", inside.port)], [*allowed, ("127.0.0.2", inside.port)], [], allowed]

    def rebind(host: str, port: int) -> list[tuple[str, int]]:
        network.asked.append(host)
        return answers[len(network.asked) - 1]

    network.resolve = rebind  # type: ignore[method-assign]
    with capture_logs() as logged:
        send(retries=AT_ONCE[:4])
        await_state(queue, create_ended(queue), "failed")
        wait_until(lambda: len(logged) == 5, 5, "all is logged")
    answered, nowhere = "the receiver answered 500", "the host name leads to no public address"
    assert [one["reason"] for one in logged] == [answered, nowhere, nowhere, nowhere, answered]
    assert network.asked == [HOST] * 5
    assert (receiver.connections, inside.connections) == (2, 0)


def test_without_a_rule_of_the_tests_this_machine_is_not_reached(
    queue: JobQueue, network: Network, authority: Authority
) -> None:
    receiver = network.receiver(HOST)
    sender = Sender(queue, Poster(network.resolve, tls=authority.client()))
    sender.start()
    job_id = create_ended(queue)
    wait_until(lambda: state(queue, job_id).attempts, 10, "one attempt was made")
    sender.stop()
    assert state(queue, job_id).last_error == "the host name leads to no public address"
    assert receiver.connections == 0


def test_the_next_address_is_tried_where_one_does_not_answer(
    queue: JobQueue, network: Network, send: Callable[..., Sender]
) -> None:
    receiver = network.receiver(HOST)
    closed = Receiver(receiver._tls)
    closed.stop()
    network.names[HOST].insert(0, ("127.0.0.1", closed.port))
    send()
    assert await_state(queue, create_ended(queue), "delivered").attempts == 1


def test_an_address_that_swallows_everything_does_not_take_the_time_of_the_next(
    queue: JobQueue, network: Network, send: Callable[..., Sender], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.webhooks.posting.CONNECT_SECONDS", 0.3)
    receiver = network.receiver(HOST)
    with contextlib.ExitStack() as stack:
        # Where the queue of connections is full, the kernel drops what comes.
        full = stack.enter_context(socket.socket())
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(2):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        network.names[HOST].insert(0, full.getsockname())
        send()
        assert await_state(queue, create_ended(queue), "delivered").attempts == 1
    assert receiver.connections == 1


def test_a_fault_of_ours_counts_as_an_attempt_and_ends_nothing_else(
    queue: JobQueue, network: Network, send: Callable[..., Sender]
) -> None:
    network.receiver(HOST)
    usual = network.resolve

    def broken(host: str, port: int) -> list[tuple[str, int]]:
        if host == "broken.example":
            raise RuntimeError("t0ken")
        return usual(host, port)

    network.resolve = broken  # type: ignore[method-assign]
    with capture_logs() as logged:
        send(retries=AT_ONCE[:1])
        job_id = create_ended(queue, "https://broken.example/")
        assert await_state(queue, job_id, "failed") == WebhookState(
            status=DeliveryStatus.FAILED, attempts=2, last_error="the attempt failed by a fault of ours"
        )
    assert await_state(queue, create_ended(queue), "delivered").attempts == 1
    assert [one["event"] for one in logged if one["log_level"] == "error"] == [
        "a webhook failed by a fault of ours"
    ] * 2


def test_nothing_is_said_to_a_receiver_whose_certificate_is_not_the_hosts(
    queue: JobQueue, network: Network, send: Callable[..., Sender], tmp_path: Path
) -> None:
    other = network.receiver("other.example", certified="elsewhere.example")
    stranger = Receiver(Authority(tmp_path / "stranger").server(HOST))
    network.names[HOST] = [("127.0.0.1", stranger.port)]
    send(retries=[])
    for url in ("https://other.example/", URL):
        job_id = create_ended(queue, url)
        await_state(queue, job_id, "failed")
        assert state(queue, job_id).last_error == "the receiver's certificate is not valid"
    assert (other.connections, stranger.connections) == (1, 1)
    assert other.requests == stranger.requests == []
    stranger.stop()


def test_proxies_of_the_environment_are_not_used(
    queue: JobQueue, network: Network, send: Callable[..., Sender], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    network.receiver(HOST)
    send()
    assert await_state(queue, create_ended(queue), "delivered").attempts == 1


# --- who is held up -------------------------------------------------------------------------------------------------

TIMED_OUT, BROKE, NO_TLS = "no answer within 4 s", "the connection broke before an answer", "no TLS connection"
HOSTILE = {
    "silence": TIMED_OUT,
    "dripped handshake": TIMED_OUT,
    "no answer": TIMED_OUT,
    "dripped headers": TIMED_OUT,
    "endless 103": TIMED_OUT,
    "endless headers": BROKE,
    "endless body": "the receiver answered 500",
    "close": BROKE,
    "no HTTP": BROKE,
    "garbage": NO_TLS,
    "reset": NO_TLS,
}


def test_hostile_receivers_hold_up_neither_the_others_nor_the_api(
    data: Path, redis: EmbeddedRedis, network: Network, queue: JobQueue
) -> None:
    hosts = {behaviour: f"{behaviour.replace(' ', '-').lower()}.example" for behaviour in HOSTILE}
    receivers = {behaviour: network.receiver(host, behaviour) for behaviour, host in hosts.items()}
    network.receiver(HOST)
    for _ in range(5):
        jobs = {behaviour: create_ended(queue, f"https://{host}/") for behaviour, host in hosts.items()}
    api = Api(data, redis.url, network.poster(total_seconds=4), webhooks=True)
    try:
        wait_until(lambda: all(one.connections for one in receivers.values()), 10, "all were connected to")
        began = time.monotonic()
        honest = api.submit(webhook={"url": URL})
        assert api.http.post(f"/v1/jobs/{honest}/cancel").status_code == 200
        assert time.monotonic() - began < 2  # less than one of the others takes
        assert await_state(queue, honest, "delivered", 10).attempts == 1
        for behaviour, job_id in jobs.items():
            wait_until(lambda job_id=job_id: state(queue, job_id).attempts, 20, f"{behaviour} was tried")  # type: ignore[misc]
            assert (state(queue, job_id).last_error or "").startswith(HOSTILE[behaviour]), behaviour
    finally:
        api.stop()


def test_lanes_take_turns_and_none_takes_all(queue: JobQueue) -> None:
    lease = timedelta(minutes=1)
    flood = [create_ended(queue, owner="key_flood") for _ in range(6)]
    late = create_ended(queue, owner="key_late")
    first = queue.outbox.take(lease, {}, 10, 2)
    assert {one.job_id for one in first} == {flood[0], late}
    assert [one.job_id for one in queue.outbox.take(lease, {"key_flood": 1}, 10, 2)] == [flood[1]]
    assert queue.outbox.take(lease, {"key_flood": 2}, 10, 2) == []
    assert queue.outbox.take(lease, {"key_a": 1, "key_b": 9}, 10, 2) == []
    later = create_ended(queue, owner="key_later")
    # Turns are told apart by the millisecond: the flood's next one is after this job, not in the millisecond of it.
    due = queue.redis.zscore("c2i:webhooks:due", "key_later")
    assert due is not None
    wait_until(lambda: time.time_ns() // 1_000_000 > due, 5, "the clock is past the job's millisecond")
    # The flood waited since before this job, and had its turn then, though more of its messages are older.
    assert [one.job_id for one in queue.outbox.take(lease, {}, 1, 2)] == [flood[2]]
    assert [one.job_id for one in queue.outbox.take(lease, {}, 1, 2)] == [later]


def test_a_name_server_that_hangs_holds_up_its_own_lane_alone(
    queue: JobQueue, network: Network, send: Callable[..., Sender]
) -> None:
    network.receiver(HOST)
    released = threading.Event()
    usual = network.resolve

    def slow(host: str, port: int) -> list[tuple[str, int]]:
        if host == "slow.example":
            assert released.wait(20)
        return usual(host, port)

    network.resolve = slow  # type: ignore[method-assign]
    send(retries=[])
    stuck = [create_ended(queue, "https://slow.example/") for _ in range(6)]
    wait_until(lambda: queue.redis.zcount("c2i:webhooks:due:slow.example", time.time() * 1000, "+inf") == 4, 10, "4")
    await_state(queue, create_ended(queue), "delivered", 5)
    released.set()
    for job_id in stuck:
        await_state(queue, job_id, "failed")


# --- who sends ------------------------------------------------------------------------------------------------------


def test_of_two_senders_one_sends_each_message(queue: JobQueue, network: Network, send: Callable[..., Sender]) -> None:
    receiver = network.receiver(HOST)
    jobs = [create_ended(queue) for _ in range(30)]
    send()
    send()
    for job_id in jobs:
        assert await_state(queue, job_id, "delivered").attempts == 1
    assert len(receiver.requests) == 30


def test_who_lost_the_lease_changes_nothing(queue: JobQueue) -> None:
    job_id = create_ended(queue)
    delivered = WebhookState(status=DeliveryStatus.DELIVERED, attempts=1)
    (slow,) = queue.outbox.take(timedelta(), {}, 9, 9)
    wait_until(lambda: due_in(queue, HOST, job_id) < 0, 5, "the lease has lapsed")
    (other,) = queue.outbox.take(timedelta(minutes=1), {}, 9, 9)
    assert other.job_id == slow.job_id == job_id
    assert not queue.outbox.settle(slow, delivered)
    assert state(queue, job_id).status is DeliveryStatus.PENDING
    assert queue.outbox.settle(other, delivered)
    assert state(queue, job_id) == delivered
    assert not queue.outbox.settle(other, delivered)


def test_a_job_that_is_deleted_while_its_message_is_sent_does_not_come_back(queue: JobQueue) -> None:
    job_id = create_ended(queue)
    (taken,) = queue.outbox.take(timedelta(minutes=1), {}, 9, 9)
    queue.delete(job_id)
    again = WebhookState(status=DeliveryStatus.PENDING, attempts=1, last_error="the receiver answered 503")
    assert not queue.outbox.settle(taken, again, timedelta())
    assert not queue.exists(job_id)
    assert not queue.redis.exists(f"c2i:webhooks:due:{HOST}")


def test_a_message_outlives_its_sender_and_redis(
    data: Path, redis: EmbeddedRedis, network: Network, queue: JobQueue, send: Callable[..., Sender]
) -> None:
    receiver = network.receiver(HOST, "no answer", "200")
    first = send(total_seconds=60, lease=timedelta(seconds=1))
    job_id = create_ended(queue)
    wait_until(lambda: receiver.requests, 10, "it is being sent")
    first.stop()
    waiting = create_ended(queue)
    redis.stop()
    redis.start()
    send()
    assert await_state(queue, job_id, "delivered").attempts == 1
    await_state(queue, waiting, "delivered")
    assert len(receiver.requests) == 3
    assert receiver.requests[0].headers["webhook-id"] in {
        request.headers["webhook-id"] for request in receiver.requests[1:]
    }


def test_the_end_and_its_message_are_one_transaction(queue: JobQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = create(queue)

    def lose(*_: object) -> None:
        raise RuntimeError("the process ends here")

    monkeypatch.setattr(outbox, "add", lose)
    with pytest.raises(RuntimeError):
        queue.cancel(job_id)
    assert queue.get(job_id).finished_at is None
    assert not queue.redis.exists(f"c2i:webhooks:due:{HOST}")
    monkeypatch.undo()
    queue.cancel(job_id)
    assert queue.redis.zcard(f"c2i:webhooks:due:{HOST}") == 1


# --- what operators do ----------------------------------------------------------------------------------------------


def c2i(data: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name != "REDIS_URL" and not name.startswith("C2I_")}
    command = [sys.executable, "-m", "service.cli", *arguments, "--data", str(data)]
    return subprocess.run(command, cwd=REPOSITORY, env=clean, capture_output=True, text=True, timeout=60, check=False)


def test_the_secret_that_an_operator_prints_verifies_by_what_the_page_says(
    data: Path, redis: EmbeddedRedis, network: Network, queue: JobQueue, send: Callable[..., Sender]
) -> None:
    receiver = network.receiver(HOST)
    send()
    key = KeyStore(queue.redis).create("a", frozenset({Scope.SUBMIT}))[1].id
    jobs = {owner: create_ended(queue, owner=owner) for owner in ("", key)}
    (snippet,) = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs" / "webhooks.md").read_text(), re.DOTALL)
    for owner, job_id in jobs.items():
        await_state(queue, job_id, "delivered")
        page: dict[str, Any] = {"SECRET": c2i(data, "webhooks", "secret", *(["--key", key] if owner else [])).stdout}
        exec(snippet, page)
        told = [request for request in receiver.requests if job_id.encode() in request.body]
        assert [page["receive"](one.body, one.headers) for one in told] == [f"{job_id} cancelled"]
        with pytest.raises(WebhookVerificationError):
            page["receive"](told[0].body + b" ", told[0].headers)
    refused = c2i(data, "webhooks", "secret", "--key", "key_0")
    assert refused.returncode != 0
    assert "--key" in refused.stderr


def test_a_service_that_has_them_on_sends_to_public_addresses_alone(data: Path) -> None:
    server = ServeProcess(data, "--workers", "0", env={"C2I_WEBHOOKS": "on"})

    def webhook() -> dict[str, Any]:
        return dict(server.http.get(f"/v1/jobs/{job_id}").json()["webhook"])

    try:
        job_id = server.http.post("/v1/jobs", json=spec(webhook={"url": URL})).json()["id"]
        server.http.post(f"/v1/jobs/{job_id}/cancel")
        wait_until(lambda: webhook()["attempts"], 60, "one attempt was made")
        # No zone has the name.
        assert webhook()["last_error"] == "the host name leads to no public address"
    finally:
        assert server.stop() == 0


def test_the_page_tells_the_schedule_and_the_bounds() -> None:
    page = " ".join((REPOSITORY / "docs" / "webhooks.md").read_text().split())
    units = {"hours": "h", "minutes": "min", "seconds": "s"}
    waits = [
        next(
            f"{wait // timedelta(**{name: 1})} {unit}" for name, unit in units.items() if wait >= timedelta(**{name: 1})
        )
        for wait in RETRIES
    ]
    assert ", ".join(waits[:-1]) + f" and {waits[-1]}" in page
    assert f"within {TOTAL_SECONDS:g} s" in page
    assert f"heeded up to {LONGEST_RETRY_AFTER.total_seconds() / 3600:g} h" in page
    assert f"on port {PORTS[0]} or {PORTS[1]}" in page
