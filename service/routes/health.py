"""Whether the process lives, whether it can work, who works, and what it measures."""

from __future__ import annotations

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
from pydantic import BaseModel

from service.connections import check_redis
from service.routes.authentication import Admin
from service.routes.dependencies import TheService, documented
from service.workforce import WorkerInfo, list_workers

router = APIRouter(tags=["health"])


class Health(BaseModel):
    """`ok`, or else there is an error."""

    status: str = "ok"


class Readiness(Health):
    """Jobs are accepted. They wait where there are no workers."""

    workers: int


class WorkerList(BaseModel):
    """Workers by the time at which they started."""

    data: list[WorkerInfo]


@router.get("/healthz")
async def alive() -> Health:
    """The process answers."""
    return Health()


@router.get("/readyz", responses=documented())
def ready(service: TheService) -> Readiness:
    """Redis answers and artifacts can be written. How many workers there are is told and not required."""
    check_redis(service.probe)
    service.store.check()
    return Readiness(workers=len(list_workers(service.probe)))


@router.get("/v1/workers", responses=documented())
def list_all_workers(caller: Admin, service: TheService) -> WorkerList:
    """The workers that live, what each is and does."""
    return WorkerList(data=list_workers(service.queue.redis))


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {}}, "description": "Prometheus' text format."}, **documented()},
)
def metrics(caller: Admin, service: TheService) -> Response:
    """For Prometheus; docs/metrics.md says what each metric is."""
    return Response(service.metrics.text(), media_type=CONTENT_TYPE_PLAIN_0_0_4)
