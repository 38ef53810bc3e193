"""What is sent and how it is signed (https://www.standardwebhooks.com).

    c2i:webhooks:secrets          hash: the signing secret of each owner, made when it is first needed

Each owner has a secret of its own, so that one receiver, who has to know it, cannot forge messages to another. It
lives as long as its API key is of use: another key has another.
"""

from __future__ import annotations

import base64
import json
import secrets
from datetime import UTC, datetime
from typing import TYPE_CHECKING, cast

from standardwebhooks import Webhook as Signer

if TYPE_CHECKING:  # the command line begins without waiting for them
    from redis import Redis

    from service.jobs import Job

SECRETS = "c2i:webhooks:secrets"


class SigningSecrets:
    """The secrets of one Redis."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    def of(self, owner: str) -> str:
        """An owner's secret, `whsec_...`; of the empty owner where no API keys are in use."""
        fresh = "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()
        self._redis.hsetnx(SECRETS, owner, fresh)
        return cast(bytes, self._redis.hget(SECRETS, owner)).decode()


def message(job: Job) -> str:
    """The body that tells of a job's end: the same for every attempt, as a job that has ended does not change."""
    return json.dumps(
        {
            "type": f"job.{job.status.value}",
            "timestamp": job.finished_at.isoformat() if job.finished_at else None,
            "data": job.model_dump(mode="json", exclude={"webhook"}),
        },
        separators=(",", ":"),
    )


def signed_headers(secret: str, job_id: str, body: str) -> dict[str, str]:
    """The headers of one attempt. `webhook-id` is the same for all: receivers know by it what they have seen."""
    now = datetime.now(UTC)
    message_id = "msg_" + job_id.removeprefix("job_")
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": Signer(secret).sign(message_id, now, body),
    }
