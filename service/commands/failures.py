"""An error on the command line: one line that says what is wrong, one with the next thing to try, and an exit code.

0  done
1  the job failed or was cancelled, or an internal error
2  what was asked for is wrong
3  the service, Redis or the disk does not answer
130  Ctrl-C
"""

from __future__ import annotations

import re
import sys

from service.errors import (
    C2IError,
    Conflict,
    Forbidden,
    InternalError,
    InvalidInput,
    JobNotFound,
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

# The next thing to try where the message does not say it: that of the first kind that an error is of.
NEXT: dict[type[C2IError], str] = {
    JobNotFound: "`c2i jobs` lists your jobs",
    NotFound: "check the URL: --url or C2I_URL",
    Unauthenticated: "set C2I_KEY; `c2i keys create --name NAME` makes a key, on the service's own machine",
    Forbidden: "`c2i keys create --name NAME --scopes submit,read` makes a key that may",
    Conflict: "`c2i watch JOB` shows how far the job is",
    PayloadTooLarge: "split the file, or take fewer examples: some hundred do",
    InternalError: "try again; if it stays, the service's log has the details",
}
UNREACHABLE = "start it with `c2i serve`, or name another with --url or C2I_URL"
LINE_OF_A_FILE = re.compile(r":\d+: ")


def fail(error: C2IError | OSError) -> int:
    """Print an error for people; its exit code."""
    if isinstance(error, OSError):
        _tell(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        return EXIT_UNAVAILABLE
    # Some messages end in what to do: that is the second line then.
    what, hint, rest = error.message.partition(". `c2i ")
    _tell(f"{error.param}: {what}" if error.param else what, f"`c2i {rest}" if hint else _next_step(error))
    if error.retryable and not isinstance(error, InternalError):
        return EXIT_UNAVAILABLE
    return EXIT_FAILED if error.status >= 500 else EXIT_WRONG


def _tell(what: str, step: str | None = None) -> None:
    print(f"error: {what}", file=sys.stderr)
    if step:
        print(f"try:   {step}", file=sys.stderr)


def _next_step(error: C2IError) -> str | None:
    if isinstance(error, TooManyRequests):
        return f"again in {error.retry_after} s"
    if isinstance(error, Unavailable):
        return UNREACHABLE if error.message.endswith(("not reachable", "in time")) else None
    if isinstance(error, Conflict) and not error.message.startswith("the job "):
        return None  # a port, say, or a folder in use: the message names what to choose
    if type(error) is InvalidInput and LINE_OF_A_FILE.search(error.message):
        return "mend the line" + ("; --dry-run checks the file and makes no job" if sys.argv[1] == "submit" else "")
    if isinstance(error, InvalidInput) and error.param:
        of_a_file = error.param.startswith(("examples", "validation", "test"))
        return "mend the file" if of_a_file else f"`c2i {sys.argv[1]} --help` says what there is to choose"
    return next((step for kind, step in NEXT.items() if isinstance(error, kind)), None)
