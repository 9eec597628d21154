"""Checks of method options; each raises InvalidInputError that names the option and what would be right."""

from __future__ import annotations

import math

from compactor_vllm.errors import InvalidInputError


def check_int(
    owner: object, name: str, low: int, *, optional: bool = False, odd: bool = False, words: tuple[str, ...] = ()
) -> None:
    """The field is an integer >= low (or None, or one of `words`)."""
    value = getattr(owner, name)
    if (value is None and optional) or (isinstance(value, str) and value in words):
        return
    ok = isinstance(value, int) and not isinstance(value, bool) and value >= low and (value % 2 == 1 or not odd)
    if not ok:
        kind = "an odd integer" if odd else "an integer"
        _refuse(owner, name, " or ".join([f"{kind} >= {low}", *map(repr, words), *(["None"] if optional else [])]))


def check_number(owner: object, name: str, low: float, high: float = math.inf, *, words: tuple[str, ...] = ()) -> None:
    """The field is a finite number in [low, high], or one of `words`."""
    value = getattr(owner, name)
    if isinstance(value, str) and value in words:
        return
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not ok or not low <= value <= high:
        limits = f"a number >= {low:g}" if math.isinf(high) else f"a number in [{low:g}, {high:g}]"
        _refuse(owner, name, " or ".join([limits, *map(repr, words)]))


def check_choice(owner: object, name: str, choices: tuple[str, ...]) -> None:
    """The field is one of `choices`."""
    value = getattr(owner, name)
    if not isinstance(value, str) or value not in choices:
        _refuse(owner, name, f"one of {', '.join(map(repr, choices))}")


def check_bool(owner: object, name: str) -> None:
    """The field is True or False."""
    if not isinstance(getattr(owner, name), bool):
        _refuse(owner, name, "True or False")


def _refuse(owner: object, name: str, expected: str) -> None:
    raise InvalidInputError(f"{type(owner).__name__}: {name} must be {expected}, not {getattr(owner, name)!r}")
