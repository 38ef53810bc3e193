"""Uses an adapter as anyone may: transformers and PEFT, nothing of this project. The demo runs it as a fresh process.

Reads a JSON list of prompts from stdin; writes a JSON list of [prompt, base's completion, adapted model's completion].
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

NEW_TOKENS = 8


@torch.no_grad()
def complete(model: Any, tokenizer: Any, prompts: list[str]) -> list[str]:
    """Greedy completions, all prompts in one batch."""
    tokens = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
    output = model.generate(**tokens, max_new_tokens=NEW_TOKENS, do_sample=False)
    return list(tokenizer.batch_decode(output[:, tokens["input_ids"].shape[1] :], skip_special_tokens=True))


def main(base_folder: str, adapter_folder: str) -> None:
    """Complete every prompt with the base model, then with the adapter on it."""
    prompts = json.load(sys.stdin)
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    base = AutoModelForCausalLM.from_pretrained(base_folder, use_safetensors=True)
    before = complete(base, tokenizer, prompts)
    adapted = PeftModel.from_pretrained(base, adapter_folder)
    after = complete(adapted, tokenizer, prompts)
    json.dump(list(zip(prompts, before, after, strict=True)), sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
