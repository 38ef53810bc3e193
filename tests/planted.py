"""A task at which a model really gets better by losing one component: the one that was planted to spoil it.

Examples are labelled by a random model itself. Then a component is added to its last block that pushes every answer
towards a label that is never right. To remove it is to have the first model back, to the last digit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from service.jobs import Example, Objective
from tests import plain, tiny
from workers.evaluation import evaluate
from workers.examples import Encoded, Layout
from workers.loading import load
from workers.targets import Target, find_targets

LABELS = [" yes", " no", " good"]
SPOILER = " France"
"""Never right; a choice of every example."""
WORDS = ["red", "green", "good", "bad", "city", "country", "France", "Paris", "sentence", "capital", "is", "this"]


@dataclass(frozen=True)
class Planted:
    """A spoilt model on disk, and what it should have answered."""

    folder: Path
    module: str
    """Where the component is: the largest of this module."""
    examples: list[Example]


def prompts(count: int) -> list[str]:
    """Prompts of five words, no two alike."""
    generator = torch.Generator().manual_seed(1)
    found: dict[str, None] = {}
    while len(found) < count:
        words = torch.randint(len(WORDS), (5,), generator=generator).tolist()
        found[" ".join(WORDS[i] for i in words) + " Answer:"] = None
    return list(found)


def plant(folder: Path, out: Path, count: int = 120, strength: float = 2.0) -> Planted:
    """Spoil the model in `folder`.

    Args:
        out: where the spoilt model goes.
        strength: size of the component, over the largest of the weight it is added to.
    """
    model: Any = load(folder).model
    tokenizer: Any = plain.loaded(folder).tokenizer
    target = find_targets(model)[0][-1]
    texts = prompts(count)
    open_examples = plain.encoded(folder, [Example(prompt=text, completion=SPOILER) for text in texts])
    u = model.get_output_embeddings().weight[tokenizer(SPOILER)["input_ids"][0]].detach()
    u = u / u.norm()
    v = mean_input(model, target, open_examples)
    W = target.weight
    # With both directions cleared, what is planted is a component of its own, exactly.
    W.copy_(W - torch.outer(u, u @ W) - torch.outer(W @ v - (u @ W @ v) * u, v))
    choices = [*LABELS, SPOILER]
    unlabelled = plain.encoded(folder, [Example(prompt=t, completion=LABELS[0], choices=LABELS) for t in texts])
    answers = evaluate(model, unlabelled, Objective.CHOICE, Layout(packed=True)).predicted
    W.add_(strength * torch.linalg.matrix_norm(W, 2) * torch.outer(u, v))
    model.save_pretrained(out)
    tiny.tokenizer().save_pretrained(out)
    examples = [Example(prompt=t, completion=LABELS[k], choices=choices) for t, k in zip(texts, answers, strict=True)]
    return Planted(out, target.name, examples)


def mean_input(model: nn.Module, target: Target, examples: Sequence[Encoded]) -> Tensor:
    """(in,) the direction in which the module's inputs lie on average, where the answer is predicted."""
    seen: list[Tensor] = []
    handle = target.module.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0][0, -1].detach()))
    with torch.no_grad():
        for example in examples:
            model(input_ids=torch.tensor([example.prompt]), use_cache=False)
    handle.remove()
    v: Tensor = torch.stack(seen).mean(0)
    unit: Tensor = v / torch.linalg.vector_norm(v)
    return unit
