"""The part of a model card that says how to load what lies beside it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from service.goals import Goal
from service.jobs import PromptFormat
from service.reports import Report

# What vLLM's `--max-lora-rank` may be.
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
COMMIT = re.compile(r"[0-9a-f]{40}")


def _pinned(report: Report) -> str:
    """The base's ID as an argument, with its commit where it is one of the Hub's."""
    model = report.model
    pin = f', revision="{model.revision}"' if "/" in model.id and COMMIT.fullmatch(model.revision) else ""
    return f'"{model.id}"{pin}'


def ask(report: Report, *, masked: bool) -> str:
    """Lines that get an answer of `model` by `tokenizer`."""
    if masked:
        return """prompt = f"... {tokenizer.mask_token} ..."  # as in the examples
inputs = tokenizer(prompt, return_tensors="pt")
at = inputs["input_ids"][0] == tokenizer.mask_token_id
print(tokenizer.decode(model(**inputs).logits[0, at].argmax(-1)))"""
    if report.prompt_format is PromptFormat.CHAT:
        return """messages = [{"role": "user", "content": "..."}]  # as in the examples
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
answer = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1]:]
print(tokenizer.decode(answer))"""
    return """prompt = "..."  # as in the examples, to the letter
inputs = tokenizer(prompt, return_tensors="pt")
answer = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1]:]
print(tokenizer.decode(answer))"""


def unchanged(report: Report) -> bool:
    """Whether nothing was better than the base, which is what was written."""
    return not report.improved and report.goal is Goal.IMPROVE


def use_adapter(report: Report, rank: int, *, masked: bool) -> str:
    """The adapter's, of some rank."""
    auto = "AutoModelForMaskedLM" if masked else "AutoModelForCausalLM"
    base = _pinned(report)
    what = "is zero: nothing was removed" if unchanged(report) else "is a LoRA that subtracts what was removed, exactly"
    return f"""## Use

The adapter {what}. With PEFT:

```python
from peft import PeftModel
from transformers import {auto}, AutoTokenizer

base = {auto}.from_pretrained({base}, dtype="auto")  # or a folder that holds it
tokenizer = AutoTokenizer.from_pretrained({base})
model = PeftModel.from_pretrained(base, "adapter").eval()  # this folder
{ask(report, masked=masked)}
```

`model.merge_and_unload()` puts it into the weights.
{"" if masked else _vllm(report, rank)}"""


def _vllm(report: Report, rank: int) -> str:
    allowed = next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)
    if allowed is None:
        return f"\nvLLM takes adapters up to rank {VLLM_RANKS[-1]}, this one has {rank}: serve the merged model.\n"
    return f"""
With vLLM, which serves it beside other adapters of the same base (not tested by the job):

```sh
vllm serve {report.model.id} --enable-lora --max-lora-rank {allowed} --lora-modules adapted=./adapter
```
"""


def use_model(report: Report, words: Sequence[str], *, masked: bool) -> str:
    """A whole checkpoint's.

    Args:
        words: sentences of what it is beside its base.
    """
    said = "".join(f"\n{sentence}\n" for sentence in words)
    auto = "AutoModelForMaskedLM" if masked else "AutoModelForCausalLM"
    served = "" if masked else "\nWith vLLM (not tested by the job):\n\n```sh\nvllm serve ./model\n```\n"
    what = "unchanged" if unchanged(report) else "with the pruned weights in them"
    return f"""## Use

These are the base model's files, {what}.
{said}
With transformers:

```python
from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained("model", dtype="auto").eval()  # this folder
tokenizer = AutoTokenizer.from_pretrained("model")
{ask(report, masked=masked)}
```
{served}"""


def use_factored(report: Report, *, masked: bool) -> str:
    """The checkpoint's with two factors for a weight."""
    found = report.factored
    weights = found.weights if found else 0
    return f"""## Use

This is the checkpoint of `model`, with {weights} of its weights as two factors each, `W = B A`, because their rank is
low. transformers has no such form: `load_factored.py`, which lies here, loads it, and needs torch, transformers and
safetensors.

```python
import sys

from transformers import AutoTokenizer

sys.path.insert(0, "factored")  # this folder
from load_factored import load_factored

model = load_factored("factored")
tokenizer = AutoTokenizer.from_pretrained("factored")
{ask(report, masked=masked)}
```
"""
