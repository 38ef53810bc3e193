"""`report.json` from what an adaptation found."""

from __future__ import annotations

import importlib.metadata
import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from service.goals import Goal
from service.jobs import Drift, JobSpec, Removed
from service.models import Model
from service.reports import (
    ChangedExample,
    Cost,
    CurvePoint,
    Factored,
    ModelInfo,
    Outlook,
    PlanEntry,
    RemovedStructures,
    Report,
    Shipped,
    SkippedModule,
    TargetModule,
    Verification,
)
from workers.beside import Beside
from workers.branches import Branch, find_branches
from workers.cuts import useless
from workers.evaluation import Outcome, changes, differences, metrics
from workers.pruning import cleared
from workers.ranking import Plan
from workers.search import Search
from workers.splits import Splits
from workers.subject import Subject
from workers.targets import Target, find_targets
from workers.verdict import Verdict

PACKAGES = ("compress-to-impress", "torch", "transformers", "peft", "tokenizers", "safetensors", "numpy", "scipy")


@dataclass(frozen=True, eq=False)
class Tested:
    """A model on the test split, and its drift from the base."""

    outcome: Outcome
    drift: float


@dataclass(frozen=True, eq=False)
class Findings:
    """Everything that an adaptation knows at its end."""

    subject: Subject
    splits: Splits
    search: Search
    base: Tested
    first: Tested | None
    """After the first pass, if it was accepted."""
    last: Tested
    """What the search returned."""
    neutral_tokens: int
    """Positions that drifts are means over."""
    verdict: Verdict
    plan: Plan
    """What is returned: empty if that is the base."""
    shipped: Shipped
    factored: Factored | None
    verification: Verification
    rounding_loss: float | None
    skipped: list[SkippedModule]
    changed: list[ChangedExample]
    targets: Sequence[Target]
    """Those that could be touched."""
    curve: list[CurvePoint]
    """Of `compress`."""
    beside: Beside


def make_report(spec: JobSpec, model: Model, found: Findings, cost: Cost) -> Report:
    """The report of one adaptation."""
    tested = found.splits.test or [found.splits.pool[row] for row in found.search.jury.rows]
    base = found.base.outcome
    # JSON has no infinity, and a broken model no differences.
    first = found.first if found.first and not found.first.outcome.broken else None
    returned = found.last if found.verdict.returned else found.base
    entries = plan_entries(found.subject, found.plan)
    gained, lost = changes(base.right, returned.outcome.right)
    structures = _removed_structures(found.subject, found.plan)
    branches, _ = find_branches(found.subject.model, find_targets(found.subject.model)[0])
    modules = target_modules(found.targets, found.subject, found.plan)
    parameters = sum(p.numel() for p in found.subject.model.parameters())
    return Report(
        improved=found.verdict.improved,
        verdict=" ".join(filter(None, [found.verdict.sentence, _latency(spec, found), found.beside.sentence])),
        difference=found.verdict.difference,
        removed=_removed(found.subject, found.plan, structures, branches),
        drift=_drift(returned, found),
        model=ModelInfo(
            id=model.id,
            revision=model.revision,
            architecture=model.architecture,
            dtype=found.subject.dtype,
            parameters=parameters,
            target_modules=len(modules),
            components=sum(module.components for module in modules),
        ),
        goal=spec.goal,
        target=spec.target,
        strategy=spec.strategy,
        strategy_options=spec.options,
        objective=spec.objective,
        prompt_format=spec.prompt_format,
        seed=spec.seed,
        passes_requested=spec.passes,
        splits=found.splits.sizes,
        base=metrics(base, tested),
        after_first_pass=metrics(first.outcome, tested) if first else None,
        adapted=metrics(returned.outcome, tested),
        differences=found.verdict.differences,
        first_pass_differences=differences(base, first.outcome, spec.seed) if first else [],
        first_pass_drift=_drift(first, found) if first else None,
        max_drift=spec.max_drift,
        passes=found.search.passes,
        curve=found.curve,
        outlook=_outlook(spec, found.search),
        gained=gained,
        lost=lost,
        changed=found.changed,
        plan=entries,
        structures=structures,
        modules=modules,
        skipped_modules=found.skipped,
        factored=found.factored,
        shipped=found.shipped,
        verification=found.verification,
        rounding_loss=found.rounding_loss,
        quantized=found.beside.quantized,
        not_quantized=found.beside.not_quantized,
        gguf=found.beside.gguf,
        not_gguf=found.beside.not_gguf,
        speed=found.beside.speed,
        cost=cost,
        versions={name: importlib.metadata.version(name) for name in PACKAGES}
        | {"python": platform.python_version(), "platform": platform.platform()},
    )


def _latency(spec: JobSpec, found: Findings) -> str:
    """What came out of a latency that was aimed at, where speed was measured."""
    if spec.target is None or spec.target.measure != "decode_latency" or found.beside.speed is None:
        return ""
    base, model = (s.decode_tokens_per_second for s in (found.beside.speed.base, found.beside.speed.model))
    return f"A token takes {100 * base / model:.0f} % of the base's time." if base and model else ""


def _drift(tested: Tested, found: Findings) -> Drift:
    return Drift(value=tested.drift if math.isfinite(tested.drift) else None, tokens=found.neutral_tokens)


def _outlook(spec: JobSpec, search: Search) -> Outlook:
    last = search.passes[-1]
    seconds = sum(report.seconds for report in search.passes) / len(search.passes)
    falling = last.accepted and last.still_falling
    cost = f"about {seconds:.0f} s ({seconds / search.clock.fb:.1f} FB)"
    if spec.goal is Goal.COMPRESS:
        message = f"A round of this size would cost {cost}; more rounds take smaller steps to the same target."
        return Outlook(still_falling=False, next_pass_seconds=seconds, message=message)
    if last.withdrawn:
        message = (
            f"Pass {last.number} lowered the loss and is not returned: fewer answers of the selection split were right "
            f"than the base's. Another pass may mend that, and would cost {cost}."
        )
    elif not last.accepted:
        message = f"Pass {last.number} was not accepted: {last.reason}. More passes would not help."
    elif not falling:
        message = f"Pass {last.number} lowered the selection loss by little; another would cost {cost}."
    elif spec.passes < 8:
        message = f"The selection loss was still falling after pass {last.number}; another pass would cost {cost}."
    else:
        message = f"The selection loss was still falling after pass {last.number}, the last that can be asked for."
    return Outlook(still_falling=falling, next_pass_seconds=seconds, message=message)


def target_modules(targets: Sequence[Target], subject: Subject, plan: Plan) -> list[TargetModule]:
    """Each module once, with the components of all its row blocks; of one that is ranked as a whole and has lost some
    in row blocks, those of these blocks."""
    ranked = {target.name for target in targets}
    blocks = [t for t in subject.targets if plan.components.get(t.name) and t.name not in ranked]
    divided = {target.module_name for target in blocks}
    sizes = dict.fromkeys((target.module_name for target in targets), 0)  # in the order of the model
    for target in [*(t for t in targets if t.module_name not in divided), *blocks]:
        sizes[target.module_name] += min(target.shape)
    by_name = {target.module_name: target for target in targets}
    return [
        TargetModule(module=name, layer=by_name[name].layer, kind=by_name[name].kind, components=size)
        for name, size in sizes.items()
    ]


def _removed(
    subject: Subject, plan: Plan, structures: Sequence[RemovedStructures], branches: Sequence[Branch]
) -> Removed:
    modules = {target.module_name for target in subject.targets if plan.components.get(target.name)}
    modules |= {target.module_name for _, _, target in cleared(plan, subject.units)}
    return Removed(
        components=sum(map(len, plan.components.values())),
        modules=len(modules),
        structures=sum(len(entry.indices) for entry in structures),
        parameters=useless(plan, subject.units, branches),
    )


def _removed_structures(subject: Subject, plan: Plan) -> list[RemovedStructures]:
    return [
        RemovedStructures(
            kind=unit.kind,
            unit=unit.place,
            layer=unit.layer,
            indices=list(indices),
            count=unit.count,
            parameters=int(unit.sizes[list(indices)].sum()),
        )
        for unit in subject.units
        if (indices := plan.structures.get(unit.name))
    ]


def plan_entries(subject: Subject, plan: Plan) -> list[PlanEntry]:
    """What a plan removes of each weight, or of each of its row blocks."""
    entries = []
    for target in subject.targets:
        components = plan.components.get(target.name)
        if components:
            S = subject.spectra[target.name].S.double()
            removed = torch.linalg.vector_norm(S[list(components)])
            whole = torch.linalg.vector_norm(target.whole_weight, dtype=torch.float64)
            entries.append(
                PlanEntry(
                    module=target.module_name,
                    rows=target.rows.label if target.rows else None,
                    shape=target.shape,
                    components=list(components),
                    relative_norm=float(removed / whole.to(removed.device)),
                )
            )
    return entries
