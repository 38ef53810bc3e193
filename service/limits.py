"""What one caller may take of the service: requests a second, jobs waiting and running, tokens, the size of a model."""

from __future__ import annotations

import math
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from anyio import CapacityLimiter

from service.artifacts import ArtifactStore
from service.errors import TooManyRequests, UnusableModel
from service.models import Model
from service.settings import Settings

# A caller that was silent may send so many seconds' worth at once.
BURST_SECONDS = 2.0
# Callers whose buckets are remembered; a bucket that is forgotten is a full one.
REMEMBERED = 10_000
# A job writes a copy of its model and an adapter, which is a small part of it; and the report and tokenizer files.
WITH_ADAPTER = 1.1
BESIDES_BYTES = 64 * 2**20
FEWER = ", or ask for fewer: each round of compress, quantize and gguf writes one, laser and c2i two"
# Submissions over this are large: it takes seconds to count their tokens.
LARGE_BYTES = 1_000_000
# Of one caller, read or checked; they stay in memory meanwhile.
LARGE_OF_A_CALLER = 4
# Checked at the same time, of everybody. Reads of jobs have all the other threads.
LARGE_THREADS = 2
SMALL_THREADS = 16
# When a caller whose large submissions are being checked may send another.
CHECKED_SECONDS = 5
# When a caller whose jobs fill its part of the queue may look again.
LOOK_AGAIN_SECONDS = 15


@dataclass(frozen=True)
class QueueLimits:
    """Of one owner's jobs; None for no limit."""

    waiting: int | None = None
    running: int | None = None

    @classmethod
    def of(cls, settings: Settings) -> QueueLimits:
        """As the operator set them."""
        return cls(settings.max_waiting_jobs, settings.max_running_jobs)

    def check_waiting(self, waiting: int) -> None:
        """Raises TooManyRequests where an owner has as many jobs waiting as it may."""
        if self.waiting is not None and waiting >= self.waiting:
            raise TooManyRequests(
                f"{waiting:,} of your jobs wait already, the most allowed; submit more when some have started",
                retry_after=LOOK_AGAIN_SECONDS,
            )


class Submissions:
    """Bodies of `POST /v1/jobs` that are being read or checked: however many come, and however large, jobs can be read.

    Called from the event loop alone.
    """

    def __init__(self) -> None:
        self._large = CapacityLimiter(LARGE_THREADS)
        self._small = CapacityLimiter(SMALL_THREADS)
        self._of = Counter[str]()

    @contextmanager
    def admit(self, caller: str, declared: str) -> Iterator[CapacityLimiter]:
        """The threads that may check a body.

        Args:
            declared: its `Content-Length`; without one it may be large.

        Raises:
            TooManyRequests: as many of the caller's are large already as may be.
        """
        if declared.isdecimal() and int(declared) <= LARGE_BYTES:
            yield self._small
            return
        if self._of[caller] >= LARGE_OF_A_CALLER:
            raise TooManyRequests(
                f"{LARGE_OF_A_CALLER} submissions of yours of over {LARGE_BYTES:,} bytes, or of no declared length, "
                "are being checked; send the next when one has its answer",
                retry_after=CHECKED_SECONDS,
            )
        self._of[caller] += 1
        try:
            yield self._large
        finally:
            self._of[caller] -= 1
            if not self._of[caller]:
                del self._of[caller]


class Rates:
    """A token bucket for each caller, in this process: a store would cost every request a write synced to disk.

    Called from the event loop alone.
    """

    def __init__(self, per_second: float) -> None:
        """
        Args:
            per_second: requests a second of each caller in the long run; 0 for no limit.
        """
        self._rate = per_second
        self._size = max(1.0, per_second * BURST_SECONDS)
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, caller: str) -> None:
        """Count a request. Raises TooManyRequests, with the time to wait, where the caller's bucket is empty."""
        if not self._rate:
            return
        now = time.monotonic()
        left, at = self._buckets.get(caller, (self._size, now))
        tokens = min(self._size, left + (now - at) * self._rate)
        if tokens < 1:
            wait = math.ceil((1 - tokens) / self._rate)
            raise TooManyRequests(
                f"more than {self._rate:g} requests a second; wait {wait} s, and ask less often: `?wait=60` on a job "
                "answers when it has ended",
                retry_after=wait,
            )
        self._buckets[caller] = (tokens - 1, now)
        self._buckets.move_to_end(caller)
        if len(self._buckets) > REMEMBERED:
            self._buckets.popitem(last=False)


def check_disk(model: Model, store: ArtifactStore, limit: int, copies: int) -> None:
    """Whether a job's files, before all copies of the model, may be written and find room.

    Args:
        copies: models that the job writes; none is larger than this one.

    Raises:
        UnusableModel: they are more than a job may write.
        Unavailable: the disk has no room for them now.
    """
    needed = int((WITH_ADAPTER + copies - 1) * model.bytes) + BESIDES_BYTES
    if needed > limit:
        what, fewer = ("a copy", "") if copies == 1 else (f"{copies} copies", FEWER)
        raise UnusableModel(
            f"{what} of this model and what comes with it take {needed / 1e9:.1f} GB, and a job here may write "
            f"{limit / 1e9:.1f} GB: take a smaller model{fewer}",
            param="model",
        )
    store.check_room(needed)


def check_model_size(model: Model, limit: int | None) -> None:
    """Raises UnusableModel for a model of more parameters than the operator allows."""
    if limit is not None and model.parameters > limit:
        raise UnusableModel(
            f"this model has {model.parameters:,} parameters; this service takes models of up to {limit:,}",
            param="model",
        )
