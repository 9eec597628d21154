"""Small things that several modules need."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up. `triton.cdiv` takes microseconds, which add up between the launches of a prefill."""
    return -(-a // b)


def power_of_two(count: int) -> int:
    """The smallest one that is at least `count`; 0 for 0. As `triton.next_power_of_2`, in less time."""
    return 1 << (count - 1).bit_length() if count else 0


def derive_seed(seed: int, index: int | str) -> int:
    """A seed in [0, 2^63) for request number `index` of an engine, or for a weight of that name."""
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@contextmanager
def batch_progress(total: int, show: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar over `total` sequences on stderr; yields the function that is told how many are done."""
    if not show:
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("generating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("generating", total=total)
        yield lambda done: progress.update(task, completed=done)


def track(items: Sequence[T], what: str, show: bool) -> Iterable[T]:
    """The items, with a progress bar on stderr while they are iterated over."""
    if not show:
        return items
    from rich.console import Console
    from rich.progress import track as rich_track

    return rich_track(items, description=what, console=Console(stderr=True), transient=True)
