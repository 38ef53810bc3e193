"""Folders that somebody made to do harm, or that are broken: each is refused with a reason, none runs, hangs or costs
memory. First what is refused before any work, then what only a loader can see."""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from service import models
from service.errors import InvalidInput, UnusableModel
from service.jobs import Example, JobSpec, PromptFormat, Stage
from service.lengths import check_lengths
from service.models import check_unchanged, resolve
from tests import tiny
from tests.live import REPOSITORY, install, spec, wait_until
from workers.adaptation import adapt, encode_for
from workers.loading import load

pytestmark = pytest.mark.usefixtures("one_thread")

Spoil = Callable[[Path], object]
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path, tiny_models: Callable[..., Path]) -> Path:
    """A model of the tests' own, `tiny-llama` in `data/models`."""
    return install(tiny_models("llama"), tmp_path / "data")


def refusal(folder: Path) -> UnusableModel:
    """Why a model is refused; its message names no path of the server and can be sent."""
    with pytest.raises(UnusableModel) as caught:
        resolve(folder.parent, folder.name)
    return presentable(caught.value, folder)


def presentable(error: UnusableModel, folder: Path) -> UnusableModel:
    assert error.param == "model"
    assert str(folder.parent.parent) not in error.message
    assert len(error.message) < 500
    assert "\n" not in error.message
    error.message.encode()
    return error


def edit(name: str, **changes: Any) -> Spoil:
    """Change keys of one of its JSON files; `...` takes one out."""

    def spoil(folder: Path) -> None:
        held = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps({key: value for key, value in held.items() if value is not ...}))

    return spoil


def config(**changes: Any) -> Spoil:
    """Change keys of `config.json`."""
    return edit("config.json", **changes)


def tokenizer_config(**changes: Any) -> Spoil:
    """Change keys of `tokenizer_config.json`."""
    return edit("tokenizer_config.json", **changes)


def write(name: str, content: str | bytes) -> Spoil:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def header(change: Callable[[dict[str, Any]], object], data: bytes | None = None) -> Spoil:
    """Change what the header of the weights tells; the data too, if given."""

    def spoil(folder: Path) -> None:
        whole = (folder / WEIGHTS).read_bytes()
        length = int.from_bytes(whole[:8], "little")
        told = json.loads(whole[8 : 8 + length])
        change(told)
        text = json.dumps(told).encode()
        (folder / WEIGHTS).write_bytes(
            len(text).to_bytes(8, "little") + text + (whole[8 + length :] if data is None else data)
        )

    return spoil


def bare_header(text: bytes) -> Spoil:
    """Weights that are a header alone."""
    return write(WEIGHTS, len(text).to_bytes(8, "little") + text)


def first(told: dict[str, Any]) -> dict[str, Any]:
    """A tensor's entry: the one that stands at the data's beginning."""
    return next(entry for name, entry in told.items() if name != "__metadata__" and entry["data_offsets"][0] == 0)


def shift(told: dict[str, Any]) -> None:
    for name, entry in told.items():
        if name != "__metadata__":
            entry["data_offsets"] = [offset + 4 for offset in entry["data_offsets"]]


def link(name: str, target: str) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return spoil


def pipe(name: str) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return spoil


def sharded(weight_map: Callable[[list[str]], dict[str, Any]]) -> Spoil:
    """The same weights under an index."""

    def spoil(folder: Path) -> None:
        names = list(load_file(folder / WEIGHTS))
        (folder / WEIGHTS).rename(folder / "a.safetensors")
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map(names)}))

    return spoil


def all_in(shard: Any) -> Spoil:
    """An index that says that every tensor is in one shard."""
    return sharded(lambda names: dict.fromkeys(names, shard))


def two_shards_of_one(folder: Path) -> None:
    sharded(lambda names: dict.fromkeys(names, "a.safetensors") | {names[0]: "b.safetensors"})(folder)
    shutil.copyfile(folder / "a.safetensors", folder / "b.safetensors")


def sparse(name: str, size: int) -> Spoil:
    """A file of so many bytes that takes no room."""

    def spoil(folder: Path) -> None:
        (folder / name).touch()
        os.truncate(folder / name, size)

    return spoil


def link_among_templates(folder: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    link("additional_chat_templates/x.jinja", "/etc/passwd")(folder)


def crowd(folder: Path) -> None:
    for k in range(1_001):
        (folder / f"{k}").touch()


def without_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


def bomb(folder: Path) -> None:
    """A header of two gigabytes, in a file that is as long: zeros, which a disk stores as nothing."""
    (folder / WEIGHTS).write_bytes((2**31).to_bytes(8, "little"))
    os.truncate(folder / WEIGHTS, 2**31 + 8)


REFUSED: dict[str, tuple[Spoil, str]] = {
    # Files.
    "a link to a file of the system": (link("tokenizer.json", "/etc/hostname"), "tokenizer.json is a link that leads"),
    "a link through the parent": (link(WEIGHTS, "../../../secret"), "is a link that leads out"),
    "a link to nowhere": (link("vocab.txt", "gone"), "leads out of the models' folder, or nowhere"),
    "links in a circle": (lambda f: (link("a", "b")(f), link("b", "a")(f)), "or nowhere"),
    "a folder that is a link": (link("extra", "/etc"), "leads out"),
    "a link among the chat templates": (link_among_templates, "x.jinja is a link"),
    "a pipe for weights": (pipe(WEIGHTS), "is a pipe"),
    "a pipe for a tokenizer": (pipe("tokenizer.json"), "tokenizer.json is a pipe"),
    "more files than a model has": (crowd, "more than 1,000 files"),
    "a name that is no text": (link(os.fsdecode(b"\xff\xfe"), "/etc"), r"its file \?\? is a link"),
    "an adapter beside the model": (
        write("adapter_config.json", '{"base_model_name_or_path": "/somewhere/else"}'),
        "adapter_config.json",
    ),
    "a tokenizer of a gigabyte": (sparse("tokenizer.json", 2**30), "tokenizer.json has 1,073,741,824 bytes"),
    "a vocabulary of a gigabyte": (sparse("vocab.txt", 2**30), "vocab.txt has"),
    "a config of a gigabyte": (sparse("config.json", 2**30), "config.json has 1,073,741,824 bytes; at most"),
    "a revision that is none": (write(".revision", b"\xff\x00" * 100), ".revision holds no revision"),
    "a revision of a gigabyte": (sparse(".revision", 2**30), ".revision has"),
    # JSON.
    "a key twice": (write("config.json", '{"model_type": "llama", "model_type": "gpt2"}'), "has `model_type` twice"),
    "a deep config": (write("config.json", '{"a":' * 500 + "1" + "}" * 500), "not readable JSON"),
    "a bottomless config": (write("config.json", "[" * 10**6), "not readable JSON"),
    "half a character": (config(architectures=["\ud800"]), "not readable JSON"),
    "a number without end": (write("config.json", '{"vocab_size": ' + "9" * 10**5 + "}"), "not readable JSON"),
    "no UTF-8": (write("config.json", b'{"a": "\xff"}'), "not readable JSON"),
    "a tokenizer_config.json that is none": (write("tokenizer_config.json", "[]"), "not a JSON object"),
    # Code.
    "pickle weights": (lambda f: (f / WEIGHTS).rename(f / "pytorch_model.bin"), "only pickle weights"),
    "pickles with an index": (
        lambda f: ((f / WEIGHTS).rename(f / "a.bin"), write(INDEX, '{"weight_map": {"x": "a.bin"}}')(f)),
        "a shard that is not a safetensors file",
    ),
    "auto_map": (config(auto_map={"AutoModelForCausalLM": "evil.Model"}), "auto_map"),
    "auto_map deep inside": (config(a=[[{"b": {"auto_map": {}}}]]), "auto_map"),
    "auto_map of the tokenizer": (tokenizer_config(auto_map={"AutoTokenizer": ["e.T", None]}), "auto_map"),
    "an attention of the Hub, inside": (
        config(_attn_implementation_internal="evil/kernel"),
        "_attn_implementation_internal",
    ),
    "an attention of the Hub": (config(attn_implementation="evil/kernel"), "attn_implementation"),
    "an attention of the Hub, by part": (config(attn_implementation={"": "evil/kernel"}), "attn_implement"),
    "experts of the Hub": (config(experts_implementation="evil/kernel"), "experts_implementation"),
    "trust asked for": (config(trust_remote_code=True), "trust_remote_code"),
    "a quantizer": (config(quantization_config={"quant_method": "awq"}), "quantization_config"),
    "weights of another name": (config(transformers_weights="../../x.safetensors"), "transformers_weights"),
    "a tokenizer class that is a path": (tokenizer_config(tokenizer_class="os.system"), "tokenizer_class"),
    "a tokenizer class that is a model": (tokenizer_config(tokenizer_class="AutoModel"), "tokenizer_class"),
    "a tokenizer class that is a list": (tokenizer_config(tokenizer_class=["x"]), "tokenizer_class"),
    # Configs that lie.
    "no model type": (config(model_type=...), "model_type"),
    "a type that is an attribute of torch": (config(dtype="load"), "dtype"),
    "a type that is a list": (config(torch_dtype=[]), "torch_dtype"),
    "a billion layers": (config(num_hidden_layers=10**9), r"num_hidden_layers.* 1,000,000,000"),
    "a billion wide": (config(hidden_size=10**9), r"hidden_size.* 1,000,000,000"),
    "a billion wide as a float": (config(hidden_size=1e9), r"hidden_size.* 1,000,000,000"),
    "a width without a number": (config(hidden_size=float("nan")), "hidden_size"),
    "an endless feed-forward": (config(intermediate_size=float("inf")), "intermediate_size"),
    "more labels than memory": (config(num_labels=10**12), "num_labels"),
    "experts without end": (config(num_local_experts=10**8), "num_local_experts"),
    "another width": (config(hidden_size=48 + 8), "hidden_size.* is 56"),
    "another vocabulary": (config(vocab_size=7), "vocab_size.* is 7"),
    "a number of thousands of digits": (config(hidden_size=10**4000), "hidden_size.*over"),
    # Headers that lie.
    "an empty file": (write(WEIGHTS, b""), "its header would have"),
    "seven bytes": (write(WEIGHTS, b"1234567"), "its header would have"),
    "a header longer than the file": (write(WEIGHTS, b"\xff" * 8 + b"{}"), "its header would have"),
    "a header of two gigabytes": (bomb, "header of its model.safetensors has 2,147,483,648 bytes"),
    "a header that is no JSON": (bare_header(b"{]"), "header of model.safetensors"),
    "a header that is a list": (bare_header(b"[]"), "header of model.safetensors"),
    "a header of nothing": (bare_header(b"{}"), "hold no tensor"),
    "a tensor twice": (
        bare_header(b'{"a":{},"a":{}}'),
        "has `a` twice",
    ),
    "a shape that is larger than its bytes": (header(lambda h: first(h).update(shape=[10**9, 10**9])), "would take"),
    "a shape without end": (header(lambda h: first(h).update(shape=[2**62] * 8)), "would take"),
    "a negative shape": (header(lambda h: first(h).update(shape=[-1, -32])), "no type, shape and place"),
    "a shape of words": (header(lambda h: first(h).update(shape=["32"])), "no type, shape and place"),
    "a shape of nine sides": (header(lambda h: first(h)["shape"].extend([1] * 9)), "no type, shape and place"),
    "an unknown type": (header(lambda h: first(h).update(dtype="F7")), "of an unknown type"),
    "another type": (header(lambda h: first(h).update(dtype="F64")), "would take"),
    "no type": (header(lambda h: first(h).pop("dtype")), "no type, shape and place"),
    "an entry that is a list": (header(lambda h: h.update(x=[])), "no type, shape and place"),
    "data before the file": (header(lambda h: first(h).update(data_offsets=[-8, 0], shape=[2])), "does not begin"),
    "data that two tensors share": (header(lambda h: h.update(twin=dict(first(h)))), "does not begin where"),
    "a gap": (header(shift), "does not begin where"),
    "data behind the end": (header(lambda h: None, data=b"short"), "the file has"),
    "more data than is told of": (header(lambda h: None, data=bytes(10**6)), "the file has"),
    # Shards.
    "an index and a single file": (write(INDEX, '{"weight_map": {"x": "model.safetensors"}}'), "index of shards too"),
    "an index of nothing": (sharded(lambda names: {}), "names no shards"),
    "an index out of the folder": (all_in("../a.safetensors"), "not a safetensors"),
    "an index of numbers": (all_in(7), "not a safetensors"),
    "a shard that is missing": (all_in("gone.safetensors"), "gone.safetensors is"),
    "an index that lacks a tensor": (sharded(lambda names: dict.fromkeys(names[1:], "a.safetensors")), "disagree"),
    "an index of more tensors": (
        sharded(lambda names: dict.fromkeys([*names, "more"], "a.safetensors")),
        "disagree about 1 tensors, more first",
    ),
    "a tensor in two shards": (two_shards_of_one, "two of its shards hold"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_a_hostile_folder_is_refused_in_words_at_once_and_for_nothing(folder: Path, what: str) -> None:
    resolve(folder.parent, folder.name)
    spoil, words = REFUSED[what]
    spoil(folder)
    tracemalloc.start()
    began = time.process_time()
    with pytest.raises(UnusableModel, match=words) as caught:
        resolve(folder.parent, folder.name)
    assert time.process_time() - began < 2
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20_000_000
    presentable(caught.value, folder)
    # A list of the models tells the same.
    assert [str(error) for _, error in models.find_models(folder.parent)] == [caught.value.message]


def test_a_folder_that_leads_out_is_refused(folder: Path, tmp_path: Path) -> None:
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    assert "its folder is a link" in refusal(folder).message


def test_models_may_share_files_by_links_within_the_models_folder(folder: Path) -> None:
    twin = folder.parent / "owner" / "twin"
    twin.mkdir(parents=True)
    for path in folder.iterdir():
        (twin / path.name).symlink_to(path)
    assert resolve(folder.parent, "owner/twin").parameters == resolve(folder.parent, folder.name).parameters


def test_what_the_headers_say_is_the_model(folder: Path) -> None:
    found = resolve(folder.parent, folder.name)
    held = load_file(folder / WEIGHTS)
    assert found.shapes == {name: tuple(tensor.shape) for name, tensor in held.items()}
    assert found.parameters == sum(tensor.numel() for tensor in held.values())
    assert found.dtype == "F32"


def test_shards_whose_index_tells_the_truth_are_taken(folder: Path) -> None:
    before = resolve(folder.parent, folder.name)
    sharded(lambda names: dict.fromkeys(names, "a.safetensors"))(folder)
    assert resolve(folder.parent, folder.name).shapes == before.shapes


def await_later_time(path: Path, scratch: Path) -> None:
    """Some kernels tell the times of files in steps of 4 ms: what is written now is seen to be newer than `path`."""

    def later() -> bool:
        scratch.touch()
        return scratch.stat().st_ctime_ns > path.stat().st_ctime_ns

    wait_until(later, 5, "the clock of files has gone on")


@pytest.mark.parametrize("name", ["config.json", WEIGHTS, "tokenizer.json", "new.json"])
def test_a_file_that_is_swapped_behind_the_check_is_noticed(folder: Path, tmp_path: Path, name: str) -> None:
    checked = resolve(folder.parent, folder.name)
    check_unchanged(checked)
    path = folder / name
    status = path.stat() if path.exists() else None
    if status:
        await_later_time(path, tmp_path / "scratch")
    path.write_bytes(path.read_bytes() if status else b"{}")
    if status:  # as long and as old as before
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(UnusableModel, match="changed while the job ran"):
        check_unchanged(checked)


def test_a_job_whose_model_is_swapped_while_it_is_loaded_writes_nothing(folder: Path, tmp_path: Path) -> None:
    checked = resolve(folder.parent, folder.name)
    held = load_file(folder / WEIGHTS)
    await_later_time(folder / WEIGHTS, tmp_path / "scratch")
    save_file({name: tensor * 2 for name, tensor in held.items()}, folder / WEIGHTS, metadata={"format": "pt"})
    (tmp_path / "out").mkdir()
    with pytest.raises(UnusableModel, match="changed while the job ran"):
        adapt(JobSpec.parse(spec()), checked, tmp_path / "out", cache=tmp_path, on_progress=lambda *_: None)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_job_whose_model_is_swapped_before_it_is_written_publishes_nothing(folder: Path, tmp_path: Path) -> None:
    def swap(stage: Stage, percent: float, eta_seconds: float | None, message: str) -> None:
        if stage is Stage.PUBLISHING:
            (folder / "tokenizer_config.json").write_text("{}")

    (tmp_path / "out").mkdir()
    with pytest.raises(UnusableModel, match="changed while the job ran"):
        adapt(
            JobSpec.parse(spec()),
            resolve(folder.parent, folder.name),
            tmp_path / "out",
            cache=tmp_path,
            on_progress=swap,
        )
    assert not (tmp_path / "out" / "report.json").exists()


# --- what a loader sees ---------------------------------------------------------------------------------------------


def weights(change: Callable[[dict[str, Any]], object]) -> Spoil:
    """Other tensors in the file of weights."""

    def spoil(folder: Path) -> None:
        held = load_file(folder / WEIGHTS)
        change(held)
        save_file(held, folder / WEIGHTS, metadata={"format": "pt"})

    return spoil


@pytest.fixture
def transformers_log() -> Iterator[io.StringIO]:
    """What transformers logs meanwhile."""
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    logger = logging.getLogger("transformers")
    logger.setLevel(logging.WARNING)  # its default
    logger.addHandler(handler)
    yield text
    logger.removeHandler(handler)


UP = "model.layers.1.mlp.up_proj.weight"
UNLOADABLE: dict[str, tuple[Spoil, str]] = {
    "a weight of another shape": (
        weights(lambda held: held.update({UP: held[UP][:5].contiguous()})),
        rf"1 of its weights have another shape.*{UP} first: \(5, 32\) and not \(48, 32\)",
    ),
    "a weight that lies on its side": (weights(lambda held: held.update({UP: held[UP].T.contiguous()})), r"\(32, 48\)"),
    "a weight less": (weights(lambda held: held.pop(UP)), f"lacks 1 weights, {UP} first"),
    "a layer less": (config(num_hidden_layers=1), "in layers that its config.json does not have"),
    "a layer more": (config(num_hidden_layers=3), "lacks 9 weights, model.layers.2"),
    "sixty layers": (config(num_hidden_layers=60, intermediate_size=340), "makes a model of"),
    "another feed-forward": (config(intermediate_size=64), "another shape"),
    "no heads": (config(num_attention_heads=0), "transformers cannot load this model as a causal"),
    "heads that do not divide": (config(num_attention_heads=5), "transformers cannot load"),
    "a padding token without a row": (config(pad_token_id=10**9), "transformers cannot load"),
    "an unknown architecture": (config(model_type="no-such"), "cannot load.*no-such"),
    "no language model": (config(model_type="vit"), "transformers cannot load"),
    "words for a size": (config(intermediate_size="48"), "transformers cannot load"),
    "no tokenizer": (without_tokenizer, "this model's tokenizer"),
    "a broken tokenizer": (write("tokenizer.json", "{"), "tokenizer"),
    "a tokenizer of nothing": (write("tokenizer.json", "{}"), "tokenizer"),
    "a bottomless tokenizer": (write("tokenizer.json", "[" * 10**6), "tokenizer"),
    "a tokenizer class that is abstract": (
        tokenizer_config(tokenizer_class="PreTrainedTokenizerBase"),
        "this model's tokenizer",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", UNLOADABLE)
def test_what_transformers_cannot_load_is_named_in_words(
    folder: Path, what: str, transformers_log: io.StringIO
) -> None:
    spoil, words = UNLOADABLE[what]
    spoil(folder)
    with pytest.raises(UnusableModel, match=words) as caught:
        load(folder)
    presentable(caught.value, folder)
    assert str(folder.parent.parent) not in transformers_log.getvalue()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [UP, "model.norm.weight"])
def test_a_weight_that_is_no_number_is_named(folder: Path, tmp_path: Path, name: str, value: float) -> None:
    weights(lambda held: held[name].view(-1)[3:4].fill_(value))(folder)
    (tmp_path / "out").mkdir()
    with pytest.raises(UnusableModel, match=f"^{name} holds NaN or infinite weights"):
        adapt(
            JobSpec.parse(spec()),
            resolve(folder.parent, folder.name),
            tmp_path / "out",
            cache=tmp_path,
            on_progress=lambda *_: None,
        )
    assert list((tmp_path / "out").iterdir()) == []


def test_a_tokenizer_with_more_tokens_than_rows_is_refused(folder: Path, tiny_models: Callable[..., Path]) -> None:
    def cut(held: dict[str, Any]) -> None:
        held["model.embed_tokens.weight"] = held["model.embed_tokens.weight"][:300].contiguous()

    weights(cut)(folder)
    config(vocab_size=300)(folder)
    with pytest.raises(UnusableModel, match=r"has \d+ tokens and its embedding 300 rows"):
        load(folder)


def test_a_table_of_positions_larger_than_memory_is_refused(tmp_path: Path, tiny_models: Callable[..., Path]) -> None:
    folder = install(tiny_models("gptj"), tmp_path / "data", "gptj")
    config(n_positions=10**12)(folder)
    with pytest.raises(UnusableModel, match="so many positions"):
        load(folder)


def test_an_example_that_needs_a_token_without_a_row_is_named(folder: Path) -> None:
    made = Tokenizer.from_file(str(folder / "tokenizer.json"))
    made.add_special_tokens([f"<|{k}|>" for k in range(20)])
    made.save(str(folder / "tokenizer.json"))
    base = load(folder)  # the tokens of no example cost nothing
    examples = [Example(prompt="Answer:", completion=" yes"), Example(prompt="<|19|> Answer:", completion=" no")]
    encode_for(base, examples[:1], prompt_format=PromptFormat.TEXT, context=None, name="test")
    with pytest.raises(InvalidInput, match="embedding has 328 rows") as caught:
        encode_for(base, examples, prompt_format=PromptFormat.TEXT, context=None, name="test")
    assert caught.value.param == "test[1].prompt"


def split(pattern: str) -> dict[str, Any]:
    return {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}}


def replace(pattern: dict[str, str], content: str, times: int = 1) -> dict[str, Any]:
    normalizer = {"type": "Replace", "pattern": pattern, "content": content}
    return {"normalizer": {"type": "Sequence", "normalizers": [normalizer] * times}}


def nested(depth: int) -> dict[str, Any]:
    inner: dict[str, Any] = {"type": "NFC"}
    for _ in range(depth):
        inner = {"type": "Sequence", "normalizers": [inner]}
    return {"normalizer": inner}


# Each as keys of a tokenizer.json. Most of these make Rust panic, which is no Exception in Python.
TOKENIZERS: dict[str, dict[str, Any]] = {
    "a pattern without end": split("(a+)+$"),
    "a pattern that is none": split("(("),
    "a text that doubles and doubles": replace({"String": "a"}, "a" * 10, times=30),
    "a text that grows by a pattern": replace({"Regex": "a"}, "a" * 10, times=30),
    "nothing replaced": replace({"String": ""}, "a" * 10),
    "steps of no length": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "a map that is cut off": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "a map that leads astray": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "BAAAAP////8="}},
    "normalizers within normalizers": nested(120),
    "a normalizer that is a list": {"normalizer": {"type": ["NFC"]}},
    "half a character": replace({"String": "a"}, "\ud800"),
    "an unknown token that is missing": {
        "model": {"type": "WordPiece", "unk_token": "?", "continuing_subword_prefix": "", "max_input_chars_per_word": 9,
                  "vocab": {"x": 0}}
    },
}  # fmt: skip


@pytest.mark.parametrize("what", TOKENIZERS)
def test_a_hostile_tokenizer_is_refused_where_examples_are_counted_and_where_they_are_read(
    folder: Path, what: str
) -> None:
    edit("tokenizer.json", **TOKENIZERS[what])(folder)
    examples = [{"prompt": f"{'a' * 400}!{k}", "completion": " no"} for k in range(12)]
    checked = resolve(folder.parent, folder.name)
    began = time.process_time()
    with pytest.raises(UnusableModel, match="tokenizer") as caught:
        check_lengths(checked, JobSpec.parse(spec(examples=examples)))
    presentable(caught.value, folder)
    assert time.process_time() - began < 3
    if "grows" not in what and "doubles" not in what:  # a worker's memory is limited
        with pytest.raises(UnusableModel, match="tokenizer") as caught:
            encode_for(
                load(folder),
                [Example.model_validate(example) for example in examples],
                prompt_format=PromptFormat.TEXT,
                context=None,
                name="examples",
            )
        presentable(caught.value, folder)


TEMPLATES: dict[str, tuple[str, str]] = {
    "an endless loop": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}"
        "{% endfor %}",
        "takes more than 0.3 s",
    ),
    "a number without end": ("{{ 9 ** (9 ** 9) }}", "takes more than|fails"),
    "a text of ten gigabytes": ("{{ 'a' * 10000000000 }}", "more than 537 MB of memory"),
    "a padded text": ("{{ '%9999999999d' % 1 }}", "more than 537 MB of memory|fails"),
    "a text of megabytes": ("{{ 'a' * 10000000 }}", "makes 10,000,000 characters"),
    "an escape from the sandbox": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "fails .*SecurityError"),
    "a refusal": ("{{ raise_exception(messages[0]['content']) }}", "fails .*TemplateError"),
    "a mistake": ("{{ 1 / 0 }}", "fails .*ZeroDivisionError"),
    "no Jinja": ("{% for %}", "fails .*TemplateSyntaxError"),
    "a missing value": ("{{ nothing.at.all }}", "fails .*UndefinedError"),
    "a template that calls itself": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "fails .*RecursionError"),
    "an import of a file": ("{% include '/etc/passwd' %}", "fails"),
}  # fmt: skip


@pytest.mark.parametrize("what", TEMPLATES)
def test_a_hostile_chat_template_is_refused_within_bounds(
    folder: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.chat.SECONDS", 0.3)
    template, words = TEMPLATES[what]
    (folder / "chat_template.jinja").write_text(template)
    base = load(folder)
    examples = [Example(prompt="a secret", completion=" yes")]
    began = time.process_time()
    with pytest.raises(InvalidInput, match=words) as caught:
        encode_for(base, examples, prompt_format=PromptFormat.CHAT, context=None, name="examples")
    assert time.process_time() - began < 5
    assert caught.value.param == "prompt_format"
    assert "secret" not in caught.value.message
    encode_for(base, examples, prompt_format=PromptFormat.TEXT, context=None, name="examples")


OFFLINE = """
import os, socket, sys
reached = []
def hook(event, arguments):
    unix = event in ("socket.connect", "socket.sendto") and isinstance(arguments[1], (str, bytes))
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo") and not unix:
        reached.append(event)
        raise OSError("no network in a job")
sys.addaudithook(hook)
sys.argv = ["c2i", "adapt", *sys.argv[1:]]
import service.cli
try:
    service.cli.main()
finally:
    print("reached", reached)
    from huggingface_hub import constants
    assert constants.HF_HUB_OFFLINE and constants.HF_HUB_DISABLE_TELEMETRY and os.environ["TRANSFORMERS_OFFLINE"]
    try:
        socket.create_connection(("127.0.0.1", 9))
    except OSError:
        print("the hook works", reached)
"""


def test_a_job_reaches_for_no_network(folder: Path, tmp_path: Path) -> None:
    lines = tmp_path / "task.jsonl"
    lines.write_text("\n".join(json.dumps(example) for example in tiny.learnable_examples(12)))
    # What would name the model on the Hub.
    config(_name_or_path="HuggingFaceTB/SmolLM2-135M")(folder)
    tokenizer_config(name_or_path="HuggingFaceTB/SmolLM2-135M")(folder)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    arguments = [str(lines), "--model", folder.name, "--out", str(tmp_path / "out"), "--data", str(folder.parents[1])]
    result = subprocess.run(
        [sys.executable, "-c", OFFLINE, *arguments],
        cwd=REPOSITORY,
        env=clean,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "reached []" in result.stdout
    assert "the hook works ['socket.getaddrinfo']" in result.stdout
    assert (tmp_path / "out" / "report.json").is_file()
