"""The comparison of greedy tokens: what it shows where answers part, and all of it with a tiny model on a CPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import agreement, engine_report
from benchmarks.agreement import Answer, Layer, compare, drift, engine, explain, near_threshold, reference_rows
from compactor_vllm import COMPRESSION_REGISTRY
from tests.tiny import save_tiny


def layer(**scores: float) -> Layer:
    """Pairs p<number>=score; those below 2 are protected."""
    pairs = np.array([int(name[1:]) for name in scores])
    return Layer(pairs_P=pairs, scores_P=np.array([*scores.values()], dtype=np.float32), free_P=pairs >= 2)


COMMON = {"p0": -9.0, "p2": 1.0, "p3": 2.0, "p4": 3.0, "p5": 4.0}
LIMIT = 0.5
NEAR, FAR = LIMIT * (1 + 1e-5), 2.5


def made(tokens: list[int], *layers: Layer, margins: list[float] | None = None) -> Answer:
    kept = "".join(f"{hash(tuple(part.pairs_P)) & 0xFFFFFFFF:08x}" for part in layers)
    return Answer(tokens=tokens, margins=margins, kept=kept, layers=layers)


def test_how_close_to_the_threshold_selections_differ() -> None:
    same = layer(**COMMON)
    one = layer(**COMMON, p6=LIMIT, p7=NEAR)
    other = layer(**{**COMMON, "p5": 4.25}, p6=LIMIT, p8=NEAR)
    found = near_threshold(made([1], same, one), made([1], same, other))
    assert (found["layers"], found["pairs"], found["of"]) == (1, 2, 5 + 7)
    assert found["relative"] == pytest.approx(1e-5, rel=0.02)
    assert found["distance"] == pytest.approx(LIMIT * 1e-5 / 1.0, rel=0.02)  # scores .5 .5 1 2 3 4: median deviation 1
    assert found["noise"] == 0  # only one of five common scores differs
    far = near_threshold(made([1], same, layer(**COMMON, p6=LIMIT, p7=FAR)), made([1], same, other))
    assert far["relative"] == pytest.approx(4) and far["distance"] > 1
    assert near_threshold(made([1], same), made([1], same))["pairs"] == 0


@pytest.mark.parametrize(
    ("score", "anew", "margin", "tie", "again"),
    [
        (NEAR, "reference", 0.3, "scores", "the reference's"),
        (FAR, "reference", 0.3, None, "the reference's"),
        (FAR, "reference", 1e-5, "logits", "the reference's"),
        (FAR, "device", 0.3, "again", "the device's"),
        (FAR, "another", 0.3, None, "neither"),
    ],
)
def test_what_is_a_tie(score: float, anew: str, margin: float, tie: str | None, again: str) -> None:
    device = made([5, 7], layer(**COMMON, p6=LIMIT, p7=score))
    reference = made([5, 6], layer(**COMMON, p6=LIMIT, p8=NEAR), margins=[2.0, margin])
    results = {"reference": reference, "device": device, "another": replace(reference, tokens=[6, 6])}
    row = compare([device], [replace(reference, layers=())])
    assert row["same"] == 0 and row["partings"] == [{"prompt": 0, "token": 1, "margin": margin}]
    explain(row["partings"], [device], [replace(reference, layers=())], lambda prompt: results[anew])
    [found] = row["partings"]
    assert (found["tie"], found["again"], found["layers"]) == (tie, again, 0 if anew == "device" else 1)


def test_the_same_pairs_leave_the_logits_to_explain_a_parting() -> None:
    device, reference = made([5, 7], layer(**COMMON)), made([5, 6], layer(**COMMON), margins=[2.0, 0.1])
    [found] = compare([device], [reference])["partings"]
    explain([found], [device], [reference], lambda prompt: pytest.fail("nothing has to be computed anew"))
    assert found == {"prompt": 0, "token": 1, "margin": 0.1, "layers": 0, "tie": None}


def test_drift_ends_where_answers_part() -> None:
    ours, theirs = made([5, 7], margins=[2.0, 1.0]), made([5, 6], margins=[2.25, 9.0])
    assert drift([ours], [theirs]) == 0.25


def test_the_recorded_reference_is_about_every_built_in_method() -> None:
    inputs, want = agreement.read_reference(40)
    names = {case.split()[0] for case in want}
    assert names == {n for n, cls in COMPRESSION_REGISTRY.items() if cls.__module__.startswith("compactor_vllm.")}
    assert len(inputs) == 40 and all(len(rows) == 40 for rows in want.values())


def test_all_of_it_with_a_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(tmp_path / "tiny")
    rng = np.random.default_rng(0)
    inputs = [rng.integers(1, 250, length).tolist() for length in (40, 61, 90)]
    monkeypatch.setattr(agreement, "MODEL", str(tmp_path / "tiny"))
    monkeypatch.setattr(agreement, "REFERENCE", tmp_path / "reference.json")
    monkeypatch.setattr(agreement, "RATIOS", (1.0, 0.4))
    monkeypatch.setattr(agreement, "prompts", lambda llm, count: inputs[:count])
    monkeypatch.setattr(engine_report.torch.cuda, "is_available", lambda: False)
    agreement.write_reference(3)
    rows = agreement.check(3)
    assert len(rows) == len(agreement.cases()) == 17, "eight methods of the package at two ratios, and none"
    assert all((row["same"], row["same_pairs"], row["partings"]) == (3, 3, []) for row in rows)
    assert rows[0]["drift"] < 1e-4

    coarse = {row["case"]: row for row in reference_rows(lambda: engine("cpu", "bfloat16", "torch"), 3)}
    json.dumps(coarse)
    assert coarse["random 0.4"]["same_pairs"] == coarse["streaming_llm 0.4"]["same_pairs"] == 3
    assert coarse["compactor 0.4"]["same_pairs"] < 3 and coarse["none 1.0"]["drift"] > 1e-3
    partings = [found for row in coarse.values() for found in row["partings"]]
    moved = [found for found in partings if found["layers"]]
    assert moved and all(found["again"] == "the reference's" and found["pairs"] for found in moved)
    assert any(found["tie"] is None for found in moved), "bfloat16 is no rounding of float32"

    monkeypatch.setattr(agreement, "RATIOS", (1.0, 0.3))
    with pytest.raises(SystemExit, match="make it anew"):
        agreement.read_reference(3)
