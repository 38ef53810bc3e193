"""What people see of a report and of a running job in a terminal."""

from __future__ import annotations

import io
import re
from typing import Literal

import pytest
from rich.console import Console

from service.jobs import JobSpec
from service.reports import PlanEntry, Report, TargetModule
from service.terminal import draw, progress_bar
from tests.live import spec
from tests.stand_in import make_report

KINDS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")


def report(layers: int, removed: dict[tuple[int, str], int], passes: int = 2) -> Report:
    """A report of a model with so many layers, whose second layer has no `k_proj`."""
    modules = [
        TargetModule(module=f"model.layers.{layer}.{kind}", layer=layer, kind=kind, components=64)
        for layer in range(layers)
        for kind in KINDS
        if (layer, kind) != (1, KINDS[1])
    ]
    plan = [
        PlanEntry(
            module=f"model.layers.{layer}.{kind}",
            rows=None,
            shape=(64, 64),
            components=list(range(count)),
            relative_norm=0.1,
        )
        for (layer, kind), count in removed.items()
    ]
    made = make_report(JobSpec.parse(spec(passes=passes)))
    return made.model_copy(update={"modules": modules, "plan": plan, "gained": 12, "lost": 3})


def drawn(
    found: Report, *, encoding: str = "utf-8", terminal: bool = False, colour: Literal["truecolor"] | None = None
) -> list[str]:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, write_through=True)
    draw(found, Console(file=file, width=80, force_terminal=terminal, color_system=colour))
    return raw.getvalue().decode(encoding).splitlines()


def row(lines: list[str], kind: str) -> str:
    return next(line for line in lines if line.startswith(kind.rpartition(".")[2]))


REMOVED = {(0, KINDS[0]): 1, (4, KINDS[0]): 4, (29, KINDS[0]): 40, (3, KINDS[2]): 9}


def test_a_report_is_a_verdict_a_table_and_a_map_in_80_columns() -> None:
    lines = drawn(report(30, REMOVED), terminal=True)
    assert lines[0] == "no significant improvement"
    assert max(map(len, lines)) <= 80
    figures = "accuracy 0.500 0.500 0.500 +0.000 -0.100 to +0.100 1"
    assert " ".join(row(lines, "accuracy").split()) == figures
    assert any("12 came right and 3 went wrong" in line for line in lines)
    query, key, down = (row(lines, kind)[10:70] for kind in KINDS)
    assert query == "░░" + "··" * 3 + "▒▒" + "··" * 24 + "██"
    assert key == "··" + "  " + "··" * 28
    assert down == "··" * 3 + "▓▓" + "··" * 26
    assert [int(row(lines, kind)[70:]) for kind in KINDS] == [45, 0, 9]
    ruler = row(lines, "layer")[10:]
    assert [(number[0], number.start() // 2) for number in re.finditer(r"\d+", ruler)] == [
        (str(layer), layer) for layer in range(0, 30, 5)
    ]
    assert "components removed: · none   ░ 1   ▒ 4   ▓ 9   █ 40" in lines


@pytest.mark.parametrize(("layers", "together"), [(3, 1), (40, 1), (100, 2), (500, 8)])
def test_a_map_of_any_depth_fits_and_counts_everything(layers: int, together: int) -> None:
    removed = {(layer, kind): 1 for layer in range(layers) for kind in KINDS if (layer, kind) != (1, KINDS[1])}
    lines = drawn(report(layers, removed))
    assert max(map(len, drawn(report(layers, removed), terminal=True))) <= 80
    assert int(row(lines, KINDS[0])[-7:].replace(",", "")) == layers
    told = [line for line in lines if f"a column is {together} layers" in line]
    assert bool(told) == (together > 1)


def test_a_map_needs_neither_colour_nor_unicode() -> None:
    plain = drawn(report(30, REMOVED), terminal=True)
    coloured = drawn(report(30, REMOVED), terminal=True, colour="truecolor")
    assert coloured != plain
    assert [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in coloured] == plain
    query = row(drawn(report(30, REMOVED), encoding="ascii"), KINDS[0])
    assert query[10:70] == "::" + ".." * 3 + "++" + ".." * 24 + "##"


def test_a_program_gets_a_sentence_in_one_line() -> None:
    found = report(30, REMOVED).model_copy(update={"verdict": "word " * 40})
    assert drawn(found)[0] == found.verdict
    assert drawn(found, terminal=True)[0] != found.verdict


def test_a_report_that_removed_nothing_says_so_and_of_one_pass_has_no_column() -> None:
    lines = drawn(report(2, {}, passes=1))
    assert "Nothing was removed: the base model is what is returned." in lines
    assert "one pass" not in "\n".join(lines)


def test_a_bar_redraws_on_a_terminal_and_is_a_line_a_step_elsewhere() -> None:
    for terminal in (True, False):
        file = io.StringIO()
        with progress_bar(Console(file=file, force_terminal=terminal, width=80)) as bar:
            bar.show(0.0, "queued")
            bar.show(50.0, "searching: [plan] 3", 65.0)
        text = file.getvalue()
        if terminal:
            assert "searching: [plan] 3" in text
            assert "50%" in text
            assert "-1:0" in text
            assert text.endswith("\x1b[2K")  # its line is gone
        else:
            assert text == "  0.0 %  queued\n 50.0 %  searching: [plan] 3\n"
