"""Random bodies for `POST /v1/jobs`: by the seed, from plain noise to a valid job with one thing changed."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Iterator
from typing import Any

from tests.live import spec

FIELDS = [
    *("model", "examples", "validation", "test", "passes", "strategy", "strategy_options", "objective", "seed"),
    *("prompt_format", "metadata", "max_drift", "quantize", "gguf", "webhook", "owner", "__proto__", ""),
    *("goal", "target"),
]
NUMBERS: list[Any] = [0, -1, 1, 8, 9, 2**31, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e308, 5e-324, True, False, None]
TEXTS = [
    *("", " ", "a", "tiny-llama", "components", "laser", "both", "chat", "../../etc/passwd", "http://169.254.169.254/"),
    *(
        "\x00",
        "\ud800",
        "\u202e",
        "\ufdfa" * 50,
        "é" * 100,
        "{{ 7 * 7 }}",
        "%s%n",
        "' OR 1=1 --",
        "a\r\nb: c",
        "9" * 400,
    ),
]


def bodies(count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Kind and body of each."""
    rng = random.Random(seed)
    kinds = (noise, broken_json, deep, any_value, changed_field, changed_example, changed_bytes, many)
    for _ in range(count):
        kind = rng.choice(kinds)
        yield kind.__name__, kind(rng)


def noise(rng: random.Random) -> bytes:
    """Bytes."""
    return rng.randbytes(rng.choice([0, 1, 16, 4000]))


def broken_json(rng: random.Random) -> bytes:
    """JSON that ends somewhere, or has more behind it."""
    whole = _dumped(spec())
    cut = rng.randrange(len(whole))
    return whole[:cut] + rng.choice([b"", b"NaN", b"]}", b"//", whole])


def deep(rng: random.Random) -> bytes:
    """Nested deeper than any parser should follow."""
    n = rng.choice([10, 1_000, 200_000])
    opening, closing = rng.choice([(b"[", b"]"), (b'{"a":', b"}")])
    inside = opening * n + b"1" + closing * n
    return inside if rng.random() < 0.5 else b'{"model":"tiny-llama","examples":' + inside + b"}"


def any_value(rng: random.Random) -> bytes:
    """JSON of any kind."""
    return _dumped(_value(rng, 4))


def changed_field(rng: random.Random) -> bytes:
    """A valid job with fields replaced, removed or added."""
    body: dict[str, Any] = spec()
    for _ in range(rng.randint(1, 3)):
        name = rng.choice(FIELDS)
        if rng.random() < 0.2:
            body.pop(name, None)
        else:
            body[name] = _value(rng, 3)
    return _dumped(body)


def changed_example(rng: random.Random) -> bytes:
    """A valid job with something else in its examples."""
    body: dict[str, Any] = copy.deepcopy(spec())
    example = rng.choice(body["examples"])
    name = rng.choice(["prompt", "completion", "choices", "weight"])
    if rng.random() < 0.2:
        example.pop(name, None)
    else:
        example[name] = _value(rng, 2)
    return _dumped(body)


def changed_bytes(rng: random.Random) -> bytes:
    """A valid job with bytes replaced."""
    body = bytearray(_dumped(spec()))
    for _ in range(rng.randint(1, 5)):
        body[rng.randrange(len(body))] = rng.randrange(256)
    return bytes(body)


def many(rng: random.Random) -> bytes:
    """Much of one thing."""
    match rng.randrange(4):
        case 0:
            return _dumped(spec(metadata={str(k): "x" for k in range(rng.choice([15, 17, 5000]))}))
        case 1:
            return _dumped(spec(examples=[{"prompt": "a" * 30_000, "completion": " b"}] * 9))
        case 2:
            choices = [str(k) for k in range(rng.choice([2, 300, 20_000]))]
            return _dumped(spec(examples=[{"prompt": "p", "completion": "0", "choices": choices}] * 8))
    return b'{"passes":1,' * 2000 + _dumped(spec())[1:]


def _value(rng: random.Random, depth: int) -> Any:
    kind = rng.randrange(6 if depth else 3)
    if kind == 0:
        return rng.choice(NUMBERS)
    if kind == 1:
        return rng.choice(TEXTS)
    if kind == 2:
        return struct.unpack("<d", rng.randbytes(8))[0]
    if kind < 5:
        return [_value(rng, depth - 1) for _ in range(rng.randrange(4))]
    return {rng.choice([*FIELDS, *TEXTS]): _value(rng, depth - 1) for _ in range(rng.randrange(4))}


def _dumped(value: Any) -> bytes:
    return json.dumps(value).encode()
