"""Arguments of a call: one parameter object for all inputs, or one each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from compactor_vllm.errors import InvalidInputError, RequestError

_Params = TypeVar("_Params")


def per_input(name: str, value: Any, kind: type[_Params], count: int) -> list[_Params]:
    """One parameter object per input: the same for all, one each, or the default.

    Raises:
        InvalidInputError: wrong type, or a list of another length.
    """
    if value is None:
        return [kind()] * count
    if isinstance(value, kind):
        return [value] * count
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise InvalidInputError(f"{name} must be a {kind.__name__} or a list of them, not {value!r}")
    if len(value) != count:
        raise InvalidInputError(f"{name} has {len(value)} entries for {count} inputs; give one for all or one each")
    for i, item in enumerate(value):
        if not isinstance(item, kind):
            raise RequestError(f"{name} must hold {kind.__name__} objects, not {item!r}", i)
    return list(value)
