"""What a checkpoint takes and how fast it is, on this machine, as anyone would load it.

Each folder has a fresh process, so that its peak memory is its own. They take turns: one loads its model, measures and
lets it go, then the next, and so on for a few rounds. A change of the machine's speed then hits all of them, and only
one model more than this process has is ever in memory.

Of all measurements the best is kept. Whatever else the machine does only makes one slower, so the best is nearest to
what the model itself needs.
"""

from __future__ import annotations

import inspect
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from service.errors import InternalError
from service.model_configs import context_length, is_masked
from service.model_files import read_json
from service.processes import die_with_parent
from service.reports import Speed
from service.strict import Strict
from service.weights import weight_files
from workers.energy import Meter

PROMPT_TOKENS = 256
DECODED_TOKENS = 8
ROUNDS = 2
# A turn repeats prompt and decoding for so long, and so often at least: the first is never the fastest.
RUNS_SECONDS = 1.0
FEWEST_RUNS = 2


class Run(Strict):
    """One prompt and what was decoded after it."""

    prefill_seconds: float
    """Of the whole prompt."""
    decode_seconds: float | None = None
    """Of the quickest token; null for a masked language model, which decodes nothing."""
    joules: float | None = None
    """Of one decoded token; null where the machine does not tell."""


class Round(Strict):
    """What one process measured in one of its turns."""

    runs: list[Run]
    tokens: int
    """The prompt's."""
    peak_memory_bytes: int


def measure(folders: Sequence[Path]) -> list[Speed]:
    """Speed and memory of checkpoints, each in a process of its own, with as many threads as this one has.

    Args:
        folders: checkpoints that stock transformers loads, of one context length.

    Raises:
        InternalError: one of them cannot be loaded or run.
    """
    rounds: list[list[Round]] = [[] for _ in folders]
    with ExitStack() as stack:
        probes = [stack.enter_context(Probe(folder)) for folder in folders]
        for _ in range(ROUNDS):
            for probe, own in zip(probes, rounds, strict=True):
                own.append(probe.run())
    return [_best(folder, own) for folder, own in zip(folders, rounds, strict=True)]


def _best(folder: Path, rounds: Sequence[Round]) -> Speed:
    runs = [run for one in rounds for run in one.runs]
    decoding = [run.decode_seconds for run in runs if run.decode_seconds is not None]
    joules = [run.joules for run in runs if run.joules is not None]
    return Speed(
        bytes=weight_bytes(folder),
        peak_memory_bytes=max(one.peak_memory_bytes for one in rounds),
        prefill_tokens_per_second=rounds[0].tokens / min(run.prefill_seconds for run in runs),
        decode_tokens_per_second=1 / min(decoding) if decoding else None,
        joules_per_token=min(joules) if joules else None,
    )


def weight_bytes(folder: Path) -> int:
    """Bytes of a checkpoint's weights' files."""
    return sum(path.stat().st_size for path in weight_files(folder))


class Probe:
    """The process of one folder. It ends with the context, and with this process, however that dies."""

    def __init__(self, folder: Path) -> None:
        import torch  # noqa: PLC0415 - imported by whoever has a model to measure

        self._process = subprocess.Popen(  # noqa: S603 - this module
            [sys.executable, "-m", "workers.speed", str(folder.absolute()), str(torch.get_num_threads())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # what packages print
            preexec_fn=partial(die_with_parent, os.getpid()),  # noqa: PLW1509 - calls prctl and getppid only
        )

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def run(self) -> Round:
        """One round.

        Raises:
            InternalError: the checkpoint cannot be loaded or run.
        """
        if self._process.stdin is None or self._process.stdout is None:
            raise InternalError("a checkpoint's speed cannot be measured: its process has no pipes")
        try:
            self._process.stdin.write(b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            answer = b""
        else:
            answer = self._process.stdout.readline()
        if not answer:
            raise InternalError(f"a checkpoint's speed cannot be measured: its process ended ({self._process.wait()})")
        found = json.loads(answer)
        if "error" in found:
            raise InternalError(f"a checkpoint's speed cannot be measured: {found['error']}")
        return Round.model_validate(found)


# --- in the process of a probe ---------------------------------------------------------------------------------


def _serve(folder: Path, threads: int) -> None:
    """Measure one round for each line that comes in, and answer each with a line."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # a package that prints spoils nothing
    for _ in sys.stdin:
        try:
            answer = _round(folder, threads).model_dump_json()
        except Exception as error:
            answer = json.dumps({"error": type(error).__name__})
        print(answer, file=answers, flush=True)


def _round(folder: Path, threads: int) -> Round:
    import torch  # noqa: PLC0415 - as late as may be: the parent imports this module

    torch.set_num_threads(threads)
    config = read_json(folder / "config.json")
    gpu, masked = torch.cuda.is_available(), is_masked(config)
    model = _load(folder, masked=masked).to("cuda" if gpu else "cpu").eval()
    context = context_length(config) or PROMPT_TOKENS + DECODED_TOKENS
    length = max(1, min(PROMPT_TOKENS, context - DECODED_TOKENS))
    # Always the same; of tokens that differ, since a mixture's experts are chosen by them.
    draw = random.Random(0)  # noqa: S311 - no secret
    rows = model.get_input_embeddings().weight.shape[0]
    prompt = torch.tensor([[draw.randrange(rows) for _ in range(length)]], device=model.device)
    meter, runs = Meter(gpu=gpu), list[Run]()
    began = time.perf_counter()
    with torch.inference_mode():
        while len(runs) < FEWEST_RUNS or time.perf_counter() - began < RUNS_SECONDS:
            runs.append(_run(model, prompt, meter, masked=masked))
    peak = torch.cuda.max_memory_allocated() if gpu else _peak_memory()
    return Round(runs=runs, tokens=length, peak_memory_bytes=peak)


def _peak_memory() -> int:
    """The most that this process had in memory. `getrusage` would tell that of the process that it was forked from."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1]) * 1024


def _load(folder: Path, *, masked: bool) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM  # noqa: PLC0415

    auto_model: Any = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    return auto_model.from_pretrained(
        folder, dtype="auto", use_safetensors=True, trust_remote_code=False, local_files_only=True
    )


def _run(model: Any, prompt: Any, meter: Meter, *, masked: bool) -> Run:
    """The prompt (1, tokens) once, then greedy decoding with a cache: as `generate` does it, and never to an end."""
    if masked:
        began = _now()
        model(input_ids=prompt)
        return Run(prefill_seconds=_now() - began)
    only_last = "logits_to_keep" in inspect.signature(model.forward).parameters
    began = _now()
    out = model(input_ids=prompt, use_cache=True, **({"logits_to_keep": 1} if only_last else {}))
    times, energy = [_now()], meter.read()
    for _ in range(DECODED_TOKENS):
        token = out.logits[:, -1:].argmax(-1)  # (1, 1)
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        times.append(_now())
    joules = meter.since(energy)
    return Run(
        prefill_seconds=times[0] - began,
        decode_seconds=min(after - before for before, after in pairwise(times)),
        joules=None if joules is None else joules / DECODED_TOKENS,
    )


def _now() -> float:
    """Seconds, when all that was begun is done: a GPU's work goes on behind the program's."""
    import torch  # noqa: PLC0415

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), int(sys.argv[2]))
