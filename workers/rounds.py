"""`compress`: down to a target in rounds, each of which gives a model smaller than the one before.

A round takes the effects of all structures, removes what `workers.compressing` chooses until the round's size is
reached, and then makes a pass of `components` on what is left, in the last round as many as help: removing components
mends what removing structures hurt. Sizes are spread evenly: round r of P leaves 1 - (1 - target) r / P.

Structures are chosen on a model that does the task: the first round begins with a pass of components, and its and every
round's components are put back only when the choice is made. Of a base model that does not know what is asked of it the
loss falls where layers go that change what it says at all, and those are not the ones that the task can do without.
Components are chosen afresh each round: those of another model are stale.

Every track of the search (`workers.search`) chooses for itself, on examples that it is not judged by: on the selection
split where there is one, else on those of the other folds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from service.errors import InternalError, InvalidInput
from service.goals import Measure, Target
from service.jobs import Stage
from service.reports import Candidate, PassReport, Quantized, Shipped
from workers.compressing import NOUNS, Chooser
from workers.evaluation import Outcome
from workers.footprint import Footprint, gone_layers, tidied
from workers.gradients import Effects
from workers.latency import Latency, probe
from workers.prefixes import Prefixes
from workers.proposals import plural
from workers.ranking import Plan
from workers.search import OnStep, Search
from workers.structures import Kind, Unit
from workers.subject import Track

# Passes of components in the last round, if each of them helps: as many as a job that improves may make.
LAST_PASSES = 8
# Choices are made on every second example, where so many are left.
STRIDE = 2
FEWEST_CHOSEN_ON = 40
# Fractions are sums of floats.
CLOSE = 1e-9
# Of the progress of a choice: when it is half way.
USUALLY_TRIED = 16


@dataclass(frozen=True, eq=False)
class Aim:
    """A target for one model, and how it is reached."""

    chooser: Chooser
    footprint: Footprint
    target: Target
    latency: Latency | None = None
    """Of a target that is one."""

    @property
    def counted(self) -> Measure:
        """What sizes of rounds are fractions of."""
        return "bytes" if self.target.measure == "bytes" else "parameters"

    def left(self, plan: Plan) -> float:
        """How much of the base a plan leaves, in what is counted."""
        return self.footprint.fraction(plan, self.counted)

    def fits(self, plan: Plan, size: float) -> bool:
        """Whether a plan leaves no more than that."""
        return self.left(plan) <= size + CLOSE

    def size(self, gone: Plan | None = None) -> float:
        """Of the last round.

        Args:
            gone: what has gone by now, where a latency is to be measured with that.

        Raises:
            InvalidInput: it cannot be reached; with what can be.
        """
        wanted = self.target.fraction
        most = min(self.chooser.most(), key=self.left)
        least = self.left(most)
        if self.latency:
            return self.latency.size_for(wanted, gone or probe(most), least)
        if least > wanted:
            raise InvalidInput(
                f"with this model and strategy {self.counted} can fall to {_rounded_up(least)} of the base's, not to "
                f"{wanted:g}",
                param="target",
            )
        return wanted


class Rounds:
    """The way to an aim."""

    def __init__(self, search: Search, aim: Aim, size: float) -> None:
        """
        Args:
            search: of components; its subject has the structures.
            size: of the last round.
        """
        self.search, self.aim, self.size = search, aim, size
        self.chooser, self.footprint = aim.chooser, aim.footprint
        self.descriptions: list[str] = []
        """What each round removed, in words."""
        search.ranked_units = ()

    def run(self, rounds: int, on_step: OnStep) -> None:
        """All rounds; `search.plans` then holds the base's plan and each round's.

        Args:
            on_step: told `steps(rounds)` passes.
        """
        search = self.search
        search.begin()
        search.one_pass(1, search.outcomes[0], _as_pass(1, on_step))
        start = max(self.size, self.aim.left(Plan()))  # under 1 where it is to be quantized
        for number in range(1, rounds + 1):
            last = number == rounds
            if self.aim.latency and last and rounds > 1:
                # Measured once it could be reached: noise, or a measurement that fails, ends no work that is done.
                with suppress(InvalidInput, InternalError):
                    self.size = self.aim.size(search.plans[-1])
            size = start - (start - self.size) * number / rounds
            before, plan_before = search.outcomes[-1], Plan(structures=search.plans[-1].structures)
            if not last and self._fit(size):
                continue  # a layer was more than one round's part
            began = search.clock.now()
            tried = self._remove(number, size, _as_pass(2 * number, on_step))
            self.descriptions.append(removed(plan_before, search.result.plan, self.footprint.units))
            for track in search.all_tracks:
                track.plan = Plan(structures=track.plan.structures)
            smaller = search.judge()
            check_compressed(smaller)
            last |= self.aim.latency is None and self._fit(self.size)
            reports, outcome = self._mend(number, LAST_PASSES if last else 1, smaller, on_step)
            told = f"removed {self.descriptions[-1]}: loss {before.loss.mean():.3f} to {smaller.loss.mean():.3f}"
            search.passes.append(
                reports[0].model_copy(
                    update={
                        "base_loss": float(before.loss.mean()),
                        "candidates": [*tried, *(c for report in reports for c in report.candidates)],
                        "chosen": search.result.plan.size - plan_before.size,
                        "loss": float(outcome.loss.mean()),
                        "accepted": True,
                        "reason": "; ".join([told, *(report.reason for report in reports)]),
                        "still_falling": reports[-1].accepted and reports[-1].still_falling,
                        "seconds": search.clock.now() - began,
                    }
                )
            )
            search.keep(outcome)
            if last:
                break

    def _fit(self, size: float) -> bool:
        """Whether every track's plan is down to a size."""
        return all(self.aim.fits(track.plan, size) for track in self.search.all_tracks)

    @staticmethod
    def steps(rounds: int) -> int:
        """How many passes are told at most: one before the first round, in each one that removes structures and one
        that removes components, and more of these in the last."""
        return 2 * rounds + LAST_PASSES

    def _mend(self, number: int, passes: int, current: Outcome, on_step: OnStep) -> tuple[list[PassReport], Outcome]:
        """Passes of components, up to one that is not accepted."""
        reports: list[PassReport] = []
        for k in range(passes):
            report, current = self.search.one_pass(number + k, current, _as_pass(2 * number + 1 + k, on_step))
            reports.append(report)
            if not report.accepted:
                break
        return reports, current

    def left(self, shipped: Shipped, quantized: Quantized | None) -> str:
        """How much of the base is left of what was written, in words: `79.9 % of the base's parameters`.

        Args:
            shipped: the model of the last round.
            quantized: its form in fewer bits, where there is one.
        """
        if self.aim.counted == "parameters":
            part, what = self.parameters(self.search.plans[-1], shipped), "parameters"
        elif quantized:
            part, what = quantized.fraction, f"bytes, in {quantized.bits}"
        else:
            part, what = shipped.bytes / self.footprint.bytes, "bytes"
        zeros = ", the others as zeros in files as large" if self.footprint.tiled else ""
        return f"{100 * part:.1f} % of the base's {what}{zeros}"

    def parameters(self, plan: Plan, shipped: Shipped) -> float:
        """Those left, as a fraction of the base's: of the model that was written, but of tiles, which are zeros in any
        file."""
        footprint = self.footprint
        return footprint.fraction(plan) if footprint.tiled else shipped.parameters / footprint.parameters

    def _remove(self, number: int, size: float, on_step: OnStep) -> list[Candidate]:
        """Have every track choose; what was tried for the result."""
        search = self.search
        tried: list[Candidate] = []
        for track, effects in self._effects(number, on_step):
            started = search.clock.now()
            ground = _Ground(self, track, effects, size, partial(on_step, Stage.SEARCHING, number))
            plan = self.chooser.choose(ground)
            if plan is None:
                raise InternalError(f"round {number} of the strategy cannot reach its size")
            track.plan = tidied(plan, search.subject.targets, self.footprint.units)
            tried = ground.tried
            search.clock.searching += search.clock.now() - started
        return tried

    def _effects(self, number: int, on_step: OnStep) -> Iterator[tuple[Track, Mapping[str, Tensor]]]:
        """Of the structures, for each track on the examples that it is fitted on; the result's last."""
        tracks = self.search.all_tracks
        on_batch = partial(on_step, Stage.BACKWARD, number, message=f"round {number}: backward")
        shared: tuple[Sequence[int], Effects] | None = None
        if all(track.plan == tracks[0].plan for track in tracks):
            everything = sorted({row for track in tracks for row in track.fit})
            shared = everything, self._backward(everything, tracks[0].plan, on_batch)
        for track in tracks:
            rows, found = shared or (track.fit, self._backward(track.fit, track.plan, on_batch))
            at = {row: k for k, row in enumerate(rows)}
            mine = [at[row] for row in track.fit]
            yield track, {name: effect[mine] for name, effect in found.by_module.items()}

    def _backward(self, rows: Sequence[int], plan: Plan, on_batch: Callable[[float], None]) -> Effects:
        return self.search.backward(rows, plan, on_batch, targets=(), units=self.search.subject.units)


class _Ground:
    """What one track chooses on."""

    def __init__(
        self,
        rounds: Rounds,
        track: Track,
        effects: Mapping[str, Tensor],
        size: float,
        on_trial: Callable[[float, str], None],
    ) -> None:
        self.plan, self.effects = track.plan, effects
        self._rounds, self._size, self._on_trial = rounds, size, on_trial
        search = rounds.search
        seen = track.judge if len(search.all_tracks) == 1 else track.fit
        rows = seen[:: max(1, min(STRIDE, len(seen) // FEWEST_CHOSEN_ON))]
        self._subject = search.subject
        self._prefixes = Prefixes(self._subject.model, [search.pool[row] for row in rows], self._subject.layout)
        self.tried: list[Candidate] = []
        self._before = self._record(self.plan)

    def left(self, plan: Plan) -> float:
        """How much of the base a plan leaves, in what the target counts."""
        return self._rounds.aim.left(plan)

    def fits(self, plan: Plan) -> bool:
        """Whether a plan is down to the round's size."""
        return self._rounds.aim.fits(plan, self._size)

    def go_on(self, plan: Plan) -> None:
        """Further plans contain this one."""
        if not self.fits(plan):
            self._record(plan)

    def _record(self, plan: Plan) -> Outcome:
        self._recorded = plan
        with self._subject.without(plan):
            return self._prefixes.record(self._subject.objective)

    def loss(self, plan: Plan, description: str) -> float:
        """Mean loss of the model without a plan, on some of the examples that the track may see."""
        self._on_trial(1 - 1 / (1 + len(self.tried) / USUALLY_TRIED), f"trying without {description}")
        started = time.perf_counter()
        now, then = plan.removed, self._recorded.removed
        changed = [name for name in {*now, *then} if now.get(name) != then.get(name)]
        with self._subject.without(plan):
            outcome = self._prefixes.evaluate(self._subject.objective, self._prefixes.first_block(changed))
        loss = float(outcome.loss.mean())
        self.tried.append(
            Candidate(
                description=description,
                size=plan.size - self.plan.size,
                examples=len(outcome.loss),
                base_loss=float(self._before.loss.mean()),
                predicted_loss=None,
                loss=loss if math.isfinite(loss) else None,
                accuracy=outcome.accuracy,
                exact_match=float(outcome.exact.mean()),
                seconds=time.perf_counter() - started,
            )
        )
        return loss if math.isfinite(loss) else math.inf


def check_compressed(outcome: Outcome) -> None:
    """Raises InvalidInput where a model is so small that some losses are no numbers any more."""
    if outcome.broken:
        raise InvalidInput(
            f"at this size the model has no finite loss on {outcome.broken} of {len(outcome.loss)} examples; ask for "
            "a larger one",
            param="target",
        )


def removed(before: Plan, after: Plan, units: Sequence[Unit]) -> str:
    """What one plan removes of structures beyond another, in words: `layers 3 and 7`, `64 neurons of each of 28
    layers`."""
    layers = sorted(gone_layers(after, units) - gone_layers(before, units))
    words = [f"{'layer' if len(layers) == 1 else 'layers'} {_listed(layers)}"] if layers else []
    counts: dict[str, list[int]] = {}
    for unit in units:
        new = len(after.structures.get(unit.name, ())) - len(before.structures.get(unit.name, ()))
        if new > 0 and unit.kind != Kind.LAYERS:
            counts.setdefault(unit.kind, []).append(new)
    for kind, each in counts.items():
        if kind in NOUNS:
            words.append(f"{plural(each[0], NOUNS[kind])} of each of {plural(len(each), 'layer')}")
        else:
            words.append(plural(sum(each), "tile"))
    return " and ".join(words) or "nothing"


def _listed(numbers: Sequence[int]) -> str:
    *first, last = map(str, numbers)
    return f"{', '.join(first)} and {last}" if first else last


def _as_pass(as_number: int, on_step: OnStep) -> OnStep:
    """Tell the steps as those of another pass."""

    def told(stage: Stage, number: int, fraction: float, message: str) -> None:
        on_step(stage, as_number, fraction, message)

    return told


def _rounded_up(fraction: float) -> str:
    """To three digits, so that asking for it works."""
    return f"{math.ceil(fraction * 1000) / 1000:g}"
