"""Order, ties, what is gone, and how many are tried."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from workers.ranking import Plan, Ranking, rank, sizes, t_scores


def noise(N: int, rank: int, seed: int = 0) -> Tensor:
    return torch.randn(N, rank, generator=torch.Generator().manual_seed(seed))


def listed(ranking: Ranking) -> list[tuple[str, int]]:
    return [(ranking.modules[m], i) for m, i in zip(ranking.module.tolist(), ranking.component.tolist(), strict=True)]


def test_t_is_students_t_of_each_component() -> None:
    a = noise(20, 7)
    expected = stats.ttest_1samp(a.double().numpy(), 0).statistic
    torch.testing.assert_close(t_scores(a), torch.from_numpy(expected))


def test_t_is_taken_in_double_precision_and_is_zero_where_nothing_varies() -> None:
    a = torch.tensor([[1e4, 3.0, 0.0], [1e4 + 1e-2, 3.0, 0.0], [1e4 + 2e-2, 3.0, 0.0]])
    expected = stats.ttest_1samp(a[:, 0].double().numpy(), 0).statistic
    assert t_scores(a).tolist() == pytest.approx([float(expected), 0, 0])
    assert t_scores(a).dtype == torch.float64


def test_the_most_certainly_harmful_come_first_over_all_modules() -> None:
    effects = {"b": noise(30, 5, 1) + 0.3, "a": noise(30, 8, 2) + 0.5}
    ranking = rank(effects)
    scores = {(name, i): float(t) for name, a in effects.items() for i, t in enumerate(t_scores(a))}
    assert listed(ranking) == sorted((c for c, t in scores.items() if t > 0), key=lambda c: -scores[c])
    assert ranking.t.tolist() == sorted((t for t in scores.values() if t > 0), reverse=True)
    means = {(name, i): float(a[:, i].double().mean()) for name, a in effects.items() for i in range(a.shape[1])}
    assert ranking.predicted.tolist() == pytest.approx(
        [sum(means[c] for c in listed(ranking)[: n + 1]) for n in range(len(ranking))]
    )


def test_significance_and_not_the_mean_decides() -> None:
    certain = torch.tensor([[0.10], [0.11], [0.09], [0.10]])
    loud = torch.tensor([[9.0], [-8.0], [9.0], [-8.0]])
    ranking = rank({"loud": loud, "certain": certain})
    assert loud.mean() > certain.mean()
    assert listed(ranking)[0] == ("certain", 0)


def test_ties_stand_in_the_models_order() -> None:
    a = noise(10, 1) + 3
    effects = {"z": a.repeat(1, 3), "a": a.repeat(1, 2), "m": a}
    expected = [("z", 0), ("z", 1), ("z", 2), ("a", 0), ("a", 1), ("m", 0)]
    assert listed(rank(effects)) == expected
    many = rank({"m": a.repeat(1, 5000)})
    assert many.component.tolist() == list(range(5000))
    assert listed(rank({name: value.clone() for name, value in effects.items()})) == expected


def test_nothing_is_ranked_where_all_effects_are_equal_zero_or_helpful() -> None:
    for a in (torch.full((8, 4), 2.0), torch.zeros(8, 4), noise(50, 4) * 0.1 - 5):
        ranking = rank({"m": a})
        assert len(ranking) == 0
        assert ranking.first(10) == Plan()
        assert sizes(ranking, 1.0) == []


def test_no_effects_at_all_are_an_empty_ranking() -> None:
    assert len(rank({})) == 0


def test_what_is_gone_is_never_ranked_again() -> None:
    effects = {"a": noise(20, 6) + 5, "b": noise(20, 4, 1) + 5}
    gone = Plan({"a": (0, 5), "elsewhere": (3,)})
    found = listed(rank(effects, removed=gone))
    assert len(found) == 8
    assert not {("a", 0), ("a", 5)} & set(found)
    assert bool((effects["a"][:, 0] > 0).any())  # the effects themselves are left as they are


def test_a_subset_of_rows_is_ranked_as_if_there_were_no_others() -> None:
    effects = {"a": noise(20, 6), "b": noise(20, 4, 1)}
    rows = [1, 4, 5, 9, 16, 19]
    part, alone = rank(effects, rows), rank({name: a[rows] for name, a in effects.items()})
    assert listed(part) == listed(alone)
    assert torch.equal(part.t, alone.t)
    assert torch.equal(part.predicted, alone.predicted)
    assert listed(part) != listed(rank(effects))


def test_the_first_n_are_a_plan_of_sorted_modules_and_components() -> None:
    effects = {"z": noise(40, 3, 1) + 2, "a": noise(40, 3, 2) + 2}
    ranking = rank(effects)
    assert len(ranking) == 6
    for n in range(7):
        plan = ranking.first(n)
        assert plan.size == n
        assert {(name, i) for name, c in plan.components.items() for i in c} == set(listed(ranking)[:n])
        assert list(plan.components) == sorted(plan.components)
        assert all(list(c) == sorted(c) for c in plan.components.values())
    assert ranking.first(99) == ranking.first(6)


plans = st.dictionaries(st.sampled_from("abc"), st.sets(st.integers(0, 9), min_size=1)).map(
    lambda chosen: Plan({name: tuple(sorted(c)) for name, c in sorted(chosen.items())})
)


@given(a=plans, b=plans)
def test_a_union_removes_what_either_removes(a: Plan, b: Plan) -> None:
    def pairs(plan: Plan) -> set[tuple[str, int]]:
        return {(name, i) for name, components in plan.components.items() for i in components}

    both = a.union(b)
    assert pairs(both) == pairs(a) | pairs(b)
    assert both.size == len(pairs(both))
    assert both == b.union(a)
    assert a.union(Plan()) == a
    assert a.union(a) == a


def test_a_fall_too_large_a_share_of_the_loss_is_in_doubt_and_can_be_left_out() -> None:
    ramp = torch.linspace(-1, 1, 9, dtype=torch.float64)[:, None] * 1e-3
    effects = {"b": ramp + torch.tensor([0.05, 0.8]), "a": 2 * ramp + torch.tensor([0.3, 0.01])}
    ranking = rank(effects)
    assert list(ranking.doubtful(1.0)) == [("b", 1), ("a", 0)]  # in the order of their t
    assert list(ranking.doubtful(1.0).values()) == pytest.approx([0.8, 0.3])
    assert list(ranking.doubtful(4.0)) == [("b", 1)]
    assert not ranking.doubtful(9.0)
    rest = ranking.without({("b", 1), ("a", 0)})
    assert listed(rest) == [("b", 0), ("a", 1)]
    assert rest.fall.tolist() == pytest.approx([0.05, 0.01])
    assert rest.predicted.tolist() == pytest.approx([0.05, 0.06])
    assert listed(ranking.without(set())) == listed(ranking)


def test_by_moderated_t_what_is_certain_and_small_comes_later() -> None:
    ramp = torch.linspace(-1, 1, 9, dtype=torch.float64)[:, None]
    means = torch.tensor([0.001, 0.5, 0.2, 0.4], dtype=torch.float64)
    spreads = torch.tensor([0.0001, 0.5, 0.3, 5.0], dtype=torch.float64)
    ranking = rank({"m": ramp * spreads + means})
    assert listed(ranking) == [("m", 0), ("m", 1), ("m", 2), ("m", 3)]
    moderated = ranking.moderated()
    errors = (ramp * spreads).std(0) / 3
    s0 = errors[means / errors > 2].median()
    assert listed(moderated) == [("m", int(i)) for i in (means / (errors + s0)).argsort(descending=True)]
    assert listed(moderated)[0] == ("m", 1)
    assert moderated.predicted[-1] == pytest.approx(float(ranking.predicted[-1]))
    assert torch.equal(moderated.t.sort().values, ranking.t.sort().values)
    assert len(rank({}).moderated()) == 0


def ranking_of(n: int, fall: float) -> Ranking:
    """n candidates, each of which is predicted to lower the loss by `fall`."""
    ramp = torch.linspace(-1, 1, 9, dtype=torch.float64)[:, None] * 1e-3
    return rank({"m": (ramp + fall).repeat(1, n)} if n else {})


def test_sizes_double_up_to_all_there_are() -> None:
    for n, expected in ((100, [16, 32, 64, 100]), (64, [16, 32, 64]), (65, [16, 32, 64, 65]), (3, [3]), (1, [1])):
        assert sizes(ranking_of(n, 0.001), 10.0) == expected
    assert sizes(rank({}), 1.0) == []


def test_sizes_begin_smaller_where_a_few_components_are_predicted_to_gain_much() -> None:
    assert sizes(ranking_of(50, 0.021), 1.0) == [10, 20, 40, 50]  # ten of them first gain a fifth of the loss
    assert sizes(ranking_of(50, 0.3), 1.0) == [1, 2, 4, 8, 16, 32, 50]


@given(n=st.integers(0, 3000), fall=st.floats(1e-6, 10), loss=st.floats(0, 50))
def test_whatever_the_ranking_sizes_ascend_within_it(n: int, fall: float, loss: float) -> None:
    grid = sizes(ranking_of(n, fall), loss)
    assert all(1 <= size <= n for size in grid)
    assert grid == sorted(set(grid))
    assert (grid[-1] == n) if n else not grid
    assert len(grid) <= 2 + math.log2(max(n, 1))
