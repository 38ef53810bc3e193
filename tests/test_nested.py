"""Which plans of a growing list are tried on how many examples, and which of them is judged on all."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from service.jobs import Objective
from tests.plain import encoded, loaded, targets_of
from tests.planted import SPOILER, Planted
from workers.evaluation import Outcome
from workers.examples import Encoded, Layout
from workers.jury import Jury
from workers.nested import NestedRound, few
from workers.progress import Clock
from workers.proposals import Proposal
from workers.ranking import Plan
from workers.subject import Subject, Track
from workers.trials import Trial, choose_by_loss

pytestmark = pytest.mark.usefixtures("one_thread")

# Of plans by their sizes: by how much they lower the loss.
GAINS = {8: 3.0, 6: 2.6, 4: 2.5, 2: 2.45, 1: 1.0}


def jury(planted: Planted, pool: Sequence[Encoded], fit: list[int], judge: list[int]) -> Jury:
    targets, spectra = targets_of(planted.folder)
    subject = Subject(loaded(planted.folder).model, targets, spectra, Objective.BOTH, Layout(packed=True))
    track = Track(fit, judge)
    return Jury(subject, pool, [track], track, Clock(), by_prefix=False)


def round_of(judges: Jury, few: list[int]) -> NestedRound:
    """A round that judges candidates on these rows first."""
    found = NestedRound(judges, judges.outcome([Plan()], judges.rows), lambda *step: None)
    found.few, found.rest = few, [row for row in judges.rows if row not in few]
    return found


def trial(planted: Planted, found: NestedRound, size: int) -> Trial:
    plan = Plan({planted.module: tuple(range(size))})
    return found.jury.trial(Proposal(f"{size} components", size, None, lambda track: plan), found.few)


def test_the_few_examples_have_every_label_s_share_and_both_ends_of_the_loss(planted: Planted) -> None:
    # Sorted by label, as files often are, so that every fifth example of the file may be of one label.
    examples = sorted(planted.examples[:100], key=lambda example: example.completion)
    pool = encoded(planted.folder, [*planted.examples[:8], *examples])
    judges = jury(planted, pool, list(range(8)), list(range(8, 108)))
    loss = np.random.default_rng(1).permutation(100.0 + np.arange(100))
    found = few(judges, Outcome(loss, loss, loss, loss))
    assert len(found) == 20
    labels = [pool[row].labels[pool[row].gold] for row in range(8, 108)]
    for label in set(labels):
        mine = [row for row in found if labels[row - 8] == label]
        assert abs(len(mine) - labels.count(label) / 5) <= 1
        own = sorted(loss[k] for k in range(100) if labels[k] == label)
        third = len(own) // 3
        assert min(loss[row - 8] for row in mine) < own[third]
        assert max(loss[row - 8] for row in mine) > own[-third]


def test_what_fails_on_all_examples_is_followed_by_what_is_half_as_large(planted: Planted) -> None:
    # On the few the planted component spoils the answer; on the others it is the answer.
    wrong = [example.model_copy(update={"completion": SPOILER}) for example in planted.examples[72:]]
    pool = encoded(planted.folder, [*planted.examples[:72], *wrong])
    judges = jury(planted, pool, list(range(60)), list(range(60, 120)))
    found = round_of(judges, list(range(60, 72)))
    current = found.current
    trials = [trial(planted, found, size) for size in (1, 2, 3, 4, 6, 8, 12)]
    first, second, *others = sorted(trials, key=lambda trial: -trial.gain(current))
    assert others[-1].gain(current) > 0
    found.finish(trials)
    assert first.complete
    assert second.complete
    tried: list[Trial] = []
    most = second.proposal.size / 2
    for other in others:
        if other.proposal.size <= most and len(tried) < 3:
            tried.append(other)
            most = other.proposal.size / 2
    assert [t for t in others if t.complete] == tried
    assert len(tried) < len(others)


def test_the_smaller_of_two_close_ones_is_judged_on_all_unless_the_larger_is_clearly_better(
    planted: Planted, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = encoded(planted.folder, planted.examples[:100])
    found = round_of(jury(planted, pool, list(range(40)), list(range(40, 100))), list(range(40, 52)))
    small, large, other = (trial(planted, found, size) for size in (1, 2, 12))
    gains = {1: small.gain(found.current), 2: large.gain(found.current)}
    assert min(gains.values()) > max(0.9 * max(gains.values()), other.gain(found.current))
    for better in (True, False):
        small, large, other = (trial(planted, found, size) for size in (1, 2, 12))
        monkeypatch.setattr(Trial, "clearly_better", lambda self, than, current, better=better: better)
        found.finish([small, large, other])
        assert (large.complete, small.complete) == (better, not better)
        # The other is judged on every fifth of the rest.
        behind = small if better else large
        assert int((~np.isnan(behind.outcome.loss)).sum()) == 12 + 10
        assert int((~np.isnan(other.outcome.loss)).sum()) == 12


@pytest.mark.parametrize(
    ("suspects", "judged", "taken"), [({8}, {8, 4}, 4), ({8, 4}, {8, 4, 2}, 2), ({8, 4, 2}, {8, 4, 2}, 8), ((), {8}, 8)]
)
def test_what_costs_right_answers_is_followed_by_what_is_half_as_large_and_gains_nearly_as_much(
    suspects: Sequence[int], judged: set[int], taken: int, planted: Planted, monkeypatch: pytest.MonkeyPatch
) -> None:
    def outcome(loss: float, right: int) -> Outcome:
        correct = np.array([1.0] * right + [0.0] * (20 - right))
        return Outcome(loss * np.tile([1.1, 0.9], 10), np.zeros(20), np.zeros(20, dtype=np.int64), correct)

    current = outcome(5.0, 10)
    whole = {n: outcome(5.0 - gain, 5 if n in suspects else 10) for n, gain in GAINS.items()}

    def of_size(n: int) -> Trial:
        few = Outcome(*(np.where(np.arange(20) < 4, values, np.nan) for values in vars(whole[n]).values()))
        return Trial(Proposal(f"{n} components", n, None, lambda track: Plan()), [Plan()], few, 0.0)

    def judge(trial: Trial, rows: Sequence[int]) -> None:
        assert len(rows) == 16  # none is close to the largest
        trial.outcome = whole[trial.proposal.size]

    judges = jury(planted, encoded(planted.folder, planted.examples[:21]), [0], list(range(1, 21)))
    monkeypatch.setattr(judges, "judge_more", judge)
    found = NestedRound(judges, current, lambda *step: None)
    found.rest = list(range(5, 21))
    trials = [of_size(n) for n in GAINS]
    found.finish(trials)
    assert {t.proposal.size for t in trials if t.complete} == judged
    kept = choose_by_loss(trials, current, 1).kept
    assert kept is not None
    assert kept.proposal.size == taken
