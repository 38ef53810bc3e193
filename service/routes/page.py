"""The page: the files of `service/web`, a route each, as they lie there; and what this service offers to it.

https://developer.mozilla.org/en-US/docs/Web/HTTP/Guides/CSP: the browser is told to run and fetch what comes from
here alone, so that a text in an example or a model's name can never act.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import APIRouter, Request, Response
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel

from service.jobs import MAX_EXAMPLES, MIN_EXAMPLES
from service.routes.dependencies import TheService, documented
from service.settings import MAX_BODY_BYTES

router = APIRouter(tags=["service"])

WEB = Path(__file__).parent.parent / "web"
# Files that are not served under their own path.
PAGES = {"index.html": "/", "docs.html": "/docs"}
SERVED = (".html", ".css", ".js", ".svg")
HEADERS = {
    "Cache-Control": "no-cache",  # asked for again each time, and not sent again where the ETag is the same
    # Styles may stand in the document: each chart brings its own.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class ServiceInfo(BaseModel):
    """What this service offers and asks for."""

    version: str
    keys_required: bool
    """Whether requests need `Authorization: Bearer KEY`."""
    tries: bool
    """Whether an adapted model can be tried out."""
    webhooks: bool
    """Whether a job's end is told to a URL."""
    min_examples: int
    max_examples: int
    max_tokens: int
    """Of a job: prompts and all answers of its three lists."""
    max_body_bytes: int


@router.get("/v1/service", responses=documented())
def get_service(request: Request, service: TheService) -> ServiceInfo:
    """What this service offers and asks for; open to all."""
    return ServiceInfo(
        version=request.app.version,
        keys_required=service.settings.keys_in_force,
        tries=service.settings.tries_in_force,
        webhooks=service.settings.webhooks,
        min_examples=MIN_EXAMPLES,
        max_examples=MAX_EXAMPLES,
        max_tokens=service.settings.max_tokens,
        max_body_bytes=MAX_BODY_BYTES,
    )


def page_files() -> dict[str, Path]:
    """The file behind each path of the page: `/`, `/theme.css`, ..."""
    files = sorted(file for file in WEB.rglob("*") if file.suffix in SERVED)
    names = {file.relative_to(WEB).as_posix(): file for file in files}
    return {PAGES.get(name, f"/{name}"): file for name, file in names.items()}


def _serve(file: Path, static: StaticFiles) -> Callable[[Request], Awaitable[Response]]:
    async def get_page(request: Request) -> Response:
        response = static.file_response(file, file.stat(), request.scope)
        response.headers.update(HEADERS)
        return response

    return get_page


def add_page(router: APIRouter) -> None:
    """A route for each file. (A mount of the folder would answer for every unknown path too.)"""
    static = StaticFiles(directory=WEB)
    for path, file in page_files().items():
        router.add_api_route(path, _serve(file, static), methods=["GET", "HEAD"], include_in_schema=False)


add_page(router)
