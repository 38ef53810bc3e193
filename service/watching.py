"""Tells the long polls and event streams of this process that a job has changed, so that none of them asks Redis.

Every change of a job publishes its ID in its own transaction (`service.queue`). One subscription hears that for all
who wait; while nothing happens, nothing is read. What is published while the subscription is down is lost: once it is
up again, all are woken and look for themselves.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from starlette.concurrency import run_in_threadpool

from service.errors import TooManyRequests
from service.logs import named
from service.transactions import CHANGES

logger = named(__name__)

# A subscription that hears nothing for so long asks whether Redis is still there, and waits so long for its answer.
QUIET_SECONDS = 15.0
ANSWER_SECONDS = 5.0
RECONNECT_SECONDS = 0.5
# Long polls and streams that one caller may have open: each is a connection, of which a process has thousands.
MAX_WAITING = 1_000
RETRY_AFTER_SECONDS = 15


class Watch:
    """One waiter for one job. The first `wait` ends at once: what came before it is to be looked at too."""

    def __init__(self) -> None:
        self._changed = asyncio.Event()
        self._changed.set()

    def wake(self) -> None:
        """End the wait that runs, or else the next one."""
        self._changed.set()

    async def wait(self, seconds: float) -> bool:
        """Whether the job has changed since the last wait; False after so many seconds without a change."""
        try:
            async with asyncio.timeout(seconds):
                await self._changed.wait()
        except TimeoutError:
            return False
        self._changed.clear()
        return True


class Watcher:
    """One a process. All of it belongs to the event loop that calls `start`."""

    def __init__(self, redis_url: str) -> None:
        self.stopped = False
        """Whoever waits is to come to an end."""
        self._redis = Redis.from_url(redis_url, socket_connect_timeout=ANSWER_SECONDS, health_check_interval=0)
        self._watches: dict[str, set[Watch]] = {}
        self._open: Counter[str] = Counter()
        self._heard = 0
        self._reads: dict[Hashable, asyncio.Task[Any]] = {}
        self._task: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        """How many wait for jobs now."""
        return sum(map(len, self._watches.values()))

    def check_room(self, owner: str) -> None:
        """Raises TooManyRequests where a caller has as many open as it may."""
        if self._open[owner] >= MAX_WAITING:
            raise TooManyRequests(
                f"{MAX_WAITING:,} of your long polls and event streams are open, the most allowed; close some, or ask "
                "without `wait`",
                retry_after=RETRY_AFTER_SECONDS,
            )

    @contextmanager
    def watch(self, job_id: str, owner: str = "") -> Iterator[Watch]:
        """Be woken at each event of the job. (It is deleted after its last, which wakes too.)"""
        watch = Watch()
        self._watches.setdefault(job_id, set()).add(watch)
        self._open[owner] += 1
        try:
            yield watch
        finally:
            self._open[owner] -= 1
            if not self._open[owner]:
                del self._open[owner]
            others = self._watches[job_id]
            others.remove(watch)
            if not others:
                del self._watches[job_id]

    async def share(self, key: Hashable, read: Callable[[], Any]) -> Any:
        """What `read` returns, in a thread; whoever asks for the same `key` while it runs gets the same.

        But not what was read before the change that made it ask.
        """
        at = (key, self._heard)
        task = self._reads.get(at)
        if task is None:
            task = self._reads[at] = asyncio.create_task(run_in_threadpool(read))
            task.add_done_callback(lambda _: self._reads.pop(at))
        # One that gives up must not take it from the others.
        return await asyncio.shield(task)

    def start(self) -> None:
        """Subscribe, and again whenever the subscription is lost."""
        self._task = asyncio.create_task(self._run())

    def stop(self) -> None:
        """Wake all who wait, that they end; before the server waits for its connections."""
        self.stopped = True
        self._wake_all()

    async def close(self) -> None:
        """End the subscription."""
        self.stop()
        if self._task:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        await self._redis.aclose()

    async def _run(self) -> None:
        while True:
            try:
                async with self._redis.pubsub() as subscription:
                    await subscription.subscribe(CHANGES)
                    await self._listen(subscription)
            except (RedisError, OSError) as error:
                logger.warning("the subscription to changes is lost", exc_info=error)
            except Exception:
                logger.exception("the watcher failed; it goes on")
            await asyncio.sleep(RECONNECT_SECONDS)

    async def _listen(self, subscription: PubSub) -> None:
        while True:
            message = await subscription.get_message(timeout=QUIET_SECONDS)
            if message is None:
                await subscription.ping()
                message = await subscription.get_message(timeout=ANSWER_SECONDS)
            if message is None:
                raise RedisConnectionError("Redis does not answer")
            self._heard += 1
            if message["type"] == "message":
                for watch in self._watches.get(message["data"].decode(), ()):
                    watch.wake()
            elif message["type"] == "subscribe":
                self._wake_all()

    def _wake_all(self) -> None:
        for watches in self._watches.values():
            for watch in watches:
                watch.wake()
