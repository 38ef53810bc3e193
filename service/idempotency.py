"""`Idempotency-Key`: a request that is sent again, because its answer was lost, creates no second job.

    c2i:idempotency:OWNER:SHA256  hash: the job that the key stands for, and the sha256 of its body; a day long

The claim is written in the transaction that creates the job, which watches it: of any number of requests at once, one
creates the job and all others are answered with it. Keys of different owners never meet.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from datetime import timedelta
from typing import cast

from redis import Redis
from redis.client import Pipeline

from service.errors import Conflict

NAME = "Idempotency-Key"
FORM = re.compile(r"[!-~]{1,255}")
# Longer than any client goes on trying.
KEPT = timedelta(days=1)


@dataclass(frozen=True)
class Claim:
    """What a request with an `Idempotency-Key` claims: this name in Redis, for a body of this sha256."""

    name: str
    body: str

    @classmethod
    def of(cls, owner: str, key: str, body: bytes) -> Claim:
        """The claim of one owner's request."""
        return cls(
            f"c2i:idempotency:{owner}:{hashlib.sha256(key.encode()).hexdigest()}", hashlib.sha256(body).hexdigest()
        )

    def holder(self, redis: Redis | Pipeline) -> str | None:
        """The ID of the job that was created by this claim.

        Raises:
            Conflict: the key was used with another body.
        """
        job_id, body = cast(list[bytes | None], redis.hmget(self.name, "job", "body"))
        if job_id is None or body is None:
            return None
        if body.decode() != self.body:
            raise Conflict(
                "this key was used with another body; send the same bytes to get the same job, or another key for "
                "another job",
                param=NAME,
            )
        return job_id.decode()

    def hold(self, pipe: Pipeline, job_id: str) -> None:
        """Give the claim to a job, as part of a transaction."""
        pipe.hset(self.name, mapping={"job": job_id, "body": self.body})
        pipe.expire(self.name, KEPT)
