"""Models in fewer bits: stock transformers loads them, they are smaller, and they are what was tested."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from service.errors import InvalidInput
from service.jobs import Quantize
from service.terminal import draw
from tests import tiny
from tests.planted import Planted
from tests.test_adaptation import Run
from workers.loading import load_model
from workers.quantizing import INT4_COLUMNS, check_quantizable, quantize
from workers.speed import weight_bytes

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # peft 0.21 asks transformers 5 for a property under its old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

TinyModels = Callable[..., Path]
PROMPT = torch.tensor([[11, 42, 97, 5, 33, 18, 64]])


# The MLP's inner weights of the last do not fit bitsandbytes' blocks, and stay in 16 bits.
SHAPES = {"gpt2": {"n_embd": 64}, "qwen3": {"hidden_size": 64, "intermediate_size": 80, "head_dim": 32}}


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=PROMPT).logits
    return found.float()


@pytest.mark.parametrize(
    ("architecture", "bits"),
    [("llama", "int8"), ("gemma2", "int8"), ("phi3", "int8"), ("bert", "int8"), ("gpt2", "int4"), ("qwen3", "int4")],
)
def test_a_quantized_checkpoint_is_smaller_near_the_model_and_loaded_by_anyone(
    architecture: str, bits: str, tmp_path: Path
) -> None:
    source = tiny.build(architecture, tmp_path / "source", shape=SHAPES.get(architecture))
    folder = tmp_path / "quantized"
    model = load_model(source)
    check_quantizable(model, Quantize(bits))
    tested = logits(quantize(source, folder, Quantize(bits)))
    auto_model: Any = AutoModelForMaskedLM if architecture in tiny.MASKED else AutoModelForCausalLM
    assert torch.equal(logits(auto_model.from_pretrained(folder, dtype="auto").eval()), tested)
    off = (tested - logits(model)).square().mean() / logits(model).square().mean()
    assert 0 < off < {"int8": 0.02, "int4": 0.2}[bits]
    assert weight_bytes(folder) < 0.75 * weight_bytes(source)
    written = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= written
    assert not {path.suffix for path in folder.iterdir()} - {".json", ".jinja", ".safetensors"}


@pytest.mark.parametrize(("architecture", "told"), [("gpt2", "int4 takes it"), ("mixtral", "leave it out")])
def test_what_cannot_be_quantized_is_refused_before_any_work(
    architecture: str, told: str, tiny_models: TinyModels, tmp_path: Path
) -> None:
    folder = tiny_models(architecture)
    with pytest.raises(InvalidInput, match=told) as refused:
        Run(folder, tmp_path / "out", tmp_path / "cache", examples=tiny.learnable_examples(), quantize="int8")
    assert refused.value.param == "quantize"
    assert not list((tmp_path / "out").iterdir())


def test_the_quantized_model_is_tested_again_and_everyone_is_told(tmp_path: Path) -> None:
    shape = {"hidden_size": 192, "intermediate_size": 384, "num_hidden_layers": 1}
    base = tiny.build("llama", tmp_path / "llama", shape=shape)
    run = Run(base, tmp_path / "out", tmp_path / "cache", examples=tiny.learnable_examples(), quantize="int8")
    report, found = run.report, run.report.quantized
    assert found is not None
    assert report.not_quantized is None
    assert found.bytes == weight_bytes(run.out / "quantized")
    assert found.fraction == found.bytes / weight_bytes(base) < 0.5
    assert found.verification == 0
    fall = found.differences[0]
    assert fall.metric == "accuracy"
    assert report.adapted.accuracy is not None
    assert found.accuracy == pytest.approx(report.adapted.accuracy + fall.value)
    percent = f"In int8 it has {100 * found.fraction:.0f} % of the base's bytes: accuracy over the choices"
    assert percent in report.verdict
    assert report.speed is not None
    assert report.speed.base.bytes == report.speed.model.bytes == weight_bytes(base) > 1e6
    assert report.speed.quantized is not None
    assert report.speed.quantized.bytes == found.bytes
    console = Console(width=80, record=True)
    draw(report, console)
    card = (run.out / "quantized" / "README.md").read_text()
    for text in (console.export_text(), card, (run.out / "model" / "README.md").read_text()):
        assert "adapted, int8" in text
        assert f"{found.bytes / 1e6:.1f} MB" in text
    assert "base_model_relation: quantized" in card
    assert "pip install torchao" in card


@pytest.mark.parametrize(("bits", "target"), [("int8", 0.2), ("int4", 0.12)])
def test_a_target_of_bytes_is_that_of_the_quantized_model(bits: str, target: float, tmp_path: Path) -> None:
    shape = {"hidden_size": 192, "intermediate_size": 384, "num_hidden_layers": 4}
    base = tiny.build("llama", tmp_path / "llama", shape=shape)
    fields: dict[str, Any] = {"goal": "compress", "strategy": "layers", "target": {"bytes": target}, "quantize": bits}
    run = Run(base, tmp_path / "out", tmp_path / "cache", examples=tiny.learnable_examples(), **fields)
    found, shipped = run.report.quantized, run.report.shipped
    assert found is not None
    # The header of so small a file is a few per cent of it.
    assert found.fraction <= target * 1.03
    assert f" % of the base's bytes, in {bits};" in run.report.verdict
    # Not more went than that asks for: with a layer more it would not fit.
    assert shipped is not None
    assert shipped.layers is not None
    a_layer = (found.bytes / weight_bytes(base)) / len(shipped.layers)
    assert found.fraction + a_layer > target


SMALL = {"hidden_size": 64, "intermediate_size": 384, "num_hidden_layers": 2}
"""Under the size at which speeds are measured."""


def test_neurons_go_in_numbers_that_four_bits_can_hold(tmp_path: Path) -> None:
    base = tiny.build("llama", tmp_path / "llama", shape=SMALL)
    fields: dict[str, Any] = {"goal": "compress", "strategy": "neurons", "target": {"bytes": 0.15}, "quantize": "int4"}
    run = Run(base, tmp_path / "out", tmp_path / "cache", examples=tiny.learnable_examples(), **fields)
    found = run.report.quantized
    assert found is not None
    assert run.report.verdict.startswith(f"{100 * found.fraction:.1f} % of the base's bytes, in int4; ")
    left = json.loads((run.out / "model" / "config.json").read_text())["intermediate_size"]
    assert left < 384
    assert left % INT4_COLUMNS == 0


def test_what_was_tested_on_its_own_examples_is_said_to_be(tmp_path: Path) -> None:
    base = tiny.build("llama", tmp_path / "llama", shape=SMALL)
    run = Run(base, tmp_path / "out", tmp_path / "cache", examples=tiny.learnable_examples(24), quantize="int8")
    assert run.report.splits.cross_validated
    assert "on the examples that it was made from." in run.report.verdict
    assert "On the examples that the model was made from" in (run.out / "quantized" / "README.md").read_text()


def test_a_job_is_not_lost_for_what_fails_at_its_end(planted: Planted, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "quantized").touch()  # where the folder is to be
    rows = [example.model_dump() for example in planted.examples]
    run = Run(planted.folder, tmp_path / "out", tmp_path / "cache", examples=rows, quantize="int8")
    assert run.report.improved
    assert run.report.quantized is None
    assert run.report.not_quantized == "the library that does it failed (FileExistsError)"
    assert "It is not quantized" in run.report.verdict
    assert run.report.speed is None  # nothing is smaller
    assert any("not quantized" in message for *_, message in run.told)
