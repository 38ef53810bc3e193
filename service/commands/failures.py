"""An error on the command line: one line that says what is wrong, one with the next thing to try, and an exit code.

0  done
1  the job failed or was cancelled, or an internal error
2  what was asked for is wrong
3  the service, Redis or the disk does not answer
130  Ctrl-C
"""

from __future__ import annotations

import sys

from service.errors import (
    C2IError,
    Conflict,
    Forbidden,
    InternalError,
    InvalidInput,
    JobNotFound,
    ModelNotFound,
    NotFound,
    PayloadTooLarge,
    TooManyRequests,
    Unauthenticated,
    Unavailable,
)

EXIT_FAILED = 1
EXIT_WRONG = 2
EXIT_UNAVAILABLE = 3
EXIT_INTERRUPTED = 130

# What to do, where the message does not say so itself: the first kind that an error is of.
NEXT: dict[type[C2IError], str] = {
    JobNotFound: "`c2i jobs` lists your jobs",
    ModelNotFound: "`c2i models` lists what is installed",
    NotFound: "check the URL: --url or C2I_URL",
    Unauthenticated: "set C2I_KEY; `c2i keys create --name NAME` makes a key, on the service's own machine",
    Forbidden: "`c2i keys create --name NAME --scopes submit,read` makes a key that may",
    Conflict: "`c2i watch JOB` shows how far the job is",
    PayloadTooLarge: "split the file, or take fewer examples: some hundred do",
    InternalError: "try again; if it stays, the service's log has the details",
}
UNREACHABLE = "start it with `c2i serve`, or name another with --url or C2I_URL"


def fail(error: C2IError | OSError) -> int:
    """Print an error for people; its exit code."""
    if isinstance(error, OSError):
        print(f"error: {error.filename}: {error.strerror}" if error.filename else f"error: {error}", file=sys.stderr)
        return EXIT_UNAVAILABLE
    where = f"{error.param}: " if error.param else ""
    print(f"error: {where}{error.message}", file=sys.stderr)
    if step := _next_step(error):
        print(f"try:   {step}", file=sys.stderr)
    if error.retryable and not isinstance(error, InternalError):
        return EXIT_UNAVAILABLE
    return EXIT_FAILED if error.status >= 500 else EXIT_WRONG


def _next_step(error: C2IError) -> str | None:
    if isinstance(error, TooManyRequests):
        return f"again in {error.retry_after} s"
    if isinstance(error, Unavailable):
        return UNREACHABLE if error.message.endswith(("not reachable", "in time")) else None
    if type(error) is InvalidInput and error.param is None:
        return None  # a line of a file: the message names it and what would be right
    if isinstance(error, Conflict) and not error.message.startswith("the job "):
        return None  # a port, say, or a folder in use: the message names what to choose
    return next((step for kind, step in NEXT.items() if isinstance(error, kind)), None)
