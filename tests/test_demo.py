"""The demo's task and its promise to leave nothing running."""

from __future__ import annotations

from workers.demo.task import build_task, cities_with_countries


def test_the_task_is_the_same_for_the_same_seed() -> None:
    assert build_task(seed=3) == build_task(seed=3)
    assert build_task(seed=3) != build_task(seed=4)


def test_no_example_is_learnt_from_and_judged_on() -> None:
    task = build_task()
    assert (len(task.examples), len(task.test)) == (200, 300)
    prompts = [example.prompt for example in task.examples + task.test]
    assert len(set(prompts)) == len(prompts)


def test_every_city_has_one_country_and_does_not_name_it() -> None:
    rows = cities_with_countries()
    cities = [city for city, _ in rows]
    assert len(set(cities)) == len(cities)
    assert not [city for city, country in rows if country.lower() in city.lower()]
    assert ("Nairobi", "Kenya") in rows
