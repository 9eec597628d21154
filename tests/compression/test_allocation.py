from __future__ import annotations

import pytest
import torch

from compactor_vllm.compression.allocation import (
    floor_tokens,
    layer_competition,
    selection_arguments,
    uniform_heads,
    with_head_floor,
)
from compactor_vllm.compression.selection import select_tokens
from compactor_vllm.errors import InvalidInputError


def test_types_without_a_floor() -> None:
    assert selection_arguments("layer", [3, 4]) == layer_competition() == {"per_head": False, "floor_B": None}
    assert selection_arguments("head", [3, 4], [0.5, 0.0]) == uniform_heads() == {"per_head": True, "floor_B": None}


def test_floors_are_per_sequence_and_exact() -> None:
    arguments = selection_arguments("layer", [30, 7, 100], [0.1, 0.5, 0.0])
    assert not arguments["per_head"]
    assert arguments["floor_B"].tolist() == [3, 3, 0] and arguments["floor_B"].dtype == torch.int32
    assert floor_tokens(10, 0.7) == 7


def test_an_unknown_type_is_refused() -> None:
    with pytest.raises(InvalidInputError, match='"layer" or "head", not \'token\''):
        selection_arguments("token", [1])


def test_policies_shape_what_is_selected() -> None:
    """Two sequences whose first head has all the high scores, one of them with a floor."""
    scores = torch.rand(40, 2) + torch.tensor([10.0, 0.0])
    borders, keep = torch.tensor([0, 20, 40]), [10, 10]
    common = (scores, borders, torch.tensor(keep), torch.zeros(40, dtype=torch.bool), 40)
    counts = {
        name: select_tokens(*common, **arguments)[1].tolist()
        for name, arguments in {
            "layer": layer_competition(),
            "head": uniform_heads(),
            "floor": with_head_floor(layer_competition(), keep, [0.2, 0.0], "cpu"),
        }.items()
    }
    assert counts == {
        "layer": [[20, 0], [20, 0]],
        "head": [[10, 10], [10, 10]],
        "floor": [[18, 2], [20, 0]],
    }
