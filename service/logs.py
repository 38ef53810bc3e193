"""Logs: one line an event, JSON where nobody watches, with the IDs of the request and of the job that it belongs to.

What a line may hold is decided here. An exception is told by its type and the places in the code that it came through;
its message only where it is one of ours (`service.errors`), since any other may quote an example, a key or a path. So
may what other packages log and warn of: where they do it is told, and what they say only of those that see no job.
"""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import structlog
from structlog.contextvars import bind_contextvars, clear_contextvars, merge_contextvars
from structlog.typing import EventDict, Processor

from service.errors import C2IError

__all__ = ["belongs_to", "bind_contextvars", "clear_contextvars", "configure", "named", "take_over", "write_to"]

MOST_FRAMES = 12
# Other packages that are given neither examples nor keys nor paths.
INNOCENT = frozenset({"uvicorn", "rq"})
# Their lines on INFO are about themselves: a line for each request, each job taken.
TALKATIVE = ("uvicorn", "rq", "httpx", "urllib3")

_handler = logging.StreamHandler()
_work: dict[str, Any] = {}


def configure(level: str = "INFO") -> None:
    """Send everything, other packages' lines too, to stderr in one form. For the start of a process."""
    shared: list[Processor] = [
        merge_contextvars,
        _tell_work,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
        _tell_exception,
    ]
    on_terminal = sys.stderr.isatty()
    renderer: Processor = structlog.dev.ConsoleRenderer() if on_terminal else structlog.processors.JSONRenderer()
    _handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[_tell_foreign, *shared],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
            use_get_message=False,
            pass_foreign_args=True,
        )
    )
    _handler.setStream(sys.stderr)
    root = logging.getLogger()
    root.handlers = [_handler]
    root.setLevel(level)
    take_over()
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
    warnings.showwarning = _tell_warning
    sys.excepthook = _tell_end
    threading.excepthook = _tell_thread
    sys.unraisablehook = _tell_unraisable
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )


def belongs_to(**work: Any) -> None:
    """What every line of this process belongs to from now on, of threads too, which have no context of their own."""
    _work.clear()
    _work.update(work)


def take_over() -> None:
    """Send what other packages log the same way: for after they are imported, when some have set up their own."""
    for logger in logging.Logger.manager.loggerDict.values():
        if isinstance(logger, logging.Logger):
            logger.handlers.clear()
            logger.propagate = True


def write_to(descriptor: int) -> None:
    """From now on, write into this file instead of stderr."""
    _handler.setStream(open(descriptor, "w", encoding="utf-8", buffering=1))  # noqa: SIM115 - for good


def named(name: str) -> structlog.stdlib.BoundLogger:
    """The logger of a module: `logger.info("what happened", count=3)`."""
    logger: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger(name)
    return logger


def _tell_exception(logger: Any, method: str, event: EventDict) -> EventDict:
    """Replace what is known of an exception by what may be told."""
    given = event.pop("exc_info", None)
    if given is True:
        given = sys.exc_info()
    error = given[1] if isinstance(given, tuple) else given
    if isinstance(error, BaseException):
        event["exception"] = describe(error)
    return event


def _tell_work(_: Any, method: str, event: EventDict) -> EventDict:
    return {**_work, **event}


def _tell_foreign(_: Any, method: str, event: EventDict) -> EventDict:
    """What another package logs: a line of an innocent one, with exceptions in it named by their type."""
    record, given = event["_record"], event.pop("positional_args", ())
    if record.name.partition(".")[0] not in INNOCENT:
        event["event"] = "a package logs something"
        event["at"] = f"{record.module}:{record.lineno} in {record.funcName}"
    elif isinstance(given, tuple) and given:
        arguments = tuple(type(one).__name__ if isinstance(one, BaseException) else one for one in given)
        event["event"] = event["event"] % arguments
    event["event"] = event["event"].partition("\n")[0]
    return event


def _tell_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    named("warnings").warning("a package warns", category=category.__name__, at=f"{Path(filename).stem}:{lineno}")


def _tell_end(_: type[BaseException], error: BaseException, __: TracebackType | None) -> None:
    named("process").critical("the process ends by an error", exc_info=error)


def _tell_thread(ended: threading.ExceptHookArgs) -> None:
    if not isinstance(ended.exc_value, SystemExit):
        named("threading").error("a thread ends by an error", exc_info=ended.exc_value)


def _tell_unraisable(failed: sys.UnraisableHookArgs) -> None:
    named("process").error("an error that nobody can catch", exc_info=failed.exc_value)


def describe(error: BaseException) -> list[dict[str, Any]]:
    """An exception and those that it came from, the last one first."""
    told: list[dict[str, Any]] = []
    current: BaseException | None = error
    while current is not None and len(told) < 5:
        one: dict[str, Any] = {"type": type(current).__name__, "at": _places(current.__traceback__)}
        if isinstance(current, C2IError):
            one["message"] = current.message
        told.append(one)
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return told


def _places(traceback: TracebackType | None) -> list[str]:
    """`service.queue:12 in create`, the innermost last."""
    places = []
    while traceback is not None:
        frame = traceback.tb_frame
        module = frame.f_globals.get("__name__", Path(frame.f_code.co_filename).name)
        places.append(f"{module}:{traceback.tb_lineno} in {frame.f_code.co_name}")
        traceback = traceback.tb_next
    return places[-MOST_FRAMES:]
