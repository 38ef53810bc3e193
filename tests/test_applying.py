"""`c2i apply`: an adapter on its base's own files is the job's own merged model; on any other it is refused."""

from __future__ import annotations

import json
import shutil
import tomllib
import zipfile
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from service.errors import C2IError, InvalidInput, ModelNotFound, UnusableModel
from service.settings import Settings
from tests.live import REPOSITORY, install
from tests.test_checkpoints import Written, largest, nothing, some, tensors, truncations
from workers import applying
from workers.offline import OFFLINE

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # peft 0.21 asks transformers 5 for a property under its old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

TinyModels = Callable[..., Path]
ARCHITECTURES = ("llama", "gpt2", "qwen2", "gemma3", "phi3", "roberta", "bert")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data=tmp_path / "data")


def written(base: Path, out: Path, settings: Settings, **more: object) -> Path:
    """What a job writes, and the model that `apply` makes of its adapter."""
    plan = more.pop("plan", some)
    Written(base, out, plan, **more)  # type: ignore[arg-type]
    applying.run(out / "adapter", str(base), out / "merged", settings)
    return out / "merged"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_is_the_jobs_own_model_to_the_bit(
    architecture: str, tiny_models: TinyModels, tmp_path: Path, settings: Settings
) -> None:
    merged = written(tiny_models(architecture), tmp_path, settings)
    names = sorted(path.name for path in merged.iterdir())
    assert sorted([*names, "manifest.json"]) == sorted(path.name for path in (tmp_path / "model").iterdir())
    for name in names:
        assert (merged / name).read_bytes() == (tmp_path / "model" / name).read_bytes(), name
    changed = tensors(merged)
    assert any(not torch.equal(changed[key][1], base) for key, (_, base) in tensors(tiny_models(architecture)).items())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert"])
def test_in_16_bits_it_differs_by_the_rounding_of_the_adapters_factors_at_most(
    architecture: str, dtype: str, tiny_models: TinyModels, tmp_path: Path, settings: Settings
) -> None:
    base = tiny_models(architecture, dtype)
    merged = tensors(written(base, tmp_path, settings))
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    unit = torch.finfo(getattr(torch, dtype)).eps
    checked = 0
    for key, (_, job) in tensors(tmp_path / "model").items():
        assert merged[key][1].dtype == job.dtype
        part = next((name for name in factors if name.endswith(f"{key.removesuffix('.weight')}.lora_A.weight")), None)
        if part is None:
            assert torch.equal(merged[key][1], job), key
            continue
        A, B = (factors[part.replace("lora_A", letter)].double().abs() for letter in ("lora_A", "lora_B"))
        bound = B @ A * unit  # half a unit for each of the factors
        bound = bound.T if bound.shape != job.shape or architecture == "gpt2" else bound
        allowed = bound + job.double().abs() * unit  # and the weight itself may fall to the other side
        assert bool(((merged[key][1].double() - job.double()).abs() <= allowed).all()), key
        checked += 1
    assert checked


def test_row_blocks_and_truncations_are_merged_too(tiny_models: TinyModels, tmp_path: Path, settings: Settings) -> None:
    for name, plan in (("largest", largest), ("truncations", truncations)):
        merged = written(tiny_models("llama"), tmp_path / name, settings, plan=plan, row_blocks=True)
        for key, (_, job) in tensors(tmp_path / name / "model").items():
            assert torch.allclose(tensors(merged)[key][1], job, atol=1e-5, rtol=0), key


def test_an_adapter_of_nothing_is_the_base(tiny_models: TinyModels, tmp_path: Path, settings: Settings) -> None:
    base = tiny_models("qwen2")
    merged = written(base, tmp_path, settings, plan=nothing)
    assert (merged / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


def test_the_command_takes_an_archive_and_an_installed_model(
    tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = install(tiny_models("llama"), tmp_path / "data", "owner/tiny")
    Written(base, tmp_path / "job", some)
    with zipfile.ZipFile(tmp_path / "adapter.zip", "w") as archive:
        for path in (tmp_path / "job" / "adapter").iterdir():
            archive.write(path, f"job-adapter/adapter/{path.name}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("C2I_DATA", str(tmp_path / "data"))
    for name, value in OFFLINE.items():  # the command sets them; this way they are taken back
        monkeypatch.setenv(name, value)
    app = typer.Typer()
    app.command()(EntryPoint("apply", declared()["apply"], "c2i.commands").load())
    arguments = ["adapter.zip", "--base", "owner/tiny", "--out", "new/merged"]
    assert "Merged" in CliRunner().invoke(app, arguments, catch_exceptions=False).output
    merged = tmp_path / "new" / "merged"
    assert (merged / "model.safetensors").read_bytes() == (tmp_path / "job/model/model.safetensors").read_bytes()
    with pytest.raises(InvalidInput, match="exists already"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)


def declared() -> dict[str, str]:
    """The commands that join `c2i`."""
    found = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["entry-points"]["c2i.commands"]
    return {str(name): str(place) for name, place in found.items()}


def other_weights(base: Path, folder: Path) -> Path:
    """A sister of the base: the same shapes, each weight a little different."""
    shutil.copytree(base, folder)
    weights = load_file(folder / "model.safetensors")
    for tensor in weights.values():
        tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)), alpha=0.05)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_another_model_is_refused_and_nothing_is_left(
    tiny_models: TinyModels, tmp_path: Path, settings: Settings
) -> None:
    base = tiny_models("llama")
    Written(base, tmp_path / "job", some)
    sister = other_weights(base, tmp_path / "sister")
    cases: list[tuple[Path | str, type[C2IError], str]] = [
        (sister, InvalidInput, "made from tiny, and this is another model"),
        (tiny_models("qwen2", "float32", 1), InvalidInput, "this is another model|does not fit"),
        (tiny_models("gpt2"), InvalidInput, "does not fit"),
        ("nobody", ModelNotFound, "no model nobody"),
        (tmp_path / "nowhere", InvalidInput, "neither an installed model's ID nor a folder"),
    ]
    for other, kind, message in cases:
        with pytest.raises(kind, match=message):
            applying.run(tmp_path / "job" / "adapter", str(other), tmp_path / "out" / "merged", settings)
        assert not list((tmp_path / "out").glob("*")), other
    pickled = tmp_path / "pickled"
    shutil.copytree(base, pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(UnusableModel, match="pickle"):
        applying.run(tmp_path / "job" / "adapter", str(pickled), tmp_path / "merged", settings)


def test_what_is_no_adapter_of_ours_is_refused(tiny_models: TinyModels, tmp_path: Path, settings: Settings) -> None:
    base = tiny_models("llama")
    Written(base, tmp_path / "job", some)
    config = json.loads((tmp_path / "job" / "adapter" / "adapter_config.json").read_text())

    def altered(**changes: object) -> Path:
        folder = tmp_path / f"altered-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(tmp_path / "job" / "adapter", folder)
        (folder / "adapter_config.json").write_text(json.dumps(config | changes))
        return folder

    damaged = altered()
    (damaged / "adapter_model.safetensors").write_bytes(b"damaged")
    text = tmp_path / "text.zip"
    text.write_text("no zip")
    for adapter, message in [
        (altered(use_dora=True), "merge it with PEFT"),
        (altered(peft_type="IA3"), "merge it with PEFT"),
        (altered(lora_alpha=64, alpha_pattern={}), "another scaling than 1"),
        (damaged, "damaged"),
        (text, "no zip that holds an adapter"),
        (tmp_path / "nothing", "No such file"),
    ]:
        with pytest.raises(InvalidInput, match=message) as refusal:
            applying.run(adapter, str(base), tmp_path / "merged", settings)
        assert refusal.value.param == "ADAPTER"
    assert not (tmp_path / "merged").exists()
    applying.run(tmp_path / "job", str(base), tmp_path / "merged", settings)  # as `c2i download` lays it out
    assert (tmp_path / "merged" / "model.safetensors").is_file()
