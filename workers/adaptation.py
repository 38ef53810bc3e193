"""One adaptation from top to bottom: load, decompose, search, verify, publish.

`adapt` is what a job runs and what `c2i adapt` runs. It writes `adapter/`, `model/` and, last, `report.json`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from service.errors import UnusableModel
from service.jobs import JobSpec, Stage
from service.models import Model
from service.reports import Report, SkippedModule, Verification
from workers.checkpoints import Checkpoint, load, reload_check, write_adapter, write_model
from workers.evaluation import Outcome, answer_logits, evaluate, honours_tree_mask
from workers.examples import LOGIT_BUDGET, TOKEN_BUDGET, TOKEN_BUDGET_CUDA, Encoded, Layout, batches, encode
from workers.progress import OnProgress, Progress
from workers.pruning import applied
from workers.ranking import Plan
from workers.reporting import Findings, make_report
from workers.search import Search, Subject
from workers.spectrum import Spectrum, SpectrumCache
from workers.splits import Splits, divide
from workers.targets import Target, find_targets
from workers.verdict import judge

# Examples whose logits are compared between what is in memory and what was written.
CHECKED_EXAMPLES = 8


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
    progress = Progress(spec.passes, on_progress)
    with progress.stage(Stage.LOADING, "loading the model"):
        base = load(model.folder)
        splits = _encode(spec, base, model.context_length)
        targets, skipped = find_targets(base.model)
        layout = layout_for(base, [*splits.pool, *splits.test])

    with progress.stage(Stage.DECOMPOSING, "decomposing the weights"):
        spectra = _decompose(targets, SpectrumCache(cache / "spectra"), progress)

    subject = Subject(base.model, targets, spectra, spec.objective, layout)
    search = Search(subject, splits.pool, splits.tracks, splits.result)
    search.run(spec.passes, progress.within_pass)
    if len(search.unreached) == len(targets):
        raise UnusableModel("no gradient reached any of the model's weights", param="model")

    with progress.stage(Stage.VERIFYING, "testing on unseen examples"):
        # Base, after the first pass, after the last: fewer where fewer passes were accepted.
        plans = search.plans
        shown = list(dict.fromkeys([0, min(1, len(plans) - 1), len(plans) - 1]))
        if splits.test:
            outcomes = [_test(subject, splits.test, plans[k]) for k in shown]
        else:
            outcomes = [search.outcomes[k] for k in shown]
        verdict = judge(outcomes[0], outcomes[-1], splits.sizes, spec.seed, removed=plans[-1].size)
        plan = plans[-1] if verdict.improved else Plan()

    with progress.stage(Stage.PUBLISHING, "writing the adapter and the model"):
        write_adapter(out / "adapter", spec.model, targets, spectra, plan)
        write_model(out / "model", base, targets, spectra, plan)
        verification = _verify(out, base, subject, plan, (splits.test or splits.pool)[:CHECKED_EXAMPLES])

    unreached = [SkippedModule(module=name, reason=reason) for name, reason in search.unreached.items()]
    report = make_report(
        spec,
        model,
        Findings(subject, splits, search, outcomes, verdict, plan, verification, [*skipped, *unreached]),
        progress.cost(search.clock, out),
    )
    (out / "report.json").write_text(report.model_dump_json(indent=2))
    return report


def _encode(spec: JobSpec, base: Checkpoint, context: int | None) -> Splits:
    examples, validation, test = (
        None
        if split is None
        else encode(split, base.tokenizer, prompt_format=spec.prompt_format, context=context, name=name)
        for name, split in (("examples", spec.examples), ("validation", spec.validation), ("test", spec.test))
    )
    return divide(examples or [], validation, test, spec.seed)


def layout_for(base: Checkpoint, encoded: Sequence[Encoded]) -> Layout:
    """How the model takes these examples: packed if it honours a tree mask on them, within the budgets."""
    head: torch.nn.Module = base.model.get_output_embeddings()  # type: ignore[operator]
    weight = head.get_parameter("weight")  # (vocabulary, hidden)
    return Layout(
        packed=honours_tree_mask(base.model, encoded),
        tokens=TOKEN_BUDGET_CUDA if weight.is_cuda else TOKEN_BUDGET,
        answers=max(1, LOGIT_BUDGET // weight.shape[0]),
    )


def _decompose(targets: Sequence[Target], cache: SpectrumCache, progress: Progress) -> dict[str, Spectrum]:
    spectra = {}
    for k, target in enumerate(targets):
        progress.tell(Stage.DECOMPOSING, k / len(targets), f"decomposing weight {k + 1} of {len(targets)}")
        spectra[target.name] = cache.get(target.weight)
    return spectra


def _test(subject: Subject, test: Sequence[Encoded], plan: Plan) -> Outcome:
    with applied(subject.targets, subject.spectra, plan):
        return evaluate(subject.model, test, subject.objective, subject.layout)


def _verify(out: Path, base: Checkpoint, subject: Subject, plan: Plan, examples: Sequence[Encoded]) -> Verification:
    batch = next(batches(examples, subject.layout)).to(next(base.model.parameters()).device)
    with applied(subject.targets, subject.spectra, plan), torch.no_grad():
        expected = answer_logits(base.model, batch)
    adapter, merged = reload_check(out, base, batch, expected)
    return Verification(adapter=adapter, model=merged)
