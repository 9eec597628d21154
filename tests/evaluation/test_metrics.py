"""Metrics on cases worked out by hand."""

from __future__ import annotations

import pytest

from compactor_vllm.errors import InvalidInputError
from compactor_vllm.evaluation.metrics import clean_prediction, string_match_all, string_match_part


def test_all_and_part():
    predictions = ["It is ALPHA and beta.", "nothing", "gamma"]
    references = [["alpha", "Beta"], ["one", "two"], ["gamma", "delta", "epsilon"]]
    # 2/2, 0/2 and 1/3 of the references.
    assert string_match_all(predictions, references) == 44.44
    assert string_match_part(predictions, references) == 66.67


def test_needles():
    assert string_match_all([" 1234567."], [["1234567"]]) == 100
    assert string_match_all([" 1234568."], [["1234567"]]) == 0
    assert string_match_all(["12345", "7654321!"], [["1234567"], ["7654321"]]) == 50


def test_control_characters_become_newlines():
    assert clean_prediction(" \x00a\x1bb\tc \n") == "a\nb\nc"
    assert string_match_part(["new\x07york"], [["newyork"]]) == 0
    assert string_match_part(["\x1dnewyork\x1d"], [["NewYork"]]) == 100


def test_wrong_arguments():
    for predictions, references in ([], []), (["a"], []), (["a"], ["a"]), (["a"], [[]]):
        with pytest.raises(InvalidInputError, match="references"):
            string_match_all(predictions, references)
