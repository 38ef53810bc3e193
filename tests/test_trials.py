"""Which candidate is taken: by accuracy with ties, losses, folds and models that break; by loss and a test."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from workers.evaluation import Outcome, paired_p
from workers.proposals import Proposal
from workers.ranking import Plan
from workers.trials import Trial, choose_by_accuracy, choose_by_loss


def outcome(right: Sequence[float], loss: Sequence[float], open_rows: Sequence[int] = ()) -> Outcome:
    correct = np.array(right, dtype=float)
    exact = np.zeros(len(right))
    for row in open_rows:
        exact[row], correct[row] = correct[row], np.nan
    return Outcome(np.array(loss, dtype=float), exact, np.zeros(len(right), dtype=np.int64), correct)


def trial(name: str, found: Outcome) -> Trial:
    return Trial(Proposal(name, 1, None, lambda _: Plan()), [], found, 0.0)


BASE = outcome([1, 0, 0, 0], [1, 1, 1, 1])


def taken(*trials: Trial) -> str | None:
    choice = choose_by_accuracy(trials, BASE, [[0, 1, 2, 3]], 1)
    assert (choice.kept is None) == (choice.outcome is BASE)
    return choice.kept.proposal.description if choice.kept else None


def test_the_most_accurate_is_taken_whatever_its_loss() -> None:
    assert (
        taken(trial("calm", outcome([1, 1, 0, 0], [0] * 4)), trial("right", outcome([1, 1, 1, 0], [3] * 4))) == "right"
    )


def test_of_equally_accurate_ones_that_of_least_loss_then_the_first() -> None:
    a, b, c = (trial(n, outcome([0, 1, 1, 0], [loss] * 4)) for n, loss in (("a", 0.9), ("b", 0.5), ("c", 0.5)))
    assert taken(a, b, c) == "b"


def test_an_open_example_is_right_where_it_is_to_the_letter() -> None:
    assert taken(trial("exact", outcome([1, 0, 1, 0], [2] * 4, open_rows=[2]))) == "exact"


def test_what_is_no_better_than_the_model_is_not_taken() -> None:
    assert taken() is None
    assert taken(trial("same", BASE), trial("worse", outcome([0, 0, 0, 0], [0] * 4))) is None
    assert taken(trial("cheaper", outcome([0, 0, 0, 1], [0.9] * 4))) == "cheaper"


def test_a_model_that_breaks_on_some_example_is_not_taken() -> None:
    assert taken(trial("broken", outcome([1, 1, 1, 1], [0, 0, 0, math.inf]))) is None


def test_where_there_are_folds_each_takes_what_the_others_find_best_and_shows_what_it_is_worth() -> None:
    # "left" is right on the first fold alone, "right" on the second alone: each fold must take the other's favourite.
    left, right = trial("left", outcome([1, 1, 0, 0], [0.1, 0.2, 2, 2])), trial("right", outcome([0, 0, 1, 1], [2] * 4))
    base = outcome([0, 0, 0, 0], [1, 1, 1, 1])
    choice = choose_by_accuracy([left, right], base, [[0, 1], [2, 3]], 3)
    assert [pick and pick.proposal.description for pick in choice.picks] == ["right", "left", "left"]
    assert choice.outcome.correct.tolist() == [0, 0, 0, 0]
    assert choice.outcome.loss.tolist() == [2, 2, 2, 2]
    assert choice.p == pytest.approx(paired_p(np.ones(4), two_sided=False))


def test_a_fold_whose_others_find_nothing_stays_as_it_was() -> None:
    only = trial("only", outcome([1, 1, 0, 0], [1, 1, 1, 1]))
    choice = choose_by_accuracy([only], outcome([0, 0, 0, 0], [1, 1, 1, 1]), [[0, 1], [2, 3]], 3)
    assert [pick and pick.proposal.description for pick in choice.picks] == [None, "only", "only"]
    assert choice.outcome.correct.tolist() == [0, 0, 0, 0]


def test_what_breaks_the_model_is_reported_without_a_loss() -> None:
    assert trial("broken", outcome([1, 1, 1, 1], [0, 0, 0, math.inf])).report(BASE).loss is None
    assert trial("sound", outcome([1, 1, 1, 1], [0, 0, 0, 1])).report(BASE).loss == 0.25


def test_by_loss_a_sure_fall_is_taken_before_a_larger_one_that_may_be_chance() -> None:
    current = outcome([0] * 8, [5.0] * 8)
    wild = trial("wild", outcome([0] * 8, [-9, 9, -9, 9, -9, 9, 2, 2]))
    sure = trial("sure", outcome([0] * 8, [4.9, 4.8, 4.9, 4.8, 4.9, 4.8, 4.9, 4.8]))
    unfinished = trial("unfinished", outcome([0] * 8, [0, math.nan] * 4))
    assert wild.gain(current) > sure.gain(current)
    assert wild.p(current) > 0.05 > sure.p(current)
    assert unfinished.p(current) == 1.0
    for order in ((wild, sure, unfinished), (unfinished, sure, wild)):
        kept = choose_by_loss(order, current, 1).kept
        assert kept is sure
    assert choose_by_loss([wild, unfinished], current, 1).kept is None


def test_by_loss_what_costs_right_answers_gives_way_to_what_gains_nearly_as_much() -> None:
    current = outcome([1] * 6 + [0] * 6, [5.0] * 12)
    costly = trial("costly", outcome([0] * 3 + [1] * 3 + [0] * 6, [1.0, 1.1] * 6))
    safe = trial("safe", outcome([1] * 6 + [0] * 6, [1.6, 1.5] * 6))
    small = trial("small", outcome([1] * 12, [3.0, 3.1] * 6))
    assert costly.suspect(current)
    assert not safe.suspect(current)
    assert choose_by_loss([costly, safe], current, 1).kept is safe
    # Two of five in the loss for three answers of twelve, which may be chance, is too much.
    assert choose_by_loss([costly, small], current, 1).kept is costly
    assert choose_by_loss([costly, small, safe], current, 1).kept is safe


def test_of_two_that_are_about_as_good_neither_is_clearly_better() -> None:
    noise = np.array([0.3, -0.3, 0.2, -0.2, 0.4, -0.4, 0.1, -0.1])
    current = outcome([0] * 8, [5.0] * 8)
    one = trial("one", outcome([0] * 8, list(2.0 + noise)))
    about = trial("about", outcome([0] * 8, list(1.98 - noise)))
    better = trial("better", outcome([0] * 8, list(1.7 + noise)))
    assert not about.clearly_better(one, current)
    assert not one.clearly_better(about, current)
    assert better.clearly_better(one, current)
    assert not one.clearly_better(better, current)
    broken = trial("broken", outcome([0] * 8, [*(1.0 + noise[:7]), math.inf]))
    assert one.clearly_better(broken, current)
    assert not broken.clearly_better(one, current)
    # Compared on what both were judged on: with a part of the losses missing.
    part = trial("part", outcome([0] * 8, [*(2.3 + noise[:4]), *[math.nan] * 4]))
    assert one.clearly_better(part, current)
