"""A job makes no network call: the libraries that could are told so before they are imported."""

from __future__ import annotations

import os

OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


def go_offline() -> None:
    """For this process and those that it starts."""
    os.environ.update(OFFLINE)
