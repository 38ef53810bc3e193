"""One adaptation from top to bottom: load, decompose, search, verify, publish.

`adapt` is what a job runs and what `c2i adapt` runs. It writes `adapter/`, `model/`, their
model cards, `report.html` and, last, `report.json`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from service import decomposed, report_page
from service.errors import InvalidInput, UnusableModel
from service.goals import Goal
from service.jobs import Example, JobSpec, PromptFormat, Quantize, Stage
from service.masks import check_masks
from service.models import Model, check_unchanged
from service.reports import ChangedExample, Factored, Report, Shipped, SkippedModule, Verification
from service.strategies import ComponentsOptions
from service.tokenizer_files import working_tokenizer
from workers import masked
from workers.beside import check_beside, ship_beside
from workers.bounds import DriftBound
from workers.changed import changed_examples
from workers.checkpoints import model_check, reload_check, write_adapter, write_model
from workers.compressing import make_chooser
from workers.drift import NeutralText, encode_neutral, paragraphs
from workers.evaluation import Outcome, answer_logits, evaluate, honours_tree_mask
from workers.examples import (
    LOGIT_BUDGET,
    PADDING_BUDGET,
    PADDING_BUDGET_CUDA,
    TOKEN_BUDGET,
    TOKEN_BUDGET_CUDA,
    Batch,
    Encoded,
    Layout,
    batches,
    encode,
)
from workers.factoring import add_factored
from workers.footprint import Footprint
from workers.latency import Latency
from workers.loading import Checkpoint, load
from workers.model_card import write_cards
from workers.points import curve, places
from workers.progress import OnProgress, Progress
from workers.quantizing import INT4_COLUMNS
from workers.ranking import Plan
from workers.reporting import Findings, Tested, make_report
from workers.rounding import applied_unrounded
from workers.rounds import Aim, Rounds, check_compressed
from workers.search import Search, check_finite
from workers.spectrum import Spectrum, SpectrumCache
from workers.speed import weight_bytes
from workers.splits import Splits, divide
from workers.strategies import dictionary, make_search, structures
from workers.structures import Unit
from workers.subject import Subject
from workers.targets import Target, find_targets
from workers.verdict import Verdict, judge, judge_compressed

# Examples whose logits are compared between what is in memory and what was written.
CHECKED_EXAMPLES = 8
# Examples that the cost of rounding is measured on.
ROUNDED_EXAMPLES = 100


def adapt(spec: JobSpec, model: Model, out: Path, *, cache: Path, on_progress: OnProgress) -> Report:
    """Adapt a model to examples and prove what it gained.

    Args:
        model: an installed model that `service.models.resolve` has checked.
        out: an existing folder that the artifacts are written to.
        cache: the folder of cached decompositions, shared with other jobs.

    Returns:
        The report, as it stands in `out/report.json`.

    Raises:
        C2IError: for what its user can act on.
    """
    check_masks(model, spec)
    compressing = spec.goal is Goal.COMPRESS
    progress = Progress(Rounds.steps(spec.passes) if compressing else spec.passes, on_progress)
    with progress.stage(Stage.LOADING, "loading the model"):
        base = load(model.folder)
        check_unchanged(model)
        splits = _encode(spec, base, model.context_length)
        modules, skipped = find_targets(base.model)
        targets = dictionary(modules, spec.options)
        units, without = structures(base.model, modules, spec.options)
        layout = layout_for(base, [*splits.pool, *splits.test])
        check_beside(spec, base)
        aim, size = _aim(spec, model, base, modules, units, out)

    with progress.stage(Stage.DECOMPOSING, "decomposing the weights"):
        spectra_cache = SpectrumCache(cache / decomposed.SPECTRA)
        spectra = _decompose(targets if spec.decomposes else [], spectra_cache, progress)
        if spectra:
            decomposed.note(cache, model.revision, spectra_cache.used)

    subject = Subject(base.model, targets, spectra, spec.objective, layout, spectra_cache.get, units)
    neutral = NeutralText(
        subject, encode_neutral(paragraphs(), base.tokenizer, model.context_length), masked=base.masked
    )
    search = make_search(
        subject,
        splits.pool,
        splits.tracks,
        splits.result,
        ComponentsOptions() if aim else spec.options,
        spec.seed,
    )
    if spec.max_drift is not None:
        search.jury.bound = DriftBound(lambda plan: neutral.drift(plan, search.subject), spec.max_drift)
    rounds = Rounds(search, aim, size) if aim else None
    (rounds or search).run(spec.passes, progress.within_pass)
    subject = search.subject
    # A strategy may select on the examples that it ranks by.
    splits = replace(splits, sizes=splits.sizes.model_copy(update={"selection": len(search.jury.rows)}))
    if len(search.unreached) == len(spectra) + len(units):
        raise UnusableModel("no gradient reached any of the model's weights", param="model")

    testing = "testing on unseen examples" if splits.test else "the cross-validated estimate"
    with progress.stage(Stage.VERIFYING, testing):
        last = len(search.plans) - 1 if rounds else search.result_after(spec.passes)
        wanted = range(last + 1) if rounds else {0, min(1, len(search.plans) - 1), last}
        tested = {k: _tested(subject, splits, search, neutral, k) for k in wanted}
        check_finite(tested[0].outcome, subject.dtype)
        verdict = _judge(spec, splits, tested[0].outcome, tested[last].outcome, removed=search.plans[last].size)
        plan = search.plans[last] if verdict.returned else Plan()
        changed = _changed(subject, base, splits, search, tested, last) if verdict.returned else []
        rounding_loss = _rounding_loss(subject, plan, (splits.test or splits.pool)[:ROUNDED_EXAMPLES])

    with progress.stage(Stage.PUBLISHING, "writing the adapter and the model"):
        verification, shipped, factored = _publish(out, spec, base, search, plan, splits)
        points = curve(rounds, {k: tested[k].outcome for k in tested}, out, model.folder) if rounds else []
        check_unchanged(model)
        beside = ship_beside(spec, model.folder, out, subject, plan, splits, points, progress)
        if rounds:
            verdict = verdict.opened_by(rounds.left(shipped, beside.quantized))

    report = make_report(
        spec,
        model,
        Findings(
            subject,
            splits,
            search,
            tested[0],
            tested.get(1),
            tested[last],
            neutral.tokens,
            verdict,
            plan,
            shipped,
            factored,
            verification,
            rounding_loss,
            [*skipped, *without, *_unreached(search, targets)],
            changed,
            targets,
            beside.curve,
            beside,
        ),
        progress.cost(search.clock, out),
    )
    _write_report(out, report, model.folder, masked=base.masked)
    return report


def _judge(spec: JobSpec, splits: Splits, base: Outcome, adapted: Outcome, *, removed: int) -> Verdict:
    if spec.goal is Goal.IMPROVE:
        bounded = spec.max_drift is not None
        return judge(base, adapted, splits.sizes, spec.seed, removed=removed, bounded=bounded)
    check_compressed(adapted)
    return judge_compressed(base, adapted, splits.sizes, spec.seed)


def _write_report(out: Path, report: Report, base: Path, *, masked: bool) -> None:
    write_cards(out, report, base, masked=masked)
    (out / "report.html").write_text(report_page.render(report))
    (out / "report.json").write_text(report.model_dump_json(indent=2))


def _aim(
    spec: JobSpec, model: Model, base: Checkpoint, modules: Sequence[Target], units: Sequence[Unit], out: Path
) -> tuple[Aim | None, float]:
    """What `compress` is to reach, and the size of its last round.

    Raises:
        InvalidInput: it cannot be reached.
    """
    if spec.target is None:
        return None, 1.0
    files = {"parameters": model.parameters, "bytes": weight_bytes(model.folder)}
    footprint = Footprint.of(base, units, **files, quantize=spec.quantize)
    timed = spec.target.measure == "decode_latency"
    latency = Latency(base, modules, units, footprint, out / "probe") if timed else None
    multiple = INT4_COLUMNS if spec.quantize is Quantize.INT4 else 1
    aim = Aim(make_chooser(spec.options, units, multiple), footprint, spec.target, latency)
    return aim, aim.size()


def _publish(
    out: Path, spec: JobSpec, base: Checkpoint, search: Search, plan: Plan, splits: Splits
) -> tuple[Verification, Shipped, Factored | None]:
    """Write what is returned, and read it back: an adapter and a model, or the model of every round."""
    subject, examples = search.subject, (splits.test or splits.pool)[:CHECKED_EXAMPLES]
    if spec.goal is Goal.IMPROVE:
        taken = (subject.targets, subject.spectra, plan, subject.units)
        write_adapter(out / "adapter", spec.model, *taken, masked=base.masked)
        shipped = write_model(out / "model", base, *taken)
        factored = None if shipped.gone else add_factored(out, base, *taken)
        adapter, merged = reload_check(out, base, *_checking(base, subject, plan, examples))
        return Verification(adapter=adapter, model=merged), shipped, factored
    largest = 0.0
    for place in places(len(search.plans) - 1):
        own, folder = search.plans[place.number], out / place.folder
        shipped = write_model(folder / "model", base, subject.targets, subject.spectra, own, subject.units)
        largest = max(largest, model_check(folder, base, *_checking(base, subject, own, examples)))
    return Verification(adapter=None, model=largest), shipped, None


def _encode(spec: JobSpec, base: Checkpoint, context: int | None) -> Splits:
    examples, validation, test = (
        None if split is None else encode_for(base, split, prompt_format=spec.prompt_format, context=context, name=name)
        for name, split in (("examples", spec.examples), ("validation", spec.validation), ("test", spec.test))
    )
    return divide(examples or [], validation, test, spec.seed)


def encode_for(
    base: Checkpoint, examples: Sequence[Example], *, prompt_format: PromptFormat, context: int | None, name: str
) -> list[Encoded]:
    """Tokenise examples as the model takes them: the completion behind the prompt, or at its mask."""
    encode_split = masked.encode if base.masked else encode
    with working_tokenizer():
        encoded = encode_split(examples, base.tokenizer, prompt_format=prompt_format, context=context, name=name)
    for i, one in enumerate(encoded):
        largest = max(*one.prompt, *(token for tokens in one.continuations for token in tokens))
        if largest >= base.vocabulary:
            raise InvalidInput(
                f"the tokenizer makes token {largest:,} of it, and the model's embedding has {base.vocabulary:,} rows",
                param=f"{name}[{i}].prompt",
            )
    return encoded


def layout_for(base: Checkpoint, encoded: Sequence[Encoded]) -> Layout:
    """How the model takes these examples: packed if it honours a tree mask on them, within the budgets."""
    head: torch.nn.Module = base.model.get_output_embeddings()  # type: ignore[operator]
    weight = head.get_parameter("weight")  # (vocabulary, hidden)
    return Layout(
        packed=honours_tree_mask(base.model, encoded),
        tokens=TOKEN_BUDGET_CUDA if weight.is_cuda else TOKEN_BUDGET,
        padding=PADDING_BUDGET_CUDA if weight.is_cuda else PADDING_BUDGET,
        answers=max(1, LOGIT_BUDGET // weight.shape[0]),
    )


def _decompose(targets: Sequence[Target], cache: SpectrumCache, progress: Progress) -> dict[str, Spectrum]:
    spectra = {}
    for k, target in enumerate(targets):
        progress.tell(Stage.DECOMPOSING, k / len(targets), f"decomposing weight {k + 1} of {len(targets)}")
        spectra[target.name] = cache.get(target.weight)
    return spectra


def _unreached(search: Search, targets: Sequence[Target]) -> list[SkippedModule]:
    """What no gradient reached."""
    at = {target.name: target.module_name for target in targets} | {u.name: u.place for u in search.subject.units}
    reasons = {at[name]: reason for name, reason in search.unreached.items()}
    return [SkippedModule(module=name, reason=reason) for name, reason in reasons.items()]


def _tested(subject: Subject, splits: Splits, search: Search, neutral: NeutralText, k: int) -> Tested:
    """One of the search's plans on the test split, or as it was judged where there is none."""
    outcome = _test(subject, splits.test, search.plans[k]) if splits.test else search.outcomes[k]
    return Tested(outcome, neutral.drift(search.plans[k], subject))


def _test(subject: Subject, test: Sequence[Encoded], plan: Plan) -> Outcome:
    with subject.without(plan):
        return evaluate(subject.model, test, subject.objective, subject.layout)


def _changed(
    subject: Subject, base: Checkpoint, splits: Splits, search: Search, tested: Mapping[int, Tested], last: int
) -> list[ChangedExample]:
    """Some examples that the returned model answers otherwise than the base; cross-validated ones under the plan
    that they were judged by."""
    plan = search.plans[last]
    if splits.test:
        examples, plans = splits.test, [plan] * len(splits.test)
    else:
        examples = [splits.pool[row] for row in search.jury.rows]
        plans = [search.judging_plan(last, row) for row in search.jury.rows]
    return changed_examples(subject, base.tokenizer, examples, plans, tested[0].outcome, tested[last].outcome)


def _rounding_loss(subject: Subject, plan: Plan, examples: Sequence[Encoded]) -> float | None:
    """By how much the mean loss is higher for the plan's weights being rounded to 16 bits; None for wider models."""
    if next(subject.model.parameters()).dtype.itemsize > 2:
        return None
    if not plan.size:
        return 0.0
    shipped = _test(subject, examples, plan)
    with applied_unrounded(subject.targets, subject.spectra, plan, subject.units):
        unrounded = evaluate(subject.model, examples, subject.objective, subject.layout)
    return float(shipped.loss.mean() - unrounded.loss.mean())


def _checking(base: Checkpoint, subject: Subject, plan: Plan, examples: Sequence[Encoded]) -> tuple[Batch, Tensor]:
    """A batch, and (Q, vocabulary) its logits without what the plan removes."""
    layout = subject.layout
    held = replace(layout, tokens=layout.limits.get("forward", layout.tokens))
    batch = next(batches(examples, held)).to(next(base.model.parameters()).device)
    with subject.without(plan), torch.no_grad():
        return batch, answer_logits(base.model, batch)
