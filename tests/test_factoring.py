"""Weights of low rank as two factors: the same predictions, fewer bytes, loaded by a file that stands alone."""

from __future__ import annotations

import ast
import importlib.util
import io
import json
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from service.reports import Factored, Report, Shipped, Zeros
from service.terminal import draw
from service.weights import read_weights
from tests import tiny
from tests.adapted import Adapted
from workers.card_usage import use_factored, use_model
from workers.checkpoints import checked_tokens, write_model
from workers.factored import FactoredLinear, load_factored
from workers.factoring import add_factored, low_rank
from workers.loading import Checkpoint, load
from workers.pruning import applied
from workers.ranking import Plan
from workers.spectrum import Spectrum, decompose
from workers.structures import Kind, find_units
from workers.targets import Target, find_targets

pytestmark = pytest.mark.usefixtures("one_thread")


class Base:
    """A tiny model and its components; of the first weight those of four row blocks."""

    def __init__(self, architecture: str, folder: Path, dtype: str = "float32") -> None:
        self.checkpoint: Checkpoint = load(tiny.build(architecture, folder, dtype))
        whole, _ = find_targets(self.checkpoint.model)
        self.targets: list[Target] = [*whole[0].split(4), *whole[1:]]
        self.spectra: dict[str, Spectrum] = {t.name: decompose(t.weight) for t in self.targets}

    def truncated(self, keep: int, count: int) -> Plan:
        """All but the largest components of the first so many targets gone."""
        return Plan({t.name: tuple(range(keep, min(t.shape))) for t in self.targets[:count]})


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [("llama", "float32"), ("llama", "bfloat16"), ("gpt2", "float32"), ("phi3", "float32"), ("bert", "float32")],
)
def test_factors_predict_what_the_adapted_model_does_in_fewer_bytes(
    architecture: str, dtype: str, tmp_path: Path
) -> None:
    base = Base(architecture, tmp_path / "base", dtype)
    plan = base.truncated(2, 8)
    shipped = write_model(tmp_path / "model", base.checkpoint, base.targets, base.spectra, plan)
    found = add_factored(tmp_path, base.checkpoint, base.targets, base.spectra, plan)
    assert found is not None
    # Four blocks of the first weight keep two each: eight ranks are fewer numbers than 32 x 32, and of 96 x 32 too.
    assert found.weights == 5
    assert found.bytes < shipped.bytes
    model = load_factored(tmp_path / "factored")
    tokens = checked_tokens(base.checkpoint)
    with applied(base.targets, base.spectra, plan), torch.no_grad():
        expected = base.checkpoint.model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
        factors = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    torch.testing.assert_close(factors.float(), expected.float(), rtol=0, atol=1e-4 if dtype == "float32" else 0.5)
    assert sum(p.numel() for p in model.parameters()) == found.parameters
    assert sum(isinstance(module, FactoredLinear) for module in model.modules()) == 5
    stored = read_weights(tmp_path / "factored").tensors
    first = base.targets[0].module_name
    (key,) = [key for key in stored if f"{first}.A".endswith(key)]
    assert stored[key].shape == (8, base.targets[0].shape[1])
    assert f"{key.removesuffix('A')}weight" not in stored
    if architecture == "llama":  # it is a model like others: it generates, and is saved and loaded again
        model.generate(tokens[:1, :5], max_new_tokens=3, do_sample=False)
        model.save_pretrained(tmp_path / "again")
        again = load_file(tmp_path / "again" / "model.safetensors")
        assert torch.equal(again[key], load_file(tmp_path / "factored" / "model.safetensors")[key])


def test_who_has_nothing_of_this_project_loads_it_by_the_file_beside_it(tmp_path: Path) -> None:
    base = Base("llama", tmp_path / "base")
    plan = base.truncated(1, 6)
    write_model(tmp_path / "model", base.checkpoint, base.targets, base.spectra, plan)
    add_factored(tmp_path, base.checkpoint, base.targets, base.spectra, plan)
    loader = tmp_path / "factored" / "load_factored.py"
    imported = {
        name.partition(".")[0]
        for node in ast.walk(ast.parse(loader.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names])
    }
    assert imported - sys.stdlib_module_names == {"torch", "transformers"}
    spec = importlib.util.spec_from_file_location("load_factored", loader)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.load_factored(tmp_path / "factored").config.quantization_config.quant_method == "factored"


def test_what_would_not_be_smaller_is_not_written(tmp_path: Path) -> None:
    base = Base("llama", tmp_path / "base")
    units, _ = find_units(base.checkpoint.model, find_targets(base.checkpoint.model)[0], {Kind.MLP, Kind.NEURONS})
    plan = base.truncated(2, 5)
    of_32 = next(t for t in base.targets if t.shape == (32, 32))
    assert set(low_rank(base.targets, base.spectra, plan)) == {t.module_name for t in base.targets[:5]}
    # 16 ranks of 32 x 32 are as many numbers as the weight.
    half = Plan({of_32.name: tuple(range(16, 32))})
    assert low_rank([of_32], base.spectra, half) == {}
    assert set(low_rank([of_32], base.spectra, Plan({of_32.name: tuple(range(15, 32))}))) == {of_32.name}
    # What is zero in columns besides has factors of its own.
    down = next(t for t in base.targets if t.name.endswith("layers.0.mlp.down_proj"))
    cut = Plan({down.name: tuple(range(2, 32))}, {"model.layers.0.mlp:neurons": (0,)})
    assert low_rank([down], base.spectra, cut, units) == {}
    write_model(tmp_path / "model", base.checkpoint, base.targets, base.spectra, half)
    assert add_factored(tmp_path, base.checkpoint, [of_32], base.spectra, half) is None
    assert not (tmp_path / "factored").exists()
    assert "quantization_config" not in json.loads((tmp_path / "model" / "config.json").read_text())


def test_report_card_and_terminal_say_what_is_smaller(adapted: Adapted) -> None:
    """In words of one report; the page draws the same."""
    found = Report.model_validate_json((adapted("choices") / "report.json").read_text())
    report = found.model_copy(
        update={
            "shipped": Shipped(
                parameters=found.model.parameters // 2,
                bytes=400,
                layers=[1],
                gone=["layer 0", "2 of 4 query heads of every attention"],
                zeros=[Zeros(what="the mlp of layer 1", why="every layer of this architecture has one")],
            ),
            "factored": Factored(weights=3, parameters=50, bytes=100),
        }
    )
    words = report.shipped_words()
    half = f"{report.model.parameters // 2:,}"
    assert words == [
        f"model/ has {half} parameters, 50.0 % of the base's: without layer 0; 2 of 4 query heads of every attention.",
        "Standing as zeros: the mlp of layer 1 (every layer of this architecture has one).",
        "factored/ has 3 weights as two factors each: 50 parameters, 25.0 % of model/'s bytes.",
    ]
    assert all(word in use_model(report, words[:2], masked=False) for word in words[:2])
    assert "3 of its weights" in use_factored(report, masked=False)
    terminal = io.StringIO()
    draw(report, Console(file=terminal, width=80))
    assert all(word in terminal.getvalue() for word in words)
    assert found.shipped is not None
    assert found.shipped.gone == []
    assert found.factored is None  # four weights of low rank, half a hundredth of it
    assert found.shipped_words() == []
