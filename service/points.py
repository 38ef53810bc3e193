"""Which of a job's files are a point of `compress`."""

from __future__ import annotations

import re
from collections.abc import Iterable

from service.errors import NotFound

POINT = re.compile(r"points/(\d+)/model/")


def point_path(paths: Iterable[str], point: int) -> str:
    """The folder of a round's model, `points/2/model/`; of the last round, `model/`.

    Args:
        paths: of all files of the job.
        point: the round's number, from 1.

    Raises:
        NotFound: the job has no such point.
    """
    earlier = {int(found[1]) for path in paths if (found := POINT.match(path))}
    last = len(earlier) + 1
    if point in earlier:
        return f"points/{point}/model/"
    if point == last:
        return "model/"
    there = f"the job's points are 1 to {last}" if earlier else "the job has one model, which is no point on a way"
    raise NotFound(there, param="point")
