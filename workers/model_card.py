"""The model cards, `README.md` of `adapter/` and `model/`: what was done, what it brought, how to load it.

Their front matter is the Hugging Face Hub's (https://huggingface.co/docs/hub/model-cards). A card is made to be
published, so no text of an example stands in it. Labels do, where they are few, short and shared by examples: who
loads the model must offer it these continuations.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from service.curves import filled
from service.jobs import PromptFormat
from service.reports import CurvePoint, Metrics, Report, Shipped
from workers.card_usage import ask, unchanged, use_adapter, use_factored, use_model
from workers.quantized_card import quantized_use, size_table

MOST_LABELS = 12
LONGEST_LABEL = 24
# Of a base's own card, so much is read.
CARD_BYTES = 65536
# A licence's ID in a card's front matter, and what the texts of the commonest say.
LICENSE_LINE = re.compile(r"^license:\s*[\"']?([a-z0-9][a-z0-9.+-]{1,40})[\"']?\s*$", re.MULTILINE)
LICENSE_TEXTS = {
    "apache-2.0": r"Apache License\s+Version 2\.0",
    "mit": r"Permission is hereby granted, free of charge, to any person obtaining a copy",
    "gpl-3.0": r"GNU GENERAL PUBLIC LICENSE\s+Version 3",
}
METRICS = {"accuracy": "accuracy over the choices", "exact_match": "exact match"}


def write_cards(out: Path, report: Report, base: Path, *, masked: bool) -> None:
    """Write `README.md` into `out/model`, into `out/adapter`, where there is one, and into each point's model.

    Args:
        base: the base model's folder.
    """
    licence = find_license(base)
    about = _about(report, licence)
    pipeline = "fill-mask" if masked else "text-generation"
    model = _front_matter(report, licence, pipeline, library="transformers", relation="finetune")
    use = use_model(report, _shipped(out / "model", report), masked=masked)
    (out / "model" / "README.md").write_text(f"{model}\n{about}\n{use}")
    if report.factored is not None:
        (out / "factored" / "README.md").write_text(f"{model}\n{about}\n{use_factored(report, masked=masked)}")
    for point in report.curve[:-1]:
        front = _front_matter(report, licence, pipeline, library="transformers", relation="finetune", scores=point)
        use = use_model(report, _shipped(out / point.path, report), masked=masked)
        text = f"{front}\n{_about_point(report, point, licence)}\n{use}"
        (out / point.path / "README.md").write_text(text)
    if report.quantized:
        quantized = _front_matter(report, licence, pipeline, library="transformers", relation="quantized")
        use = quantized_use(
            report.quantized, ask(report, masked=masked), masked=masked, unseen=not report.splits.cross_validated
        )
        (out / "quantized" / "README.md").write_text(f"{quantized}\n{about}\n{use}")
    if not (out / "adapter").is_dir():
        return
    rank = int(json.loads((out / "adapter" / "adapter_config.json").read_text())["r"])
    adapter = _front_matter(report, licence, pipeline, library="peft", relation="adapter")
    adapter_use = use_adapter(report, rank, masked=masked)
    (out / "adapter" / "README.md").write_text(f"{adapter}\n{about}\n{adapter_use}")


def _shipped(folder: Path, report: Report) -> list[str]:
    """What a written model is beside its base, in sentences."""
    written = Shipped.model_validate_json((folder / "manifest.json").read_text())
    return written.words(report.model.parameters)


def find_license(folder: Path) -> str | None:
    """The licence that a model's folder names, as the Hub spells it: in its card, else by the text of its LICENSE,
    `other` where that is none of the commonest. None where it names none."""
    card = _beginning(folder / "README.md")
    front = re.match(r"---\n(.*?)\n---", card.replace("\r\n", "\n"), re.DOTALL)
    named = LICENSE_LINE.search(front[1]) if front else None
    if named:
        return named[1]
    texts = [_beginning(path) for path in sorted(folder.glob("LICENSE*"))]
    for text in texts:
        for licence, words in LICENSE_TEXTS.items():
            if re.search(words, text):
                return licence
    return "other" if texts else None


def _beginning(path: Path) -> str:
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return file.read(CARD_BYTES).decode(errors="replace")


def _front_matter(
    report: Report,
    licence: str | None,
    pipeline: str,
    *,
    library: str,
    relation: str,
    scores: Metrics | CurvePoint | None = None,
) -> str:
    results = [
        EvalResult(
            task_type=pipeline,
            dataset_type="private",
            dataset_name=f"{report.splits.test} {_kind(report)} of the job",
            metric_type=metric,
            metric_name=name,
            metric_value=round(value, 4),
        )
        for metric, name in METRICS.items()
        if (value := getattr(scores or report.adapted, metric)) is not None
    ]
    data = ModelCardData(
        base_model=report.model.id,
        base_model_relation=relation,
        library_name=library,
        pipeline_tag=pipeline,
        license=licence,
        tags=["compress-to-impress", "low-rank", *(["lora"] if relation == "adapter" else [])],
        model_name=report.model.id.rpartition("/")[2] + ("" if unchanged(report) else "-compressed-to-impress"),
        eval_results=results,
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _kind(report: Report) -> str:
    return "cross-validated examples" if report.splits.cross_validated else "test examples"


def _about(report: Report, licence: str | None) -> str:
    model, splits = report.model, report.splits
    selected = f"cross-fitted over {splits.folds} folds" if splits.folds else f"{splits.selection} to select on"
    tested = f"cross-validated on {splits.test}" if splits.cross_validated else f"tested on {splits.test} others"
    if not unchanged(report):
        done = (
            f"{report.removed.of(model.components)} of the model's "
            f"{model.target_modules} weights were removed, in {report.removed.modules} of them. Nothing was trained "
            "and nothing added."
        )
    else:
        done = "No removal was significantly better than the base model, so this is the base model, unchanged."
    return f"""# {model.id}, {"unchanged" if unchanged(report) else "compressed to impress"}

{done}

| | |
|---|---|
| base model | `{model.id}`, revision `{model.revision}` |
| task | {_task(report)} |
| examples | {splits.gradient} to rank by, {selected}, {tested} |
| strategy | `{report.strategy}`, {len(report.passes)} of at most {report.passes_requested} passes, objective \
`{report.objective.value}`, seed {report.seed} |
| licence | {_licence(licence)} |

## Results

{report.verdict}

{_results(report)}

{_curve(report)}
{size_table(report)}Intervals are 95 %. Of {splits.test} {_kind(report)} \
{report.gained} came right and {report.lost} went wrong.

{_plan(report)}## Side effects

{_side_effects(report)}
"""


def _about_point(report: Report, point: CurvePoint, licence: str | None) -> str:
    last = report.curve[-1]
    return f"""# {report.model.id}, compressed to impress: point {point.number} of {last.number}

A step on the way to {100 * last.parameters:.1f} % of the parameters of `{report.model.id}`, revision \
`{report.model.revision}`: here {100 * point.parameters:.1f} % are left. In this round {point.removed} went, and then \
components that harmed what was left. Nothing was trained and nothing added.

| | |
|---|---|
| task | {_task(report)} |
| licence | {_licence(licence)} |

## Results

{_curve(report)}"""


def _curve(report: Report) -> str:
    """Base and points of `compress`, on the test split."""
    if not report.curve:
        return ""
    columns, rows = filled(report)
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n\n"


def _task(report: Report) -> str:
    prompts = {
        PromptFormat.TEXT: "prompts are continued to the letter, as text",
        PromptFormat.CHAT: "prompts go through the tokenizer's chat template, as a user's message",
    }[report.prompt_format]
    labels = report.base.confusion
    if labels is None:
        return f"open answers; {prompts}"
    short = all(len(label) <= LONGEST_LABEL and label.isprintable() for label in labels)
    shared = all(sum(row.values()) > 1 for row in labels.values())
    if len(labels) > MOST_LABELS or not short or not shared:
        return f"one of several choices; {prompts}"
    named = ", ".join(f"`{json.dumps(label, ensure_ascii=False)}`" for label in sorted(labels)).replace("|", "\\|")
    return f"one of the choices {named}; {prompts}"


def _licence(licence: str | None) -> str:
    if licence is None:
        return "that of the base model, whose files name none"
    return f"that of the base model: {licence}" + (", see its LICENSE" if licence == "other" else "")


def _results(report: Report) -> str:
    lines = ["| | base | adapted | difference |", "|---|---|---|---|"]
    of = {found.metric: found for found in report.differences}
    for metric, name in [*METRICS.items(), ("loss", "loss, nats an example")]:
        if getattr(report.base, metric) is not None:
            found = of[metric]  # type: ignore[index]
            change = f"{found.value:+.3f} ({found.low:+.3f} to {found.high:+.3f})"
            lines.append(f"| {name} | {_score(report.base, metric)} | {_score(report.adapted, metric)} | {change} |")
    return "\n".join(lines)


def _score(metrics: Metrics, metric: str) -> str:
    interval = getattr(metrics, f"{metric}_interval", None)
    value = f"{getattr(metrics, metric):.3f}"
    return f"{value} ({interval[0]:.3f} to {interval[1]:.3f})" if interval else value


def _plan(report: Report) -> str:
    if not report.plan:
        return ""
    kinds = {module.module: module.kind for module in report.modules}
    lost: Counter[str] = Counter()
    touched: dict[str, set[str]] = {}
    for entry in report.plan:
        kind = kinds[entry.module]
        lost[kind] += len(entry.components)
        touched.setdefault(kind, set()).add(entry.module)
    lines = [f"| `{kind}` | {count:,} | {len(touched[kind])} |" for kind, count in lost.most_common()]
    table = "\n".join(["| weights | components removed | in so many blocks |", "|---|---|---|", *lines])
    return f"## What was removed\n\n{table}\n\nThe report lists every one.\n\n"


def _side_effects(report: Report) -> str:
    if unchanged(report):
        return "None: it is the base model."
    drift = "not finite" if report.drift.value is None else f"{report.drift.value:.3g} nats a token"
    return (
        f"The drift is {drift}: the mean Kullback-Leibler divergence from the base model's predictions of the next "
        f"token to this model's, over {report.drift.tokens:,} tokens that have nothing to do with the task. It was "
        "adapted to one task; nothing else was tested."
    )
