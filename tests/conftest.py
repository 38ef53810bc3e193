"""Fixtures: tiny models on disk, a real Redis, a live service."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests import tiny


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_models("llama", "float64")` is the folder of a tiny random model, built once a session."""
    built: dict[tuple[str, str, int], Path] = {}

    def model(architecture: str, dtype: str = "float32", seed: int = 0) -> Path:
        key = (architecture, dtype, seed)
        if key not in built:
            folder = tmp_path_factory.mktemp("models") / "-".join(map(str, key))
            built[key] = tiny.build(architecture, folder, dtype, seed)
        return built[key]

    return model
