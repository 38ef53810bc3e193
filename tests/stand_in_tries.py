"""A process that answers tries, really, or does what the prompt says: block, die, fail.

`python -m tests.stand_in_tries DATA`, with REDIS_URL set.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from pathlib import Path

from service import logs
from service.settings import Settings
from tests.stand_in import tell
from workers import answering
from workers.offline import go_offline
from workers.worker import take


class Answers(answering.Answers):
    """Looks at the prompt first."""

    def run(self, try_id: str, attempt: int) -> None:
        prompt = self.queue.question(try_id).prompt
        if prompt.startswith("block"):
            self.queue.answer_base(try_id, attempt, " of the base")
            threading.Event().wait()
        if prompt.startswith("die") or (prompt.startswith("once") and attempt == 1):
            os.kill(os.getpid(), signal.SIGKILL)
        if prompt.startswith("secret"):
            with contextlib.suppress(KeyError):
                tell(prompt)
        super().run(try_id, attempt)


if __name__ == "__main__":
    go_offline()
    settings = Settings(data=Path(sys.argv[1]))
    logs.configure(settings.log_level)
    take(lambda: Answers(settings, os.environ["REDIS_URL"]), settings)
