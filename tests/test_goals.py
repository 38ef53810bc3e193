"""A job's goal and target, and the options that are in force under them."""

from __future__ import annotations

import pytest

from service.goals import Target
from service.jobs import JobSpec
from service.strategies import BlocksOptions, HeadsOptions, LayersOptions, MixedOptions, NeuronsOptions, StrategyOptions
from tests.live import spec


@pytest.mark.parametrize(
    ("strategy", "given", "in_force"),
    [
        ("layers", None, LayersOptions(parts="whole")),
        ("layers", {"score": "effect"}, LayersOptions(parts="whole")),
        ("neurons", None, NeuronsOptions()),
        ("heads", {}, HeadsOptions(groups=True)),
        ("mixed", None, MixedOptions(kinds=("layers", "neurons", "groups"))),
        ("mixed", {"kinds": ["layers"]}, MixedOptions(kinds=("layers",))),
        ("blocks", {"size": 16}, BlocksOptions(size=16)),
    ],
)
def test_options_under_compress_are_those_that_make_models_smaller(
    strategy: str, given: object, in_force: StrategyOptions
) -> None:
    parsed = JobSpec.parse(spec(goal="compress", target="parameters=0.8", strategy=strategy, strategy_options=given))
    assert parsed.options == in_force
    # A worker reads the spec back from where the API stored it.
    again = JobSpec.parse_json(parsed.model_dump_json().encode())
    assert again == parsed and again.options == in_force


def test_options_under_improve_are_what_they_were() -> None:
    assert JobSpec.parse(spec(strategy="layers")).options == LayersOptions(parts="both")
    assert JobSpec.parse(spec(strategy="heads", strategy_options={})).options == HeadsOptions(groups=False)


@pytest.mark.parametrize("text", ["decode_latency=0.5", " decode_latency = .5 ", "decode_latency=5e-1"])
def test_a_target_may_be_text(text: str) -> None:
    target = Target.model_validate(text)
    assert (target.measure, target.fraction) == ("decode_latency", 0.5)
    assert target == Target(decode_latency=0.5)
    assert Target.model_validate(str(target)) == target
