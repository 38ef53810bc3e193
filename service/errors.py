"""One exception tree for everything a user can be told, in the API, the worker and the command line.

    C2IError                      code             HTTP  retryable
    ├── InvalidInput              invalid_request   422
    │   └── UnusableModel         unusable_model    422
    ├── Unauthenticated           unauthenticated   401
    ├── Forbidden                 forbidden         403
    ├── UnsupportedMediaType      wrong_content_type 415
    ├── PayloadTooLarge           payload_too_large 413
    ├── NotFound                  not_found         404
    │   ├── ModelNotFound         model_not_found   404
    │   └── JobNotFound           job_not_found     404
    ├── MethodNotAllowed          method_not_allowed 405
    ├── Conflict                  conflict          409
    ├── TooManyRequests           too_many_requests 429   yes
    ├── Unavailable               unavailable       503   yes
    ├── OutOfMemory               out_of_memory     500
    ├── OutOfDisk                 out_of_disk       500
    ├── TimedOut                  timed_out         500
    ├── WorkerDied                worker_died       500
    └── InternalError             internal_error    500   yes

`param` names the offending field as a client wrote it: `examples[3].completion`. Messages never hold
example texts, keys or server paths.
"""

from __future__ import annotations

from typing import ClassVar


class C2IError(Exception):
    """Root of the tree: `message` says in words a user can act on what is wrong and what would be right."""

    code: ClassVar[str] = "internal_error"
    status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False
    retry_after: int = 2
    """Seconds after which another try may do, where one may."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    def body(self) -> dict[str, dict[str, str | None]]:
        """The one shape of every error the API sends."""
        return {"error": {"code": self.code, "message": self.message, "param": self.param}}


class InvalidInput(C2IError):
    """The request, or a file given on the command line, breaks a rule that `param` names."""

    code = "invalid_request"
    status = 422


class UnusableModel(InvalidInput):
    """The model exists and is refused: only pickle weights, remote code, an architecture without targets ..."""

    code = "unusable_model"


class Unauthenticated(C2IError):
    """No API key, or one that is unknown, expired or revoked."""

    code = "unauthenticated"
    status = 401


class Forbidden(C2IError):
    """The API key lacks the scope that this needs."""

    code = "forbidden"
    status = 403


class UnsupportedMediaType(C2IError):
    """The body is not `application/json`."""

    code = "wrong_content_type"
    status = 415


class PayloadTooLarge(C2IError):
    """The body is over the limit."""

    code = "payload_too_large"
    status = 413


class NotFound(C2IError):
    """No such route, file or artifact."""

    code = "not_found"
    status = 404


class ModelNotFound(NotFound):
    """No model of this ID is installed."""

    code = "model_not_found"


class JobNotFound(NotFound):
    """No job of this ID, or one that belongs to somebody else."""

    code = "job_not_found"


class MethodNotAllowed(C2IError):
    """The route exists; this method on it does not."""

    code = "method_not_allowed"
    status = 405


class Conflict(C2IError):
    """The job's state does not allow this: a report asked of a running job, a late worker's write."""

    code = "conflict"
    status = 409


class TooManyRequests(C2IError):
    """More requests a second, or more waiting jobs, than one caller may have."""

    code = "too_many_requests"
    status = 429
    retryable = True

    def __init__(self, message: str, *, retry_after: int, param: str | None = None) -> None:
        super().__init__(message, param=param)
        self.retry_after = retry_after


class Unavailable(C2IError):
    """Redis or the disk does not answer."""

    code = "unavailable"
    status = 503
    retryable = True


class OutOfMemory(C2IError):
    """A job needed more memory than its worker has."""

    code = "out_of_memory"


class OutOfDisk(C2IError):
    """A job wrote, or would have to write, more than it may."""

    code = "out_of_disk"


class TimedOut(C2IError):
    """A job ran for longer than it may."""

    code = "timed_out"


class WorkerDied(C2IError):
    """A job's process ended without a word, as often as it was tried."""

    code = "worker_died"


class InternalError(C2IError):
    """A fault of ours; details are in the server's log only."""

    retryable = True
