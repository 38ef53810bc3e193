"""LASER and Compress to Impress in the search: what they try, in what order, and that the best is what it claims."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from service.jobs import Objective, Stage
from service.reports import Candidate
from service.strategies import C2IOptions, ComponentsOptions, LaserOptions, StrategyOptions
from tests.plain import encoded, loaded, targets_of, weights_of
from tests.planted import Planted
from tests.test_pruning import same_bits
from workers.c2i import score
from workers.evaluation import Outcome, evaluate
from workers.examples import Layout
from workers.gradients import effects
from workers.laser import Laser
from workers.ranking import Plan
from workers.search import Search
from workers.splits import divide
from workers.strategies import dictionary, make_search
from workers.subject import Subject, Track
from workers.targets import Target

pytestmark = pytest.mark.usefixtures("one_thread")

TinyModels = Callable[..., Path]
PACKED = Layout(packed=True)
GRADIENT, SELECTION = 30, 30


def subject(folder: Path) -> Subject:
    targets, spectra = targets_of(folder)
    return Subject(loaded(folder).model, targets, spectra, Objective.BOTH, PACKED)


def searched(
    planted: Planted, options: StrategyOptions, passes: int = 1, *, backward: list[int] | None = None
) -> Search:
    """A search that has run on the planted task, split in two; told in which passes a backward was taken."""
    pool = encoded(planted.folder, planted.examples[: GRADIENT + SELECTION])
    track = Track(list(range(GRADIENT)), list(range(GRADIENT, GRADIENT + SELECTION)))
    search = make_search(subject(planted.folder), pool, [track], track, options, seed=0)

    def on_step(stage: Stage, number: int, fraction: float, message: str) -> None:
        if backward is not None and stage is Stage.BACKWARD:
            backward.append(number)

    search.run(passes, on_step)
    return search


def truncated(W: Tensor, retention: float) -> Tensor:
    """By torch's SVD, which the product does not use."""
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    r = max(1, int(len(S) * retention))
    found: Tensor = (U[:, :r] * S[:r]) @ Vh[:r]
    return found.to(W.dtype)


@contextmanager
def replaced(weight: Tensor, by: Tensor) -> Iterator[None]:
    original = weight.clone()
    weight.copy_(by)
    try:
        yield
    finally:
        weight.copy_(original)


def rank_of(outcome: Outcome) -> tuple[int, float]:
    return int(outcome.correct.sum()), -float(outcome.loss.mean())


def listed(targets: Sequence[Target], options: LaserOptions, seed: int = 0) -> list[list[str]]:
    proposals = Laser(targets, options, seed).propose([None], [Plan()], 1.0)
    return [[proposal.description for proposal in proposed] for proposed in proposals.rounds]


def standing_of(candidate: Candidate) -> tuple[float, float]:
    """More is better."""
    assert candidate.accuracy is not None
    assert candidate.loss is not None
    return candidate.accuracy, -candidate.loss


def test_laser_tries_every_matrix_with_every_retention_the_last_layer_and_the_smallest_rank_first(
    tiny_models: TinyModels,
) -> None:
    targets, _ = targets_of(tiny_models("llama"))
    (grid,) = listed(targets, LaserOptions())
    assert len(grid) == len(set(grid))
    # Rank 32 or 16: kept to 1 % and to 5 % is rank 1 both, and still two candidates of the paper's grid.
    expected = [
        f"{target.name} kept to {retention} %"
        for layer in ("layers.1.", "layers.0.")
        for target in targets
        if layer in target.name
        for retention in (1, 5, 10, 20, 60, 80, 90)
    ]
    assert grid == expected
    (reverse,) = listed(targets, LaserOptions(order="first_first"))
    assert reverse == expected[len(expected) // 2 :] + expected[: len(expected) // 2]
    (half,) = listed(targets, LaserOptions(retentions=(0.5,)))
    assert len(half) == len(targets)


def test_a_sample_of_the_grid_is_drawn_by_the_seed_and_keeps_the_order(tiny_models: TinyModels) -> None:
    targets, _ = targets_of(tiny_models("llama"))
    (grid,) = listed(targets, LaserOptions())
    (sample,) = listed(targets, LaserOptions(sample=20), seed=4)
    assert len(sample) == 20
    assert sample == sorted(set(sample), key=grid.index)
    assert [sample] == listed(targets, LaserOptions(sample=20), seed=4)
    assert [sample] != listed(targets, LaserOptions(sample=20), seed=5)
    assert listed(targets, LaserOptions(sample=10_000)) == [grid]


def test_laser_takes_the_most_accurate_of_all_truncations_then_that_of_least_loss(planted: Planted) -> None:
    options = LaserOptions(retentions=(0.1, 0.5))
    before = weights_of(loaded(planted.folder).model)
    search = searched(planted, options)
    model, targets = loaded(planted.folder).model, targets_of(planted.folder)[0]
    judged = search.pool[GRADIENT:]
    (report,) = search.passes
    assert len(report.candidates) == 2 * len(targets)
    outcomes = {}
    for target in targets:
        for retention in options.retentions:
            with replaced(target.weight, truncated(target.weight, retention)):
                name = f"{target.name} kept to {100 * retention:g} %"
                outcomes[name] = evaluate(model, judged, Objective.BOTH, PACKED)
    for candidate in report.candidates:
        expected = outcomes[candidate.description]
        assert candidate.loss == pytest.approx(expected.loss.mean(), rel=1e-4)
        assert candidate.accuracy == pytest.approx(expected.correct.mean(), abs=0.04)  # a near tie may fall otherwise
        assert candidate.examples == SELECTION
        assert candidate.predicted_loss is None
    best = max(report.candidates, key=standing_of)
    assert report.accepted == (rank_of(outcomes[best.description]) > rank_of(search.outcomes[0]))
    assert report.accepted
    assert report.reason.startswith(f"{best.description}, best on the selection split")
    assert report.chosen == best.size == search.plans[-1].size
    np.testing.assert_allclose(search.outcomes[1].loss, outcomes[best.description].loss, rtol=1e-3)
    assert same_bits(weights_of(loaded(planted.folder).model), before)


def test_a_second_pass_of_laser_searches_the_reduced_model_and_takes_no_second_backward(planted: Planted) -> None:
    backward: list[int] = []
    search = searched(planted, LaserOptions(retentions=(0.5,)), passes=2, backward=backward)
    first, second = search.passes
    assert set(backward) == {1}
    assert search.clock.fb > 0
    assert second.base_loss == pytest.approx(first.loss)
    taken = first.reason.partition(",")[0]
    assert taken not in {candidate.description for candidate in second.candidates}  # nothing more would go
    assert len(second.candidates) == len(first.candidates) - 1


def test_composing_goes_matrix_by_matrix_with_what_was_kept_and_ends_at_the_number_asked_for(planted: Planted) -> None:
    search = searched(planted, LaserOptions(retentions=(0.05, 0.5, 0.9), compose=2))
    (report,) = search.passes
    reduced = list(search.plans[-1].components)
    assert len(reduced) == 2
    targets = [t for layer in (1, 0) for t in targets_of(planted.folder)[0] if t.layer == layer]
    order = [target.name for target in targets]
    tried = list(dict.fromkeys(c.description.partition(" ")[0] for c in report.candidates))
    assert tried == order[: len(tried)]
    assert tried[-1] in reduced
    # Each is judged against the model with what was kept before it.
    standing = rank_of(search.outcomes[0])
    loss = report.base_loss
    for name in tried:
        mine = [c for c in report.candidates if c.description.startswith(f"{name} ")]
        assert [c.base_loss for c in mine] == [pytest.approx(loss)] * len(mine)
        best = max(mine, key=standing_of)
        assert best.accuracy is not None
        assert best.loss is not None
        now = (round(best.accuracy * SELECTION), -best.loss)
        assert (now > standing) == (name in reduced)
        if now > standing:
            standing, loss = now, best.loss
    assert report.loss == pytest.approx(loss)
    assert report.chosen == search.plans[-1].size == sum(len(c) for c in search.plans[-1].components.values())


def test_a_matrix_counts_by_the_gradients_that_speak_for_shrinking_its_singular_values() -> None:
    mean, S = torch.tensor([3.0, -8.0, 0.5, 1e-3]).double(), torch.tensor([6.0, 4.0, 1.0, 1e-9])
    assert score(mean, S, shrink=1) == pytest.approx(0.5 + 0.5)  # the last is rounding
    assert score(mean, S, shrink=-1) == pytest.approx(2.0)


@pytest.mark.parametrize("sign", ["taylor", "paper"])
def test_c2i_tries_the_matrices_that_the_gradient_of_their_singular_values_points_to(
    sign: str, planted: Planted
) -> None:
    search = searched(
        planted, C2IOptions.model_validate({"matrices": 3, "retentions": [0.5], "row_blocks": [1], "sign": sign})
    )
    model, targets = loaded(planted.folder).model, targets_of(planted.folder)[0]
    scores = {}
    found, _ = effects(model, targets, search.subject.spectra, search.pool[:GRADIENT], Objective.BOTH, PACKED)
    for target in targets:
        S = torch.linalg.svdvals(target.weight)
        gradient = found.by_module[target.name].mean(0) / S
        scores[target.name] = float((gradient if sign == "taylor" else -gradient).clamp_min(0).sum())
    expected = sorted(scores, key=lambda name: -scores[name])[:3]
    assert [c.description.partition(" ")[0] for c in search.passes[0].candidates] == expected
    for candidate, name in zip(search.passes[0].candidates, expected, strict=True):
        rank = found.by_module[name].shape[1]
        fall = float(found.by_module[name].mean(0)[rank // 2 :].sum())
        assert candidate.predicted_loss == pytest.approx(candidate.base_loss - fall, rel=1e-4)


@pytest.mark.parametrize("clusters", ["contiguous", "kmeans"])
def test_a_candidate_of_c2i_is_its_matrix_with_every_block_truncated_by_itself(clusters: str, planted: Planted) -> None:
    options = C2IOptions.model_validate(
        {"matrices": 1, "retentions": [0.25], "row_blocks": [1, 4], "clusters": clusters}
    )
    search = searched(planted, options)
    whole, blocked = search.passes[0].candidates
    assert whole.predicted_loss is not None
    assert blocked.predicted_loss is None
    assert blocked.description.endswith(
        "kept to 25 % in 4 row " + ("blocks" if clusters == "contiguous" else "clusters")
    )
    name = whole.description.partition(" ")[0]
    target = next(t for t in targets_of(planted.folder)[0] if t.name == name)
    blocks = [t for t in search.subject.targets if t.rows is not None]
    assert {t.module_name for t in blocks} == {name}
    expected = target.weight.clone()
    for block in blocks:
        assert block.rows is not None
        expected[block.rows.index] = truncated(block.weight, 0.25)
    assert sum(t.shape[0] for t in blocks) == target.shape[0]
    for candidate, weight in ((whole, truncated(target.weight, 0.25)), (blocked, expected)):
        with replaced(target.weight, weight):
            found = evaluate(loaded(planted.folder).model, search.pool[GRADIENT:], Objective.BOTH, PACKED)
        assert candidate.loss == pytest.approx(found.loss.mean(), rel=1e-4)


def test_another_pass_of_c2i_leaves_reduced_matrices_alone(planted: Planted) -> None:
    search = searched(planted, C2IOptions(matrices=2, retentions=(0.5, 0.9), row_blocks=(2,)), passes=3)
    assert sum(report.accepted for report in search.passes) >= 2
    reduced: set[str] = set()
    for report in search.passes:
        tried = {c.description.partition(" ")[0] for c in report.candidates}
        assert len(tried) == 2
        assert not tried & reduced
        reduced.add(report.reason.partition(" ")[0])


def test_the_same_samples_are_those_of_the_gradient(planted: Planted) -> None:
    search = searched(planted, C2IOptions(matrices=1, row_blocks=(1,), same_samples=True))
    assert search.jury.rows == list(range(GRADIENT))
    found = evaluate(loaded(planted.folder).model, search.pool[:GRADIENT], Objective.BOTH, PACKED)
    np.testing.assert_allclose(search.outcomes[0].loss, found.loss, atol=2e-5)


@pytest.mark.parametrize(
    "options", [LaserOptions(retentions=(0.5,)), C2IOptions(matrices=2, retentions=(0.5,), row_blocks=(1, 2))], ids=str
)
def test_cross_fitted_every_track_has_its_own_and_the_result_the_best_of_all(
    options: StrategyOptions, planted: Planted
) -> None:
    splits = divide(encoded(planted.folder, planted.examples[:16]), None, None, seed=3)
    search = make_search(subject(planted.folder), splits.pool, splits.tracks, splits.result, options, 0)
    search.run(1, lambda stage, number, fraction, message: None)
    (report,) = search.passes
    assert report.accepted
    assert search.result.plan == search.plans[-1]
    assert report.chosen == search.result.plan.size
    for track in search.tracks:
        assert len({name.partition("[")[0] for name in track.plan.components}) <= 1
        found = search.jury.evaluate(track, track.plan, track.judge)
        np.testing.assert_allclose(search.outcomes[-1].loss[track.judge], found.loss, atol=2e-5)
    assert all(candidate.examples == 16 for candidate in report.candidates)


def test_components_of_row_blocks_stand_in_one_list(planted: Planted) -> None:
    options = ComponentsOptions(row_blocks=4)
    whole = targets_of(planted.folder)[0]
    blocks = dictionary(whole, options)
    assert len(blocks) == 4 * len(whole)
    assert dictionary(whole, ComponentsOptions()) == whole
    pool = encoded(planted.folder, planted.examples)
    track = Track(list(range(60)), list(range(60, 120)))
    base = Subject(loaded(planted.folder).model, [], {}, Objective.BOTH, PACKED).with_targets(blocks)
    search = make_search(base, pool, [track], track, options, 0)
    search.run(1, lambda stage, number, fraction, message: None)
    assert search.passes[0].accepted
    assert "components by t" in " ".join(candidate.description for candidate in search.passes[0].candidates)
    assert set(search.plans[-1].components) <= {block.name for block in blocks}
    assert len({name.partition("[")[0] for name in search.plans[-1].components}) < len(search.plans[-1].components)
