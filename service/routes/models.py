"""The installed models."""

from __future__ import annotations

from fastapi import APIRouter
from pydantic import BaseModel

from service.models import Model, find_models
from service.routes.authentication import Reader
from service.routes.dependencies import ErrorDetail, TheService, documented

router = APIRouter(prefix="/v1/models", tags=["models"])


class ModelOut(BaseModel):
    """An installed model; where `error` is set, a job with it would be refused for that reason."""

    id: str
    architecture: str | None = None
    parameters: int | None = None
    dtype: str | None = None
    bytes: int | None = None
    context_length: int | None = None
    chat: bool | None = None
    masked: bool | None = None
    mask_token: str | None = None
    revision: str | None = None
    error: ErrorDetail | None = None


class ModelList(BaseModel):
    """All of them, by ID."""

    data: list[ModelOut]


@router.get("", responses=documented())
def list_models(_: Reader, service: TheService) -> ModelList:
    """Every model that is installed, usable or not."""
    return ModelList(
        data=[
            ModelOut(
                id=model_id,
                architecture=found.architecture,
                parameters=found.parameters,
                dtype=found.dtype,
                bytes=found.bytes,
                context_length=found.context_length,
                chat=found.chat,
                masked=found.masked,
                mask_token=found.mask_token,
                revision=found.revision,
            )
            if isinstance(found, Model)
            else ModelOut(id=model_id, error=ErrorDetail.model_validate(found.body()["error"]))
            for model_id, found in find_models(service.settings.models)
        ]
    )
