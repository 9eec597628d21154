"""The model of context-calibrated compression: its formulas, its fit, its files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from compactor_vllm.compression.calibration import (
    Calibration,
    find_calibration,
    fit,
    least_retention,
    load_calibrations,
    mean_nll,
    needed_retention,
    predicted_quality,
    probe_window,
    save_calibrations,
)
from compactor_vllm.compression.compactor import Compactor
from compactor_vllm.errors import InvalidInputError


@pytest.mark.parametrize("b", [-20.0, -5.0, -0.3, 1e-9, 0.7, 5.0, 40.0])
def test_quality_is_the_papers_and_retention_its_inverse(b: float) -> None:
    for r in (0.02, 0.3, 0.75, 1.0):
        if abs(b) > 1e-6:
            paper = (math.exp(b * (r - 1)) - math.exp(-b)) / (1 - math.exp(-b))
            assert predicted_quality(r, b) == pytest.approx(paper, rel=1e-9)
        else:
            assert predicted_quality(r, b) == r
        assert least_retention(predicted_quality(r, b), b) == pytest.approx(r, abs=1e-6)
    assert predicted_quality(0.0, b) == 0 and least_retention(1.0, b) == pytest.approx(1)


def test_the_window_is_an_eighth_from_the_middle() -> None:
    assert probe_window(50) == (0, 50) and probe_window(128) == (0, 128) and probe_window(600) == (236, 364)
    assert probe_window(4096) == (1792, 2304) and probe_window(10**6) == (499_488, 500_512)
    assert mean_nll([-9.0] * 16 + [-1.0, -3.0]) == 2 and mean_nll([-1.0, -2.0]) == 1.5


def test_the_needed_retention_is_read_off_the_measured_ones() -> None:
    points = [(0.5, 0.9), (0.25, 0.4), (0.75, 1.2), (0.1, 0.99)]  # what rises again at the bottom is not trusted
    assert needed_retention(points, 0.9) == 0.5 and needed_retention(points, 1e-3) == 0.1
    assert needed_retention(points, 0.8) == pytest.approx(0.25 + 0.25 * 0.4 / 0.5)
    assert needed_retention(points, 0.95) == pytest.approx(0.5 + 0.25 * 0.05 / 0.3)
    assert needed_retention([(0.9, 0.5)], 0.75) == pytest.approx(0.95) and needed_retention([], 0.9) == 1


def known(alpha: float, beta: float, noise: float = 0.0) -> list[tuple[float, float, float]]:
    rng = np.random.default_rng(3)
    return [
        (r, x, predicted_quality(min(r + noise * rng.normal(), 1), alpha * x + beta))
        for x in np.linspace(0.2, 4, 12)
        for r in np.arange(0.02, 1, 0.02)
    ]


@pytest.mark.parametrize(("alpha", "beta"), [(2.0, -4.0), (-1.0, 1.0), (0.0, -3.0), (3.0, 1.0)])
def test_a_fit_finds_what_made_the_data(alpha: float, beta: float) -> None:
    found = fit("m", known(alpha, beta))
    assert (found.alpha, found.beta) == (pytest.approx(alpha, abs=0.03), pytest.approx(beta, abs=0.05))
    assert found.error < 2e-3 and found.triples == 12 * 49 and (found.lowest, found.highest) == (0.2, 4.0)


def test_a_fit_of_noise_keeps_too_much_rather_than_too_little() -> None:
    triples = known(2.0, -4.0, noise=0.1)
    found = fit("m", triples)
    contexts = {x: [(r, y) for r, other, y in triples if other == x] for _, x, _ in triples}
    pairs = [(found.choose(x, 0.9)[0], needed_retention(points, 0.9)) for x, points in contexts.items()]
    assert np.mean([chosen - needed for chosen, needed in pairs]) > 0.02
    for wrong in ([], [(0.5, 1.0, 0.9), (0.7, 1.0, 0.9)], [(1.0, 1.0, 1.0), (1.0, 2.0, 1.0)]):
        with pytest.raises(InvalidInputError, match="two different contexts"):
            fit("m", wrong)


def test_a_choice_keeps_its_promise_and_stays_in_range() -> None:
    entry = Calibration(method="m", alpha=3.0, beta=-4.0, lowest=0.5, highest=3.0, triples=1, error=0.0)
    ratios = [entry.choose(x, 0.95)[0] for x in (0.0, 0.5, 1.0, 2.0, 3.0, 9.0)]
    assert ratios == sorted(ratios) and ratios[0] == ratios[1] and ratios[-1] == ratios[-2] <= 1
    for x in (0.5, 1.7, 3.0):
        ratio, promised = entry.choose(x, 0.95)
        assert promised >= 0.95 and predicted_quality(ratio - 0.01, entry.steepness(x)) < 0.95
        assert ratio == round(ratio, 2)
    assert entry.choose(1.0, 1e-9)[0] == 0.01


def test_files(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("COMPACTOR_CACHE", str(tmp_path))
    one = Calibration(method="compactor", alpha=1.0, beta=2.0, lowest=0.1, highest=2.0, triples=3, error=0.1)
    other = Calibration(method="keydiff", alpha=3.0, beta=2.0, lowest=0.1, highest=2.0, triples=3, error=0.1)
    file = save_calibrations("model", "f" * 64, [one], {"seed": 0})
    assert save_calibrations("model", "f" * 64, [other], {}) == file
    assert load_calibrations("f" * 64) == {"compactor": one, "keydiff": other} and load_calibrations("0" * 64) == {}
    assert find_calibration("model", "f" * 64, Compactor()) == one
    file.write_text(json.dumps({"methods": [{"method": "x"}]}))
    with pytest.raises(InvalidInputError, match="fit them again"):
        load_calibrations("f" * 64)
