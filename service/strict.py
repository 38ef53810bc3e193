"""What every model of the contract is: closed, frozen, finite."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """Refuses fields that it does not know and numbers that are none; does not change."""

    # What stands below a field is its description in the OpenAPI document.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)
