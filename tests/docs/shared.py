"""One service for all pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tests.live import ServeProcess, wait_until


@dataclass(frozen=True)
class Shared:
    """`c2i serve` for all pages, and its first job."""

    process: ServeProcess
    first: str

    def submit(self, body: dict[str, Any]) -> str:
        """A job's ID."""
        return str(self.process.http.post("/v1/jobs", json=body).json()["id"])

    def job(self, job_id: str, wait: float = 0) -> dict[str, Any]:
        """A job as it is, or once it has ended or after so many seconds."""
        return dict(self.process.http.get(f"/v1/jobs/{job_id}", params={"wait": wait}).json())

    def ended(self, job_id: str) -> dict[str, Any]:
        """A job, once it has ended."""
        return wait_until(
            lambda: job if (job := self.job(job_id, wait=60))["finished_at"] else None, 180, "the job has ended"
        )
