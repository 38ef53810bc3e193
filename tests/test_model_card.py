"""Model cards: what their front matter says to the Hub, that their snippets run, and what must not stand in them."""

from __future__ import annotations

import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from service.reports import Report
from tests.adapted import KINDS, Adapted
from workers.model_card import find_license

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # peft 0.21 asks transformers 5 for a property under its old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

APACHE = "                                 Apache License\n                           Version 2.0, January 2004\n"
MIT = "Copyright (c) 2026 A. N. Other\n\nPermission is hereby granted, free of charge, to any person obtaining a copy"


def report_of(out: Path) -> Report:
    return Report.model_validate_json((out / "report.json").read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_the_hub_reads_the_front_matter(kind: str, adapted: Adapted) -> None:
    out = adapted(kind)
    report = report_of(out)
    for folder, library, relation in (("adapter", "peft", "adapter"), ("model", "transformers", "finetune")):
        card = ModelCard.load(out / folder / "README.md")
        data = card.data.to_dict()
        assert data["base_model"] == report.model.id
        assert (data["library_name"], data["base_model_relation"]) == (library, relation)
        assert data["pipeline_tag"] == ("fill-mask" if kind == "masked" else "text-generation")
        assert "compress-to-impress" in data["tags"]
        assert "license" not in data  # the tiny models have none
        values = {result.metric_type: result.metric_value for result in card.data.eval_results or []}
        assert values["exact_match"] == pytest.approx(report.adapted.exact_match, abs=1e-4)
        assert values.get("accuracy") == (
            None if report.adapted.accuracy is None else pytest.approx(report.adapted.accuracy, abs=1e-4)
        )
        assert report.verdict in card.text


@pytest.mark.parametrize("kind", KINDS)
def test_no_text_of_an_example_stands_in_a_card(kind: str, adapted: Adapted) -> None:
    out = adapted(kind)
    prompts = {row["prompt"] for row in adapted.examples(kind)["examples"]}
    for folder in ("adapter", "model"):
        text = (out / folder / "README.md").read_text()
        assert not [prompt for prompt in prompts if prompt in text]
    confusion = report_of(out).base.confusion or {}
    named = [label for label in confusion if f'"{label}"' in text]
    assert set(named) == (set(confusion) if kind in ("choices", "masked", "nothing", "few") else set())


def run(code: str) -> str:
    printed = StringIO()
    with redirect_stdout(printed):
        exec(code, {})
    return printed.getvalue()


@pytest.mark.parametrize("kind", ["choices", "open", "masked", "nothing"])
def test_the_snippets_run_and_both_artifacts_answer_the_same(
    kind: str, adapted: Adapted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, base = adapted(kind), adapted.base(kind)
    for name, target in ((base.name, base), ("adapter", out / "adapter"), ("model", out / "model")):
        (tmp_path / name).symlink_to(target)
    monkeypatch.chdir(tmp_path)
    answers = []
    for folder in ("adapter", "model"):
        (code,) = re.findall(r"```python\n(.*?)```", (out / folder / "README.md").read_text(), re.DOTALL)
        assert "..." in code
        asked = code.replace('"..."', repr(adapted.examples(kind)["examples"][0]["prompt"]))
        answers.append(run(asked.replace("... {tokenizer.mask_token} ...", "Item 5: answer {tokenizer.mask_token}.")))
    assert answers[0] == answers[1]
    assert answers[0].strip()


def test_the_cards_of_the_base_say_that_nothing_was_removed(adapted: Adapted) -> None:
    for folder in ("adapter", "model"):
        text = (adapted("nothing") / folder / "README.md").read_text()
        assert "so this is the base model, unchanged" in text
        assert "## What was removed" not in text
        assert "pruned" not in text
        assert "subtracts" not in text
        assert "compressed to impress" not in text
    assert "The adapter is zero" in (adapted("nothing") / "adapter" / "README.md").read_text()


def test_a_card_calls_examples_cross_validated_that_are_no_test_split(adapted: Adapted) -> None:
    for kind, name in (("choices", "test"), ("few", "cross-validated")):
        splits = report_of(adapted(kind)).splits
        card = ModelCard.load(adapted(kind) / "model" / "README.md")
        named = {result.dataset_name for result in card.data.eval_results or []}
        assert named == {f"{splits.test} {name} examples of the job"}
        assert f"Of {splits.test} {name} examples " in card.text


def test_vllm_is_told_a_rank_that_it_takes_and_that_the_adapter_has(adapted: Adapted) -> None:
    text = (adapted("choices") / "adapter" / "README.md").read_text()
    (rank,) = re.findall(r"--max-lora-rank (\d+) ", text)
    config = (adapted("choices") / "adapter" / "adapter_config.json").read_text()
    (own,) = re.findall(r'"r": (\d+)', config)
    assert int(own) <= int(rank) <= max(8, 2 * int(own))
    assert "vllm" not in (adapted("masked") / "adapter" / "README.md").read_text().lower()


CASES: list[tuple[dict[str, str], str | None]] = [
    ({}, None),
    ({"README.md": "---\nlicense: gemma\nlanguage: en\n---\n# A model"}, "gemma"),
    ({"README.md": "---\r\nlicense: 'llama3.2'\r\n---\r\n"}, "llama3.2"),
    ({"README.md": "no front matter\nlicense: mit\n"}, None),
    ({"README.md": "---\nlanguage: en\n---\nlicense: mit\n", "LICENSE": APACHE}, "apache-2.0"),
    ({"README.md": "---\nlicense: '}{ !!python/object'\n---\n"}, None),
    ({"LICENSE": APACHE}, "apache-2.0"),
    ({"LICENSE.txt": MIT}, "mit"),
    ({"LICENSE": "All rights reserved."}, "other"),
    ({"README.md": "---\nlicense: mit\n" + "x" * 100_000 + "\n---\n"}, None),
]


@pytest.mark.parametrize(("files", "licence"), CASES)
def test_the_licence_is_the_one_that_the_bases_files_name(
    files: dict[str, str], licence: str | None, tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert find_license(tmp_path) == licence
