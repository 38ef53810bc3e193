"""A checkpoint as a GGUF file: transformers reads the same model and the same tokens back from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from service.errors import InternalError, InvalidInput
from service.jobs import Gguf
from tests import tiny
from tests.test_adaptation import Run
from workers.gguf_files import check_gguf, run, write_gguf

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # peft 0.21 asks transformers 5 for a property under its old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

TinyModels = Callable[..., Path]
PROMPT = torch.tensor([[11, 42, 97, 5, 203, 18, 64]])
TEXTS = ["The capital of France is Paris.", " Answer: yes\n no <|end|> 1234 it's"]
# What the format has no place for must be what transformers takes for given.
SHAPES = {"qwen3": {"head_dim": 128}, "gpt2": {"n_positions": 1024}}


@torch.no_grad()
def logits(folder: Path, **options: Any) -> Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    found: Tensor = model.eval()(input_ids=PROMPT).logits
    return found


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [("llama", "f16"), ("llama", "q8_0"), ("qwen2", "q8_0"), ("qwen3", "f16"), ("gpt2", "q8_0")],
)
def test_transformers_reads_the_same_model_and_tokens_back(architecture: str, kind: str, tmp_path: Path) -> None:
    folder = tiny.build(architecture, tmp_path / "model", "bfloat16", shape=SHAPES.get(architecture))
    check_gguf(folder)
    write_gguf(folder, tmp_path / "model.gguf", Gguf(kind))
    expected, read = logits(folder), logits(tmp_path, gguf_file="model.gguf")
    off = float((read - expected).square().mean() / expected.square().mean())
    assert off < {"f16": 1e-5, "q8_0": 5e-3}[kind]
    before = AutoTokenizer.from_pretrained(folder)
    after = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    for text in TEXTS:
        assert after(text)["input_ids"] == before(text)["input_ids"]
    assert after.chat_template == before.chat_template == tiny.CHAT_TEMPLATE
    stored = gguf.GGUFReader(tmp_path / "model.gguf")
    assert bytes(stored.fields["tokenizer.ggml.pre"].parts[-1]).decode() == "gpt-2"
    types = {tensor.tensor_type.name for tensor in stored.tensors if len(tensor.shape) > 1}
    assert kind.upper() in types  # rows of 48 are no whole blocks: some stay in 16 bits


def test_what_reads_back_as_another_model_is_not_kept(tmp_path: Path) -> None:
    # transformers takes the heads of a Qwen 3 to be 128 wide, whatever the file says.
    folder = tiny.build("qwen3", tmp_path / "model")
    with pytest.raises(InternalError, match="cannot be read back"):
        write_gguf(folder, tmp_path / "gguf" / "model.gguf", Gguf.F16)
    assert not list((tmp_path / "gguf").iterdir())


@pytest.mark.parametrize(
    ("architecture", "fields", "words"),
    [
        ("gpt_neox", {}, r"gpt_neox is not written as GGUF here; llama, qwen2, qwen3, gpt2 are"),
        (
            "qwen2",
            {"goal": "compress", "target": {"parameters": 0.9}, "strategy": "heads"},
            "with fewer heads a Qwen2",
        ),
    ],
)
def test_a_job_whose_model_cannot_be_written_is_refused_before_any_work(
    architecture: str, fields: dict[str, Any], words: str, tiny_models: TinyModels, tmp_path: Path
) -> None:
    folder, rows = tiny_models(architecture), tiny.learnable_examples()
    with pytest.raises(InvalidInput, match=words) as no:
        Run(folder, tmp_path / "out", tmp_path / "cache", examples=rows, gguf="f16", **fields)
    assert no.value.param == "gguf"


def test_what_cannot_be_written_is_refused_by_name(tmp_path: Path) -> None:
    folder = tiny.build("llama", tmp_path / "llama")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": "x"}, "behavior": "Isolated", "invert": False}
    cut = {"type": "Sequence", "pretokenizers": [split, tokenizer["pre_tokenizer"]]}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer | {"pre_tokenizer": cut}))
    with pytest.raises(InvalidInput, match="cuts text as none of gpt-2, smollm, llama-bpe, qwen2 does"):
        check_gguf(folder)
    config = json.loads((folder / "config.json").read_text())
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    (folder / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}))
    with pytest.raises(InvalidInput, match=r"rotary embedding is scaled \(linear\)"):
        check_gguf(folder)


@pytest.mark.parametrize(
    ("architecture", "shape", "words"),
    [
        ("qwen3", {}, "reads heads of 128 of a qwen3"),
        ("gpt2", {"n_positions": 256}, "reads 1,024 positions of a GPT-2"),
    ],
)
def test_sizes_that_transformers_guesses_are_refused(
    architecture: str, shape: dict[str, int], words: str, tmp_path: Path
) -> None:
    folder = tiny.build(architecture, tmp_path / "model", shape=shape)
    with pytest.raises(InvalidInput, match=words) as caught:
        check_gguf(folder)
    assert caught.value.param == "gguf"


def test_a_job_and_the_command_write_the_same_file(
    tiny_models: TinyModels, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = Run(
        tiny_models("llama"), tmp_path / "out", tmp_path / "cache", examples=tiny.learnable_examples(), gguf="q8_0"
    )
    written = job.out / "gguf" / "model-q8_0.gguf"
    assert job.report.not_gguf is None
    assert job.report.gguf is not None
    assert job.report.gguf.path == "gguf/model-q8_0.gguf"
    assert job.report.gguf.bytes == written.stat().st_size
    run(job.out / "model", tmp_path / "again.gguf", "q8_0")
    assert f"Written to {tmp_path / 'again.gguf'}" in capsys.readouterr().out
    assert (tmp_path / "again.gguf").read_bytes() == written.read_bytes()
    with pytest.raises(InvalidInput, match="exists already"):
        run(job.out / "model", tmp_path / "again.gguf", "q8_0")
    with pytest.raises(InvalidInput, match="q5 is none of f16, q8_0"):
        run(job.out / "model", tmp_path / "other.gguf", "q5")
