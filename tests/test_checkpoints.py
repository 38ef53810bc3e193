"""What is written is read back by stock transformers and stock PEFT, and is the model that was measured."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM

from service.errors import InternalError, UnusableModel
from service.weights import weight_files
from tests import tiny
from tests.plain import ARCHITECTURES, MIXTURES, encoded
from workers.checkpoints import reload_check, write_adapter, write_model
from workers.evaluation import answer_logits
from workers.examples import Batch, Layout, batches
from workers.loading import Checkpoint, load
from workers.pruning import applied
from workers.ranking import Plan
from workers.spectrum import Spectrum, decompose
from workers.targets import Target, find_targets
from workers.truncation import tail

# peft 0.21 asks transformers 5 for a property under its old name.
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

TinyModels = Callable[..., Path]
PROMPT = torch.tensor([[11, 42, 97, 5, 203, 18, 64]])


class Written:
    """A base model, a plan, and both artifacts of it on disk."""

    def __init__(
        self, base: Path, out: Path, plan: Callable[[Sequence[Target]], Plan], *, row_blocks: bool = False
    ) -> None:
        self.base = load(base)
        self.targets, _ = find_targets(self.base.model)
        if row_blocks:  # some modules whole, some in neighbouring rows, some in clusters
            cut = (lambda t: [t], lambda t: t.split(4), lambda t: t.cluster(3, seed=0))
            self.targets = [block for k, t in enumerate(self.targets) for block in cut[k % 3](t)]
        self.spectra: dict[str, Spectrum] = {t.name: decompose(t.weight) for t in self.targets}
        self.plan = plan(self.targets)
        self.out = out
        write_adapter(out / "adapter", "tiny", self.targets, self.spectra, self.plan)
        write_model(out / "model", self.base, self.targets, self.spectra, self.plan)

    def in_memory(self) -> Tensor:
        with applied(self.targets, self.spectra, self.plan):
            return logits(self.base.model)

    def batch(self) -> tuple[Batch, Tensor]:
        """What `reload_check` is given."""
        batch = next(batches(encoded(self.base.folder), Layout(packed=False)))
        with applied(self.targets, self.spectra, self.plan), torch.no_grad():
            return batch, answer_logits(self.base.model, batch)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=PROMPT, use_cache=False).logits
    return found.float()


def stock(folder: Path) -> Any:
    """As anyone would load it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def with_adapter(base: Path, adapter: Path) -> Any:
    return peft.PeftModel.from_pretrained(stock(base), adapter).eval()


def some(targets: Sequence[Target]) -> Plan:
    """Different numbers of components of every second module."""
    return Plan({t.name: tuple(range(0, 1 + k % 3 * 2, 2)) for k, t in enumerate(targets) if k % 2 == 0})


def largest(targets: Sequence[Target]) -> Plan:
    """One component of two in three targets."""
    return Plan({t.name: (0,) for k, t in enumerate(targets) if k % 3})


def truncations(targets: Sequence[Target]) -> Plan:
    """A quarter of the rank is left of two in three targets: of a module in blocks more goes than it has ranks."""
    return Plan({t.name: tail(min(t.shape), 0.25) for k, t in enumerate(targets) if k % 3})


def nothing(targets: Sequence[Target]) -> Plan:
    return Plan()


def tensors(folder: Path) -> dict[str, tuple[str, Tensor]]:
    """Every tensor of a checkpoint with its file, in the file's order."""
    found: dict[str, tuple[str, Tensor]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as opened:
            found |= {key: (path.name, opened.get_tensor(key)) for key in opened.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES + MIXTURES)
def test_adapter_merged_model_and_memory_are_one_model(
    architecture: str, tiny_models: TinyModels, tmp_path: Path
) -> None:
    base = tiny_models(architecture)
    written = Written(base, tmp_path, some)
    expected = written.in_memory()
    assert (expected - logits(stock(base))).abs().max() > 0.1  # the plan does something
    assert (logits(with_adapter(base, tmp_path / "adapter")) - expected).abs().max() < 1e-3
    assert (logits(stock(tmp_path / "model")) - expected).abs().max() < 1e-3
    merged = with_adapter(base, tmp_path / "adapter").merge_and_unload()
    assert (logits(merged) - expected).abs().max() < 1e-3
    assert max(reload_check(tmp_path, written.base, *written.batch())) < 1e-3


@pytest.mark.parametrize("plan", [largest, truncations])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2", "phi3"])
def test_row_blocks_are_one_lora_a_module_and_one_tensor_of_the_merged_model(
    architecture: str, plan: Callable[[Sequence[Target]], Plan], tiny_models: TinyModels, tmp_path: Path
) -> None:
    base = tiny_models(architecture)
    written = Written(base, tmp_path, plan, row_blocks=True)
    touched = [t for t in written.targets if t.name in written.plan.components]
    assert len(touched) > len({t.module_name for t in touched})
    expected = written.in_memory()
    assert (expected - logits(stock(base))).abs().max() > 0.1
    assert max(reload_check(tmp_path, written.base, *written.batch())) < 1e-3
    assert (logits(with_adapter(base, tmp_path / "adapter")) - expected).abs().max() < 1e-3
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(factors) == 2 * len({t.module_name for t in touched})
    for name, factor in factors.items():
        whole = next(t.whole_weight for t in touched if f".{t.module_name}." in name)
        assert min(factor.shape) <= min(whole.shape)
    before, after = tensors(base), tensors(tmp_path / "model")
    changed = {name for name in before if not torch.equal(before[name][1], after[name][1])}
    assert len(changed) == len({t.module_name for t in touched})


@pytest.mark.parametrize("architecture", ARCHITECTURES + MIXTURES)
def test_only_the_planned_weights_differ_from_the_bases_files(
    architecture: str, tiny_models: TinyModels, tmp_path: Path
) -> None:
    base = tiny_models(architecture)
    written = Written(base, tmp_path, some)
    before, after = tensors(base), tensors(tmp_path / "model")
    assert list(after) == list(before)
    changed = {key for key in before if not torch.equal(before[key][1], after[key][1])}
    assert changed == {f"{name}.weight" for name in written.plan.components}
    for key, (file, tensor) in after.items():
        assert (file, tensor.dtype, tensor.shape) == (before[key][0], before[key][1].dtype, before[key][1].shape)
        assert bool(torch.isfinite(tensor).all())
    others = {path.name for path in base.iterdir()} - {"model.safetensors"}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= others
    for name in others:
        assert (tmp_path / "model" / name).read_bytes() == (base / name).read_bytes()
    assert {path.name for path in (tmp_path / "model").iterdir()} == {*others, "model.safetensors", "manifest.json"}


def test_the_adapter_has_scaling_one_in_every_module_and_the_plans_ranks(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    written = Written(tiny_models("llama"), tmp_path, some)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny"
    assert config["task_type"] == "CAUSAL_LM"
    assert config["target_modules"] == sorted(written.plan.components)
    assert config["r"] == config["lora_alpha"]
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(weights) == 2 * len(written.plan.components)
    for name, components in written.plan.components.items():
        rank = config["rank_pattern"].get(name, config["r"])
        assert rank == config["alpha_pattern"].get(name, config["lora_alpha"]) == len(components)
        A = weights[f"base_model.model.{name}.lora_A.weight"]
        B = weights[f"base_model.model.{name}.lora_B.weight"]
        assert A.shape[0] == B.shape[1] == rank
        W = next(t.weight for t in written.targets if t.name == name).double()
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        chosen = list(components)
        removed = (U[:, chosen] * S[chosen]) @ Vh[chosen]
        torch.testing.assert_close((B @ A).double(), -removed, rtol=0, atol=1e-5)


def test_the_same_plan_is_the_same_bytes(tiny_models: TinyModels, tmp_path: Path) -> None:
    Written(tiny_models("gpt2"), tmp_path / "a", some)
    Written(tiny_models("gpt2"), tmp_path / "b", some)
    names = [path.relative_to(tmp_path / "a") for path in sorted((tmp_path / "a").rglob("*")) if path.is_file()]
    assert len(names) > 5
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3", "mixtral"])
def test_an_empty_plan_is_a_zero_adapter_and_the_bases_own_files(
    architecture: str, tiny_models: TinyModels, tmp_path: Path
) -> None:
    base = tiny_models(architecture)
    written = Written(base, tmp_path, nothing)
    for path in base.iterdir():
        assert (tmp_path / "model" / path.name).read_bytes() == path.read_bytes()
    assert torch.equal(logits(with_adapter(base, tmp_path / "adapter")), logits(stock(base)))
    assert reload_check(tmp_path, written.base, *written.batch()) == (0, 0)


def test_a_tied_head_stays_tied_and_is_not_written_twice(tiny_models: TinyModels, tmp_path: Path) -> None:
    base = tiny_models("llama")
    Written(base, tmp_path, some)
    assert "lm_head.weight" not in tensors(tmp_path / "model")
    model = stock(tmp_path / "model")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_shards_keep_their_names_tensors_and_index(architecture: str, tiny_models: TinyModels, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_models(architecture), base)
    (base / "model.safetensors").unlink()
    stock(tiny_models(architecture)).save_pretrained(base, max_shard_size="40KB")
    shards = sorted(path.name for path in base.glob("*.safetensors"))
    assert len(shards) > 2
    written = Written(base, tmp_path / "out", some)
    index = "model.safetensors.index.json"
    assert (tmp_path / "out" / "model" / index).read_bytes() == (base / index).read_bytes()
    assert sorted(path.name for path in (tmp_path / "out" / "model").glob("*.safetensors")) == shards
    before, after = tensors(base), tensors(tmp_path / "out" / "model")
    assert {key: file for key, (file, _) in after.items()} == {key: file for key, (file, _) in before.items()}
    assert max(reload_check(tmp_path / "out", written.base, *written.batch())) < 1e-3
    assert (logits(stock(tmp_path / "out" / "model")) - written.in_memory()).abs().max() < 1e-3


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
def test_a_checkpoint_without_the_models_prefix_is_written_without_it(
    architecture: str, tiny_models: TinyModels, tmp_path: Path
) -> None:
    # With its head tied, as GPT-2's own checkpoint on the Hub: nothing is missing.
    full = tmp_path / "full"
    shutil.copytree(tiny_models(architecture), full)
    config = json.loads((full / "config.json").read_text()) | {"tie_word_embeddings": True}
    (full / "config.json").write_text(json.dumps(config))
    base = tmp_path / "base"
    shutil.copytree(full, base)
    AutoModel.from_pretrained(full).save_pretrained(base)
    (base / "config.json").write_text(json.dumps(config))
    keys = list(tensors(base))
    assert not any(key.startswith(("transformer.", "model.", "gpt_neox.")) for key in keys)
    written = Written(base, tmp_path / "out", some)
    assert list(tensors(tmp_path / "out" / "model")) == keys
    expected = written.in_memory()
    assert (logits(stock(tmp_path / "out" / "model")) - expected).abs().max() < 1e-3
    assert (logits(with_adapter(base, tmp_path / "out" / "adapter")) - expected).abs().max() < 1e-3
    assert max(reload_check(tmp_path / "out", written.base, *written.batch())) < 1e-3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_every_dtype_is_kept(architecture: str, dtype: str, tiny_models: TinyModels, tmp_path: Path) -> None:
    base = tiny_models(architecture, dtype)
    written = Written(base, tmp_path, some)
    assert {tensor.dtype for _, tensor in tensors(tmp_path / "model").values()} == {getattr(torch, dtype)}
    expected = written.in_memory()
    limit = 0.1 if dtype == "bfloat16" else 0.02 if dtype == "float16" else 1e-5
    assert (logits(stock(tmp_path / "model")) - expected).abs().max() <= limit
    assert (logits(with_adapter(base, tmp_path / "adapter")) - expected).abs().max() < 3 * limit + 0.2
    reload_check(tmp_path, written.base, *written.batch())


def test_the_base_in_memory_is_as_it_was_after_the_check(tiny_models: TinyModels, tmp_path: Path) -> None:
    written = Written(tiny_models("llama"), tmp_path, some)
    before = {name: tensor.clone() for name, tensor in written.base.model.state_dict().items()}
    modules = [type(module) for module in written.base.model.modules()]
    reload_check(tmp_path, written.base, *written.batch())
    after = written.base.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert [type(module) for module in written.base.model.modules()] == modules


def tamper(path: Path, change: Callable[[Tensor], Tensor]) -> None:
    with safe_open(path, framework="pt") as opened:
        metadata = opened.metadata()
    held = load_file(path)
    key = next(key for key in held if "lora_B" in key or "o_proj" in key)
    save_file(held | {key: change(held[key]).contiguous()}, path, metadata=metadata)


@pytest.mark.parametrize("file", ["adapter/adapter_model.safetensors", "model/model.safetensors"])
@pytest.mark.parametrize(
    "change", [lambda W: W * 1.5, lambda W: W.flip(0), lambda W: W * float("nan")], ids=["scaled", "flipped", "nan"]
)
def test_an_artifact_that_is_not_the_measured_model_is_not_published(
    change: Callable[[Tensor], Tensor], file: str, tiny_models: TinyModels, tmp_path: Path
) -> None:
    written = Written(tiny_models("llama"), tmp_path, some)
    tamper(tmp_path / file, change)
    with pytest.raises(InternalError, match="nothing was published"):
        reload_check(tmp_path, written.base, *written.batch())


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")  # peft notices, and goes on
def test_an_adapter_that_lacks_a_module_is_not_published(tiny_models: TinyModels, tmp_path: Path) -> None:
    written = Written(tiny_models("llama"), tmp_path, some)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    held = load_file(file)
    name = sorted(held)[0].partition(".lora_")[0]
    save_file({key: value for key, value in held.items() if not key.startswith(name)}, file)
    with pytest.raises(InternalError, match="nothing was published"):
        reload_check(tmp_path, written.base, *written.batch())


# --- what is refused --------------------------------------------------------------------------------------------


def changed_copy(base: Path, folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    shutil.copytree(base, folder)
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return folder


def test_a_checkpoint_that_lacks_weights_is_refused(tiny_models: TinyModels, tmp_path: Path) -> None:
    gone = "model.layers.1.mlp.up_proj.weight"
    folder = changed_copy(
        tiny_models("llama"), tmp_path / "m", lambda held: {k: v for k, v in held.items() if k != gone}
    )
    with pytest.raises(UnusableModel, match=f"lacks 1 weights, {gone}") as refused:
        load(folder)
    assert refused.value.param == "model"


def test_a_checkpoint_with_weights_of_another_shape_is_refused(tiny_models: TinyModels, tmp_path: Path) -> None:
    key = "model.layers.1.mlp.up_proj.weight"
    folder = changed_copy(tiny_models("llama"), tmp_path / "m", lambda held: held | {key: held[key][:5].contiguous()})
    with pytest.raises(UnusableModel):
        load(folder)


@pytest.mark.parametrize(
    "key",
    ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"],
)
def test_nan_weights_are_refused(key: str, tiny_models: TinyModels, tmp_path: Path) -> None:
    def poison(held: dict[str, Tensor]) -> dict[str, Tensor]:
        held[key].view(-1)[3] = float("nan")
        return held

    base = load(changed_copy(tiny_models("llama"), tmp_path / "m", poison))
    with pytest.raises(UnusableModel, match="NaN"):
        find_targets(base.model)


@pytest.mark.parametrize(
    ("file", "content"), [("config.json", '{"model_type": "no-such-model"}'), ("config.json", '{"model_type": "bert"}')]
)
def test_what_transformers_cannot_load_is_refused_in_words_without_a_path(
    file: str, content: str, tiny_models: TinyModels, tmp_path: Path
) -> None:
    folder = tmp_path / "m"
    shutil.copytree(tiny_models("llama"), folder)
    (folder / file).write_text(content)
    with pytest.raises(UnusableModel) as refused:
        load(folder)
    assert str(tmp_path) not in refused.value.message


def test_a_model_without_a_tokenizer_is_refused(tiny_models: TinyModels, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(tiny_models("llama"), folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(UnusableModel):
        load(folder)


def test_weights_that_the_checkpoint_stores_in_another_form_cannot_be_written_back(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    base = load(tiny_models("llama"))
    targets, _ = find_targets(base.model)
    spectra = {t.name: decompose(t.weight) for t in targets}
    targets[0].weight.add_(1)  # no longer what the checkpoint holds
    with pytest.raises(UnusableModel, match=f"stores {targets[0].name}.weight in a form"):
        write_model(tmp_path / "model", base, targets, spectra, Plan({targets[0].name: (0,)}))


def test_pickles_scripts_and_hidden_files_of_the_base_are_left_behind(tiny_models: TinyModels, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_models("llama"), base)
    for name in ("pytorch_model.bin", "modeling_tiny.py", ".revision", "weights.pt"):
        (base / name).write_text("x")
    (base / "merges.txt").write_text("a b")
    Written(base, tmp_path / "out", some)
    names = {path.name for path in (tmp_path / "out" / "model").iterdir()}
    assert not names & {"pytorch_model.bin", "modeling_tiny.py", ".revision", "weights.pt"}
    assert "merges.txt" in names
    assert all((path.stat().st_mode & 0o777) == 0o644 for path in (tmp_path / "out").rglob("*") if path.is_file())


def test_loading_leaves_the_model_in_evaluation_mode(tiny_models: TinyModels) -> None:
    checkpoint: Checkpoint = load(tiny_models("gpt2"))
    assert not any(module.training for module in checkpoint.model.modules())
    assert isinstance(checkpoint.model, nn.Module)
    assert weight_files(checkpoint.folder)
    assert tiny.LAYERS == 2
