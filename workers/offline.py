"""What is told to the libraries before they are imported: a job makes no network call, and its user has no use for
what they say of parts that this machine lacks.
"""

from __future__ import annotations

import logging
import os

OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
# They warn at their import of kernels for other machines, and of each other.
TALKATIVE = ("torchao", "torch.utils._pytree", "bitsandbytes")


def go_offline() -> None:
    """For this process and those that it starts."""
    os.environ.update(OFFLINE)
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
