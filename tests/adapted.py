"""Adaptations of tiny models that end in every way a report can look: for tests of what people see of one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from service import models
from service.jobs import JobSpec
from tests.planted import Planted
from workers.adaptation import adapt

# A few words on each: what a name in `Adapted` stands for.
KINDS = {
    "choices": "improved, answers are choices, two passes",
    "open": "improved, answers are open; prompts are chats",
    "nothing": "no removal helps: the base is returned",
    "masked": "a masked language model",
    "labels": "forty labels, of few examples each",
    "few": "so few examples that they are cross-validated",
}


class Adapted:
    """Artifacts by the kind of their job, each made when it is first asked for."""

    def __init__(self, planted: Planted, tiny_models: Callable[..., Path], root: Path) -> None:
        self._planted = planted
        self._tiny_models = tiny_models
        self._root = root

    def base(self, kind: str) -> Path:
        """The folder of the base model."""
        return {"masked": self._tiny_models("roberta"), "labels": self._tiny_models("gpt2")}.get(
            kind, self._planted.folder
        )

    def examples(self, kind: str) -> dict[str, Any]:
        """The fields of the kind's job."""
        rows = [example.model_dump() for example in self._planted.examples]
        if kind == "open":
            opened = [row | {"choices": None} for row in rows]
            return {"examples": opened, "prompt_format": "chat"}
        if kind == "nothing":
            wrong = [row | {"completion": " France"} for row in rows[60:90]]
            return {"examples": rows[:60], "validation": wrong, "test": rows[90:]}
        if kind == "masked":
            labels = [" yes", " no", " yes no"]
            masked = [f"Item {i}: answer <mask>." for i in range(90)]
            return {
                "examples": [
                    {"prompt": text, "completion": labels[i % 3], "choices": labels} for i, text in enumerate(masked)
                ],
                "passes": 2,
            }
        if kind == "labels":
            labels = [f" {word} {number}" for word in ("red", "green", "yes", "city") for number in range(10)]
            return {
                "examples": [
                    {"prompt": f"Item {i}: answer", "completion": labels[i % 40], "choices": labels} for i in range(240)
                ]
            }
        return {"examples": rows[:16] if kind == "few" else rows, "passes": 2}

    def __call__(self, kind: str) -> Path:
        """The folder of the artifacts."""
        out = self._root / kind
        if not out.exists():
            base = self.base(kind)
            model = models.resolve(base.parent, base.name)
            spec = JobSpec.parse({"model": base.name, **self.examples(kind)})
            out.mkdir()
            adapt(spec, model, out, cache=self._root / "cache", on_progress=lambda *_: None)
        return out
