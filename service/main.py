"""Assembles the API."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from redis.exceptions import RedisError
from starlette.exceptions import HTTPException

from service.access import Access
from service.artifacts import ArtifactStore
from service.connections import connect
from service.errors import C2IError, Unauthenticated
from service.jobs import JobSpec
from service.keys import KeyStore
from service.limits import QueueLimits, Rates, Submissions
from service.logs import named
from service.metrics import Metrics
from service.openai.requests import FineTuningRequest
from service.queue import JobQueue
from service.reaper import Reaper
from service.routes import (
    events,
    files,
    health,
    jobs,
    models,
    openai_errors,
    openai_files,
    openai_jobs,
    page,
    tries,
)
from service.routes.authentication import document_keys
from service.routes.dependencies import Service, translate
from service.settings import Settings
from service.tries.contract import TrySpec
from service.tries.queue import TryQueue
from service.watching import Watcher
from service.webhooks.posting import Poster
from service.webhooks.sender import Sender

logger = named(__name__)


def create_app(
    settings: Settings,
    redis_url: str,
    poster: Poster | None = None,
    wake_answerer: Callable[[], None] = lambda: None,
) -> FastAPI:
    """The API over one data folder and one Redis.

    Args:
        poster: sends webhooks, where they are on; by default to public addresses alone.
        wake_answerer: is called, from any thread, when a try waits for its answers.
    """
    redis = connect(redis_url)
    queue = JobQueue(redis, settings.job_ttl, QueueLimits.of(settings))
    probe = connect(redis_url, patient=False)
    store = ArtifactStore(settings.artifacts)
    service = Service(
        settings,
        queue,
        probe,
        store,
        Metrics(JobQueue(probe, settings.job_ttl), store),
        KeyStore(redis),
        Rates(settings.rate_in_force),
        Submissions(),
        Watcher(redis_url),
        TryQueue(redis),
        wake_answerer,
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        reaper = Reaper(service.queue, service.store, settings.job_ttl)
        reaper.start()
        service.watcher.start()
        sender = Sender(service.queue, poster or Poster()) if settings.webhooks else None
        if sender:
            sender.start()
        yield
        await service.watcher.close()
        if sender:
            sender.stop()
        reaper.stop()
        service.queue.redis.close()
        service.probe.close()

    app = FastAPI(
        title="Compress-to-Impress",
        version=version("compress-to-impress"),
        summary="Send a model's ID and a handful of examples; get back a model that does the task better.",
        lifespan=lifespan,
        # FastAPI's own pages take their scripts from elsewhere; `service.routes.page` has one that does not.
        docs_url=None,
        redoc_url=None,
    )
    app.state.service = service
    for resource in (jobs, events, files, models, health, page, openai_files, openai_jobs, tries):
        app.include_router(resource.router)
    for kind in (C2IError, RequestValidationError, HTTPException, RedisError, OSError):
        app.add_exception_handler(kind, _respond)
    app.add_middleware(Access, requests=service.metrics.requests, respond=_respond)
    app.openapi = lambda: _document(app)  # type: ignore[method-assign]
    return app


def _respond(request: Request, error: Exception) -> JSONResponse:
    ours = translate(error)
    if not isinstance(error, C2IError | RequestValidationError | HTTPException):
        logger.error("a request failed", exc_info=error)
    headers = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
    if ours.retryable:
        headers["Retry-After"] = str(ours.retry_after)
    if isinstance(ours, Unauthenticated):
        headers["WWW-Authenticate"] = "Bearer"
    body = ours.body()
    status = openai_errors.restate(request, ours, body, headers)
    return JSONResponse(body, status, headers)


def _document(app: FastAPI) -> dict[str, Any]:
    """FastAPI's schema and the bodies that are parsed from bytes and so unknown to it."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
        for kind in (JobSpec, TrySpec, FineTuningRequest):
            body = kind.model_json_schema(ref_template="#/components/schemas/{model}")
            schema["components"]["schemas"].update(body.pop("$defs", {}))
            schema["components"]["schemas"][kind.__name__] = body
        document_keys(schema, in_force=app.state.service.settings.keys_in_force)
        openai_errors.document(schema)
        app.openapi_schema = schema
    return app.openapi_schema
