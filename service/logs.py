"""Logs: one line an event, JSON where nobody watches, with the IDs of the request and of the job that it belongs to.

What a line may hold is decided here. An exception is told by its type and the places in the code that it came through;
its message only where it is one of ours (`service.errors`), since any other may quote an example, a key or a path.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

import structlog
from structlog.contextvars import bind_contextvars, clear_contextvars, merge_contextvars
from structlog.typing import EventDict, Processor

from service.errors import C2IError

__all__ = ["bind_contextvars", "clear_contextvars", "configure", "named"]

MOST_FRAMES = 12


def configure(level: str = "INFO") -> None:
    """Send everything, other packages' lines too, to stderr in one form. For the start of a process."""
    shared: list[Processor] = [
        merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
        structlog.stdlib.PositionalArgumentsFormatter(),
        _tell_exception,
    ]
    on_terminal = sys.stderr.isatty()
    renderer: Processor = structlog.dev.ConsoleRenderer() if on_terminal else structlog.processors.JSONRenderer()
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level)
    # Their lines on INFO are about themselves: a line for each request, each job taken.
    for name in ("uvicorn", "rq", "httpx", "httpx2", "urllib3"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
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
