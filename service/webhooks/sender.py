"""Sends what is in the outbox, each message until it is answered with a 2xx or the schedule is at its end.

A thread of every API process, with an event loop of its own: what receivers do is waited for there and nowhere else.
A message may arrive twice, when a process dies between the receiver's answer and our note of it.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime

from redis.exceptions import RedisError

from service.errors import JobNotFound
from service.logs import named
from service.queue import JobQueue
from service.webhooks.contract import DeliveryStatus, Target, WebhookState
from service.webhooks.outbox import Taken
from service.webhooks.posting import LOOKUP_SECONDS, TOTAL_SECONDS, Answer, Poster, Undelivered
from service.webhooks.signing import SigningSecrets, message, signed_headers

logger = named(__name__)

LOOK_SECONDS = 0.2
# At the same time, of all lanes and of one.
MOST = 32
MOST_OF_LANE = 4
# Of an attempt, with a margin for a Redis that is slow: what takes longer is dead or stopped.
LEASE = timedelta(seconds=LOOKUP_SECONDS + TOTAL_SECONDS + 30)
# After the first attempt; the schedule that Standard Webhooks gives as its example. Three days in all.
RETRIES = (
    timedelta(seconds=5),
    timedelta(minutes=5),
    timedelta(minutes=30),
    timedelta(hours=2),
    timedelta(hours=5),
    timedelta(hours=10),
    timedelta(hours=14),
    timedelta(hours=20),
    timedelta(hours=24),
)
# Each wait is lengthened by up to this part of it, so that what failed together is not tried together.
JITTER = 0.2
LONGEST_RETRY_AFTER = timedelta(hours=10)


@dataclass(frozen=True)
class Verdict:
    """What went wrong, None for nothing; how long the receiver asks us to wait; whether it wants no more."""

    error: str | None
    wait: timedelta = timedelta()
    gone: bool = False


class Sender(threading.Thread):
    """Sends until it is stopped.

    Args:
        retries: the waits after each attempt.
        lease: how long a message that was taken is left to who took it.
    """

    def __init__(
        self,
        queue: JobQueue,
        poster: Poster,
        retries: Sequence[timedelta] = RETRIES,
        lease: timedelta = LEASE,
    ) -> None:
        super().__init__(name="webhooks", daemon=True)
        self._queue = queue
        self._secrets = SigningSecrets(queue.redis)
        self._poster = poster
        self._retries = retries
        self._lease = lease
        self._stopping = threading.Event()
        self._running: dict[asyncio.Task[None], str] = {}

    def run(self) -> None:
        """Send until `stop`."""
        asyncio.run(self._send())

    def stop(self) -> None:
        """End, breaking off what is under way: it is sent again when its lease has lapsed."""
        self._stopping.set()
        self.join()

    async def _send(self) -> None:
        while not self._stopping.is_set():
            try:
                begun = await self._begin()
            except RedisError as error:
                logger.warning("the webhooks' sender cannot reach Redis", exc_info=error)
                begun = False
            except Exception:
                logger.exception("the webhooks' sender failed; it goes on")
                begun = False
            if begun:
                continue
            if self._running:
                await asyncio.wait(self._running, timeout=LOOK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            else:
                await asyncio.sleep(LOOK_SECONDS)
        under_way = [*self._running]
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)

    async def _begin(self) -> bool:
        """Begin what is due and has room; whether there was any."""
        busy = Counter(self._running.values())
        found = await asyncio.to_thread(self._queue.outbox.take, self._lease, busy, MOST, MOST_OF_LANE)
        for taken in found:
            task = asyncio.create_task(self._deliver(taken))
            self._running[task] = taken.lane
            task.add_done_callback(self._running.pop)
        return bool(found)

    async def _deliver(self, taken: Taken) -> None:
        try:
            await self._attempt(taken)
        except RedisError as error:
            logger.warning("a webhook is left to be sent again", job_id=taken.job_id, exc_info=error)
        except Exception:
            logger.exception("a webhook could not be made; it is left to be sent again", job_id=taken.job_id)

    async def _attempt(self, taken: Taken) -> None:
        letter = await asyncio.to_thread(self._queue.outbox.read, taken)
        try:
            job = await asyncio.to_thread(self._queue.get, taken.job_id)
        except JobNotFound:
            letter = None
        if letter is None:
            await asyncio.to_thread(self._queue.outbox.drop, taken)
            return
        secret = await asyncio.to_thread(self._secrets.of, letter.owner)
        body = message(job)
        try:
            answer = await self._poster.post(Target.parse(letter.url), signed_headers(secret, job.id, body), body)
            verdict = _judge(answer)
        except Undelivered as undelivered:
            verdict = Verdict(str(undelivered))
        except Exception as error:
            logger.error("a webhook failed by a fault of ours", job_id=job.id, exc_info=error)
            # It counts, or it would be tried for ever.
            verdict = Verdict("the attempt failed by a fault of ours")
        await self._settle(taken, letter.attempts + 1, verdict)

    async def _settle(self, taken: Taken, attempts: int, verdict: Verdict) -> None:
        again_in = None
        if verdict.error is None:
            status = DeliveryStatus.DELIVERED
        elif verdict.gone or attempts > len(self._retries):
            status = DeliveryStatus.FAILED
        else:
            status = DeliveryStatus.PENDING
            again_in = max(self._retries[attempts - 1], verdict.wait) * (1 + JITTER * random.random())  # noqa: S311
        state = WebhookState(status=status, attempts=attempts, last_error=verdict.error)
        if not await asyncio.to_thread(self._queue.outbox.settle, taken, state, again_in):
            logger.warning("an attempt at a webhook ended after its lease", job_id=taken.job_id, attempt=attempts)
        elif verdict.error:
            logger.info("a webhook was not delivered", job_id=taken.job_id, attempt=attempts, reason=verdict.error)


def _judge(answer: Answer) -> Verdict:
    if 200 <= answer.status < 300:
        return Verdict(None)
    if answer.status == 410:
        return Verdict("the receiver answered 410 Gone", gone=True)
    if 300 <= answer.status < 400:
        return Verdict(f"the receiver answered {answer.status}; redirects are not followed")
    return Verdict(f"the receiver answered {answer.status}", _retry_after(answer.retry_after))


def _retry_after(text: str | None) -> timedelta:
    """A `Retry-After` in seconds or as a date, within bounds; none where it is neither."""
    text = (text or "").strip()
    if text.isascii() and text.isdigit():
        wait = timedelta(seconds=int(text[:9]))
    else:
        try:
            when = parsedate_to_datetime(text)
        except ValueError:
            return timedelta()
        wait = when.replace(tzinfo=when.tzinfo or UTC) - datetime.now(UTC)
    return min(max(wait, timedelta()), LONGEST_RETRY_AFTER)
