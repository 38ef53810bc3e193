"""Trying plans each of which contains the one before it: first on a few of the examples, the finalists on all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from workers.climbing import beginning, climb
from workers.evaluation import Outcome
from workers.jury import Jury
from workers.proposals import Growing, Proposal, Proposals, joined
from workers.trials import NEARLY, Trial

# Candidates are first judged on every fifth example, if that leaves this many, and at most so many on all. A plan of a
# whole list touches early blocks too, so that no outputs of blocks are kept to go on from.
STRIDE = 5
FEWEST_JUDGED = 20
FINALISTS = 5
# Where the second's gain on those is this part of the first's, every fifth of the others tells which is judged on all.
CLOSE = 0.9
# Of a round, told as progress: the part that plans of growing size take.
GROWING_SHARE = 0.6


class NestedRound:
    """The round of one pass."""

    def __init__(self, jury: Jury, current: Outcome, on_trial: Callable[[float, str], None]) -> None:
        """
        Args:
            current: the current model on all that judge.
            on_trial: told the fraction of the round that is done, and what comes.
        """
        self.jury = jury
        self.current = current
        self.on_trial = on_trial
        self.few = few(jury, current)
        self.rest = sorted(set(jury.rows) - set(self.few))
        self.refused: list[Proposal] = []
        """Plans of growing size that are over the bound, the least last."""

    def run(self, proposals: Proposals) -> list[Trial]:
        """Judge plans of growing size, and the best of them with single components beside."""
        trials: list[Trial] = []
        lists = len(proposals.lists)
        for k, growing in enumerate(proposals.lists):

            def on_size(fraction: float, message: str, k: int = k) -> None:
                self.on_trial(GROWING_SHARE * (k + fraction) / lists, message)

            best = self._best(trials)
            trials += self._grow(growing, best.proposal.size if best else None, on_size)
        contenders = list(trials)
        for single in proposals.singles:
            best = self._best(contenders)
            proposal = joined(single, best.proposal) if best else single
            self.on_trial(GROWING_SHARE, f"trying without {proposal.description}")
            for allowed in self.jury.allowed([proposal], []):
                trials.append(self.jury.trial(allowed, self.few))
                contenders.append(trials[-1])
                if best:  # one of two plans that differ by a component is enough to be judged on all examples
                    contenders.remove(min(trials[-1], best, key=self._gain))
        if self.rest:
            self.finish(contenders)
        return trials

    def finish(self, trials: Sequence[Trial]) -> None:
        """Judge those that gain most on a few examples on the others as well: the best of them, of two that are close
        the smaller if the larger is not clearly better, and others as long as none would be accepted. Where two have
        failed, it was by going too far on too few examples: the next is half as large. So is one that is tried in
        place of one that costs right answers."""
        gains = {id(trial): self._gain(trial) for trial in trials}  # a trial's own changes with what it is judged on
        left = sorted((t for t in trials if gains[id(t)] > 0), key=lambda t: -gains[id(t)])
        if len(left) > 1 and gains[id(left[1])] >= CLOSE * gains[id(left[0])]:
            for trial in left[:2]:
                self.jury.judge_more(trial, self.rest[::STRIDE])
            small, large = sorted(left[:2], key=lambda t: t.proposal.size)
            left[:2] = (large, small) if large.clearly_better(small, self.current) else (small, large)
        least = 0.0
        for k in range(FINALISTS):
            if not left:
                break
            trial = left.pop(0)
            done = GROWING_SHARE + (1 - GROWING_SHARE) * k / FINALISTS
            self.on_trial(done, f"judging {trial.proposal.description} on all examples")
            self.jury.judge_more(trial, self.rest)
            falls = trial.falls(self.current)
            if falls and not trial.suspect(self.current):
                break
            if falls:
                least = least or NEARLY * gains[id(trial)]
            if k or least:
                half = trial.proposal.size / 2
                left = [t for t in left if t.proposal.size <= half and gains[id(t)] >= least]

    def _grow(self, growing: Growing, earlier: int | None, on_size: Callable[[float, str], None]) -> list[Trial]:
        """Judge plans of growing size on a few examples, a little beyond the best. `earlier` is the best size of the
        list before."""
        grid = growing.candidates
        begin = beginning([proposal.size for proposal in grid], earlier) if grid else 0
        up: Iterable[Proposal] = grid[begin:]
        over: list[Proposal] = []
        if self.jury.bound is not None:
            up = self.jury.bound.within(grid[begin:], growing.of_size, self.jury.result_with, over)
        trials: list[Trial] = []

        def gain_of(proposal: Proposal) -> float:
            on_size(min(len(trials) / len(grid), 1.0), f"trying without {proposal.description}")
            trials.append(self.jury.trial(proposal, self.few))
            return self._gain(trials[-1])

        # The bound may have made the first of them smaller than some of the grid.
        smaller = (proposal for proposal in reversed(grid[:begin]) if proposal.size < trials[0].proposal.size)
        climb(up, self.jury.allowed(smaller, []), gain_of)
        self.refused += over
        return trials

    def _gain(self, trial: Trial) -> float:
        return trial.gain(self.current)

    def _best(self, trials: Sequence[Trial]) -> Trial | None:
        """The one that gains most, if any gains."""
        best = max(trials, key=self._gain, default=None)
        return best if best is not None and self._gain(best) > 0 else None


def few(jury: Jury, current: Outcome) -> list[int]:
    """Those of the judged examples that candidates are first judged on: evenly from all in the order of their
    answers, then of their loss, so that every label has its share. Of examples of one label a model that knows
    no other answer is the best."""
    step = max(1, min(STRIDE, len(jury.rows) // FEWEST_JUDGED))
    answers = [jury.pool[row].labels[jury.pool[row].gold] for row in jury.rows]
    often = Counter(answers)

    def place(k: int) -> tuple[str, float]:
        return answers[k] if often[answers[k]] > 1 else "", float(current.loss[k])

    ordered = sorted(range(len(jury.rows)), key=place)
    return sorted(jury.rows[k] for k in ordered[step // 2 :: step])
