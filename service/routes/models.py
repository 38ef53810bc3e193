"""The installed models."""

from __future__ import annotations

from fastapi import APIRouter

from service.answers import ErrorDetail, ModelList, ModelOut
from service.models import Model, find_models
from service.routes.authentication import Reader
from service.routes.dependencies import TheService, documented

router = APIRouter(prefix="/v1/models", tags=["models"])


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
