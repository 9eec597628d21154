"""Rows of data sets: from files that the user brings, or through the package "datasets" where that was asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from compactor_vllm.errors import InvalidInputError, MissingDependencyError

Row = dict[str, Any]


def read_rows(directory: Path, name: str) -> list[Row]:
    """The rows of `name`.jsonl (one object a line) or `name`.json (a list of objects) in a directory.

    Raises:
        InvalidInputError: there is no such file, or it holds something else.
    """
    for file in (directory / f"{name}.jsonl", directory / f"{name}.json"):
        if file.is_file():
            break
    else:
        raise InvalidInputError(f"{str(directory)!r} has neither {name}.jsonl nor {name}.json")
    try:
        text = file.read_text(encoding="utf-8")
        rows = [json.loads(line) for line in text.splitlines() if line.strip()] if file.suffix == ".jsonl" else None
        rows = json.loads(text) if rows is None else rows
    except ValueError as error:
        raise InvalidInputError(f"{file} is not JSON: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InvalidInputError(f"{file} must hold objects, one a row")
    return rows


def hub_rows(repository: str, config: str | None, split: str) -> list[Row]:
    """The rows of a data set of the Hugging Face Hub.

    Raises:
        MissingDependencyError: the package "datasets" is not installed.
        InvalidInputError: the data set cannot be loaded (the cause is chained).
    """
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError(
            f"{repository} comes through the package datasets: pip install datasets, or pass --data DIR with its files"
        ) from error
    try:
        return [dict(row) for row in datasets.load_dataset(repository, config, split=split)]
    except Exception as error:
        raise InvalidInputError(f"{repository} cannot be loaded: {error}; --data DIR takes local files") from error


def field(row: Row, name: str, where: str) -> Any:
    """A field of a row; InvalidInputError that names it if it is missing."""
    if name not in row:
        raise InvalidInputError(f"a row of {where} lacks the field {name!r}; it has {', '.join(row)}")
    return row[name]
