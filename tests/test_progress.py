"""What a user is told while an adaptation runs."""

from __future__ import annotations

import pytest

from service.jobs import Stage
from workers.progress import Progress


def test_percent_never_falls_though_the_work_of_a_pass_begins_again_for_every_fold() -> None:
    told: list[tuple[Stage, float]] = []
    progress = Progress(2, lambda stage, percent, eta, message: told.append((stage, percent)))
    with progress.stage(Stage.LOADING, "loading"):
        progress.tell(Stage.LOADING, 0.5, "half")
    with progress.stage(Stage.DECOMPOSING, "decomposing"):
        pass
    for number in (1, 2):
        for _ in range(3):  # three folds
            for fraction in (0.1, 0.5, 1.0):
                progress.within_pass(Stage.BACKWARD, number, fraction, "backward")
            progress.within_pass(Stage.RANKING, number, 0.0, "ranking")
        for fraction in (0.0, 0.5, 1.0):
            progress.within_pass(Stage.SEARCHING, number, fraction, "searching")
    with progress.stage(Stage.VERIFYING, "verifying"), progress.stage(Stage.PUBLISHING, "publishing"):
        pass
    percents = [percent for _, percent in told]
    assert percents == sorted(percents)
    assert percents[0] == 0
    assert max(percents) <= 100
    # Each pass has its share: the second begins where the first ends, half of the way.
    first = [p for s, p in told if s is Stage.SEARCHING][2]
    assert first == pytest.approx((20 + 85) / 2, abs=0.1)
    assert set(progress.seconds) == {Stage.LOADING, Stage.DECOMPOSING, Stage.VERIFYING, Stage.PUBLISHING}


def test_the_time_left_is_told_once_it_is_more_than_a_guess() -> None:
    etas: list[tuple[float, float | None]] = []
    progress = Progress(1, lambda stage, percent, eta, message: etas.append((percent, eta)))
    progress.tell(Stage.LOADING, 0.5, "early")
    progress.within_pass(Stage.BACKWARD, 1, 0.5, "later")
    progress.tell(Stage.PUBLISHING, 1.0, "done")
    assert etas[0][1] is None
    assert etas[1][1] is not None
    assert etas[1][1] > 0
    assert etas[2] == (100.0, 0.0)
