"""Fixtures: tiny models on disk, a real Redis, a live API, real workers. Nothing outlives its test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from service.embedded import EmbeddedRedis
from service.settings import Settings
from tests import live, tiny

if TYPE_CHECKING:
    from tests.adapted import Adapted
    from tests.planted import Planted
from workers.catalogue import SMOLLM2, add_model


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


@pytest.fixture
def folder(tiny_models: Callable[..., Path], tmp_path: Path) -> Path:
    """A data folder with `tiny-llama` installed."""
    live.install(tiny_models("llama"), tmp_path)
    return tmp_path


@pytest.fixture
def server(folder: Path) -> Iterator[EmbeddedRedis]:
    """A Redis of the test's own."""
    started = live.redis(folder)
    yield started
    started.stop()


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of a real model, in the project's own data folder: downloaded once, then there."""
    return add_model(SMOLLM2, Settings.load().data)


@pytest.fixture(scope="session")
def planted(tiny_models: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Planted:
    """A model that a task is known to improve, and by what (`tests.planted`)."""
    from tests.planted import plant

    with single_thread():
        return plant(tiny_models("qwen2"), tmp_path_factory.mktemp("planted") / "qwen2")


@pytest.fixture(scope="session")
def adapted(
    planted: Planted, tiny_models: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Adapted]:
    """`adapted("choices")` is the folder of an adaptation's artifacts, made once a session (`tests.adapted`)."""
    from tests.adapted import Adapted

    with single_thread():
        yield Adapted(planted, tiny_models, tmp_path_factory.mktemp("adapted"))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Torch on one thread."""
    with single_thread():
        yield


@contextmanager
def single_thread() -> Iterator[None]:
    """On tiny models a second thread costs more than it does, the more the busier the machine is."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def data(tmp_path: Path, tiny_models: Callable[..., Path]) -> Path:
    """A data folder with the model `tiny-llama`."""
    live.install(tiny_models("llama"), tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def redis(data: Path) -> Iterator[EmbeddedRedis]:
    """A Redis of the test's own, on its own socket."""
    server = live.redis(data)
    yield server
    server.stop()


@pytest.fixture
def api(data: Path, redis: EmbeddedRedis) -> Iterator[live.Api]:
    """The API over HTTP."""
    running = live.Api(data, redis.url)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def shared_api(tmp_path_factory: pytest.TempPathFactory, tiny_models: Callable[..., Path]) -> Iterator[live.Api]:
    """One API and Redis for a module whose tests do not mind each other's jobs."""
    data = tmp_path_factory.mktemp("shared")
    live.install(tiny_models("llama"), data)
    server = live.redis(data)
    running = live.Api(data, server.url)
    yield running
    running.stop()
    server.stop()


@pytest.fixture
def worker(data: Path, redis: EmbeddedRedis) -> Iterator[live.WorkerProcess]:
    """A worker process whose adaptation does what a job's metadata says (`tests.stand_in`)."""
    process = live.WorkerProcess(data, redis.url)
    yield process
    process.end()
