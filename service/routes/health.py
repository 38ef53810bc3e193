"""Whether the process lives, and whether it can work."""

from __future__ import annotations

from fastapi import APIRouter
from pydantic import BaseModel

from service.routes.dependencies import TheService, documented

router = APIRouter(tags=["health"])


class Health(BaseModel):
    """`ok`, or else there is an error."""

    status: str = "ok"


@router.get("/healthz")
async def alive() -> Health:
    """The process answers."""
    return Health()


@router.get("/readyz", responses=documented())
def ready(service: TheService) -> Health:
    """Redis answers and artifacts can be written."""
    service.queue.check()
    service.store.check()
    return Health()
