"""How launches that a profiler has recorded are told apart."""

from __future__ import annotations

import pytest

from benchmarks.step_profile import LAYER, STEP, Launch, added, decode_rows, prompt_rows


def test_what_launches_add_is_the_time_that_passes() -> None:
    launches = [Launch("a", 0, 4), Launch("b", 1, 6), Launch("c", 2, 5), Launch("d", 9, 10)]
    assert added(launches) == [2, 0, 4]


def step(begin: float) -> list[Launch]:
    """A step of three layers: inputs, then norm, attention (which overlaps the norm) and product, then sampling."""
    result = [Launch(STEP, begin, begin + 1)]
    for layer in range(3):
        at = begin + 1 + 10 * layer
        result += [Launch("norm", at, at + 2), Launch(LAYER, at + 1, at + 8), Launch("product", at + 8, at + 10)]
    return [*result, Launch("sample", begin + 32, begin + 33)]


def test_rows_of_a_decode_step() -> None:
    rows = list(decode_rows([Launch("before", -5, -4), *step(0), *step(40), Launch(STEP, 80, 81)]))
    layer = [(row["kernel"], row["us"], row["adds"]) for row in rows if row["part"] == "layer"]
    assert layer == [("product", 2, 2), ("norm", 2, 2), (LAYER, 7, 6)]
    assert sum(adds for _, _, adds in layer) == pytest.approx(10)
    rest = [(row["kernel"], row["adds"]) for row in rows if row["part"] != "layer"]
    assert rest == [(STEP, 0), ("norm", 2), (LAYER, 6), ("product", 2), ("sample", 2)]


def test_rows_of_a_prompt() -> None:
    rows = list(prompt_rows([Launch("first", 0, 1), *step(1), Launch("sample", 40, 44)], layers=3))
    assert [(row["kernel"], row["calls"]) for row in rows[:2]] == [(LAYER, 1), ("sample", 2 / 3)]
    assert sum(row["adds"] for row in rows) * 3 == pytest.approx(43)
