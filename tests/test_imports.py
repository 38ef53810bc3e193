"""What importing costs is a contract: the API and the command line never load torch, nor the service the workers."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.live import REPOSITORY

HEAVY = ("torch", "transformers", "peft", "accelerate", "safetensors", "numpy", "scipy")


def loaded_after(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after the statement."""
    script = f"import sys\n{statement}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
    return set(result.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("module", ["service.main", "service.server", "service.cli", "service.client"])
def test_the_service_loads_neither_torch_nor_the_workers(module: str) -> None:
    assert not loaded_after(f"import {module}") & {*HEAVY, "workers"}


def test_the_workers_commands_load_torch_only_when_they_run() -> None:
    assert not loaded_after("import workers.cli") & set(HEAVY)


@pytest.mark.parametrize("arguments", [["--help"], ["submit", "--help"], ["models", "--help"], ["worker", "--help"]])
def test_help_does_not_wait_for_torch(arguments: list[str]) -> None:
    script = f"sys.argv = ['c2i', *{arguments!r}]\nimport service.cli\ntry: service.cli.main()\nexcept SystemExit: pass"
    assert not loaded_after(script) & set(HEAVY)


def test_the_directions_of_imports_hold() -> None:
    result = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stdout
