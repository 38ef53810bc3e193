"""What of the pages is not run, and why.

A new command or block runs, or stands here; tests/test_docs.py fails too where one that stands here is gone.
"""

from __future__ import annotations

from typing import Final

from tests.docs.snippets import Block
from tests.live import REPOSITORY

# The page, and how the command or the block begins.
NOT_RUN: Final[dict[tuple[str, str], str]] = {
    ("README.md", "make demo"): "tests/test_demo.py runs it on a tiny model",
    ("README.md", "make test"): "the test suite itself",
    ("README.md", "make chaos"): "half an hour; tests/test_chaos.py runs a part",
    ("README.md", "make fuzz"): "minutes; tests/test_fuzz.py runs a part",
    ("README.md", "make load"): "minutes and needs wrk; tests/test_load.py runs a part",
    ("README.md", "make screenshots"): "minutes; tests/test_page.py tests the page that it pictures",
    ("README.md", ". .venv/bin/activate"): "what make installs; the sandbox has its commands",
    ("README.md", "c2i serve"): "serves until it is stopped: the sandbox has one",
    ("README.md", "c2i bench"): "hours; tests/test_benchmark.py runs a small one",
    ("README.md", "service/ "): "the tree; no code",
    ("docs/api.md", "curl -sO http://127.0.0.1:8000/v1/jobs/JOB/quantized.zip"): "only of a job that asked for it",
    ("docs/method.md", "python -m tests.docs.figure"): "downloads a model, and takes minutes",
    ("docs/smaller.md", "curl -sO 'http://127.0.0.1:8000/v1/jobs/JOB/model.zip?point=1'"): "needs a job of that "
    "goal; tests/test_compress.py downloads points",
    ("docs/smaller.md", "c2i download JOB --out point --point 1"): "likewise",
    ("docs/smaller.md", "c2i download JOB --out all --model"): "likewise",
    ("docs/smaller.md", "c2i adapt landmark_continent.jsonl"): "minutes; tests/test_compress.py runs smaller ones",
    ("docs/operating.md", "REDIS_URL=redis://redis.internal"): "runs until it is stopped",
    ("docs/extending.md", "python -m pytest"): "the architecture is no part of the tests",
    ("docs/metrics.md", "max(rate("): "PromQL; tests/test_seeing.py runs what docker/ has of it",
    ("docs/service.md", "python -m tests.chaos"): "half an hour; tests/test_chaos.py runs a part",
    ("docs/service.md", "python -m tests.fuzz"): "minutes; tests/test_fuzz.py runs a part",
    ("docs/service.md", "python -m tests.load"): "minutes and needs wrk; tests/test_load.py runs a part",
    ("docs/webhooks.md", '{"model"'): "cut short; tests/test_webhooks.py sends such a body",
    ("docs/webhooks.md", "c2i webhooks secret"): "needs the ID of a key; tests/test_webhooks.py runs it",
    ("docs/webhooks.md", '"webhook":'): "a part of an answer",
}


def not_run(block: Block, begins: str) -> tuple[str, str] | None:
    """The line of `NOT_RUN` that is meant."""
    page = block.page.relative_to(REPOSITORY).as_posix()
    return next((key for key in NOT_RUN if key[0] == page and begins.startswith(key[1])), None)
