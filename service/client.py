"""The HTTP client behind the command line: the service's errors come out as the exceptions they were."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from service.errors import C2IError, InternalError, InvalidInput, Unavailable
from service.jobs import Job, JobEvent
from service.reports import Report

CHUNK_BYTES = 1 << 20
WAIT_SECONDS = 20
# How long a service that restarts is waited for while a job is followed.
PATIENCE_SECONDS = 30.0
RETRY_SECONDS = 0.5


class Client:
    """One service at one URL, with the API key of C2I_KEY where there is one: arguments are no place for a secret."""

    def __init__(self, url: str) -> None:
        self._url = url
        headers = {"Authorization": f"Bearer {key}"} if (key := _key()) else {}
        try:
            self._http = httpx.Client(
                base_url=url, headers=headers, timeout=httpx.Timeout(30, read=60), follow_redirects=False
            )
        except httpx.InvalidURL:
            raise InvalidInput("no URL; it is like http://127.0.0.1:8000", param="url") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._http.close()

    def submit(self, spec: dict[str, Any]) -> Job:
        """Create a job."""
        return Job.model_validate(self._json("POST", "/v1/jobs", json=spec))

    def get(self, job_id: str, wait: float = 0) -> Job:
        """A job, once it has ended or after `wait` seconds."""
        return Job.model_validate(self._json("GET", f"/v1/jobs/{job_id}", params={"wait": wait}))

    def cancel(self, job_id: str) -> Job:
        """Stop a job."""
        return Job.model_validate(self._json("POST", f"/v1/jobs/{job_id}/cancel"))

    def follow(self, job_id: str) -> Iterator[JobEvent]:
        """A job's events as they come, to its end; a stream that is cut off is opened again behind its last event.

        Raises:
            Unavailable: the service is not there; once it was, only if it stays away.
        """
        last: str | None = None
        lost = 0.0
        while True:
            try:
                for event in self._stream(job_id, last):
                    last, lost = event.id, 0.0
                    yield event
                    if event.status.terminal:
                        return
                if self.get(job_id).status.terminal:
                    return  # it had ended before
            except (httpx.TransportError, Unavailable) as error:
                lost = lost or time.monotonic()
                if last is None or time.monotonic() - lost > PATIENCE_SECONDS:
                    raise self._unreachable(error) if isinstance(error, httpx.TransportError) else error from None
            time.sleep(RETRY_SECONDS)

    def _stream(self, job_id: str, after: str | None) -> Iterator[JobEvent]:
        headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": after} if after else {})
        with self._http.stream("GET", f"/v1/jobs/{job_id}/events", headers=headers) as response:
            if response.is_error:
                response.read()
                raise _error(response)
            for line in response.iter_lines():
                if line.startswith("data: "):
                    yield JobEvent.model_validate_json(line.removeprefix("data: "))

    def models(self) -> list[dict[str, Any]]:
        """The installed models."""
        return list(self._json("GET", "/v1/models")["data"])

    def report(self, job_id: str) -> Report:
        """A job's report."""
        return Report.model_validate(self._json("GET", f"/v1/jobs/{job_id}/report"))

    def download(self, job_id: str, folder: Path, prefixes: tuple[str, ...]) -> Iterator[Path]:
        """Fetch the job's files that begin with one of `prefixes`; what is there already is not fetched again.

        Raises:
            InternalError: a file is not what its sha256 says.
        """
        for file in self._json("GET", f"/v1/jobs/{job_id}/files")["data"]:
            if not file["path"].startswith(prefixes):
                continue
            target = folder / file["path"]
            if not file["url"].startswith("/v1/"):  # the key is sent with it
                raise InternalError("the service names a file on another server; nothing more is fetched")
            if not target.resolve().is_relative_to(folder.resolve()):
                raise InternalError("the service names a file outside of the job's folder; nothing more is fetched")
            if not (target.is_file() and _sha256(target) == file["sha256"]):
                self._fetch(file["url"], target, file["sha256"])
            yield target

    def _fetch(self, url: str, target: Path, sha256: str) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.name}.part")
        try:
            with self._http.stream("GET", url) as response, partial.open("wb") as file:
                if response.is_error:
                    response.read()
                    raise _error(response)
                for chunk in response.iter_bytes(CHUNK_BYTES):
                    file.write(chunk)
        except httpx.TransportError as error:
            raise self._unreachable(error) from None
        if _sha256(partial) != sha256:
            raise InternalError(f"{target} was damaged on its way; download it again")
        partial.replace(target)

    def _json(self, method: str, path: str, **options: Any) -> Any:
        try:
            response = self._http.request(method, path, **options)
        except httpx.TransportError as error:
            raise self._unreachable(error) from None
        if response.is_error:
            raise _error(response)
        try:
            return response.json()
        except ValueError:
            raise InternalError(f"{self._url} does not answer as this service does; check --url") from None

    def _unreachable(self, error: httpx.TransportError) -> Unavailable:
        reason = "does not answer in time" if isinstance(error, httpx.TimeoutException) else "is not reachable"
        return Unavailable(f"{self._url} {reason}. Start the service with `c2i serve`, or name another with --url.")


def _key() -> str:
    key = os.environ.get("C2I_KEY", "").strip()
    if not (key.isascii() and key.isprintable()):
        raise InvalidInput("not a key; it is like c2i_ and 43 letters and digits", param="C2I_KEY")
    return key


def _error(response: httpx.Response) -> C2IError:
    """The exception that the service raised."""
    try:
        body = response.json()["error"]
        kind = _kinds().get(body["code"], C2IError)
        return kind(str(body["message"]), param=body["param"])
    except (ValueError, KeyError, TypeError):
        return InternalError(f"{response.request.url} answers {response.status_code}, and not as this service does")


def _kinds() -> dict[str, type[C2IError]]:
    kinds: dict[str, type[C2IError]] = {}
    todo = [C2IError]
    while todo:
        kind = todo.pop()
        kinds.setdefault(kind.code, kind)
        todo += kind.__subclasses__()
    return kinds


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
