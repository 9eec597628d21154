"""The directory of a run: config.json, predictions.jsonl, metrics.json. A run that was broken off is taken up again.

Processes that share a run write a file of predictions each and read those of all.
"""

from __future__ import annotations

import json
import lzma
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from compactor_vllm.errors import InvalidInputError
from compactor_vllm.evaluation.run_config import RunConfig

CONFIG, METRICS = "config.json", "metrics.json"
PREDICTIONS, PACKED = "predictions.jsonl", "predictions.jsonl.xz"

Record = dict[str, Any]
"""One sample under one method and retention: see `record_key` for what identifies it, and `runner` for the rest."""

Key = tuple[str, int, int, str, float]


def record_key(record: Mapping[str, Any]) -> Key:
    """Task, length, index of the sample, method and retention."""
    return (
        record["task"],
        int(record["length"]),
        int(record["index"]),
        record["method"],
        round(float(record["retention"]), 6),
    )


class RunDirectory:
    """A run's files.

    Attributes:
        path: the directory.
        config: of the run, as a mapping.
        records: every prediction so far, by its key.
        file: where `append` writes.
    """

    def __init__(
        self, path: Path, config: Mapping[str, Any], records: Iterable[Record], file: str = PREDICTIONS
    ) -> None:
        self.path, self.config, self.file = path, config, path / file
        self.records: dict[Key, Record] = {record_key(record): record for record in records}

    @classmethod
    def create(cls, path: Path, config: RunConfig, file: str = PREDICTIONS) -> RunDirectory:
        """Makes the directory, or takes up the run in it: methods, retentions, tasks, lengths and samples may be added.

        Args:
            file: name of this process's predictions, "predictions*.jsonl".

        Raises:
            InvalidInputError: the directory holds a run with other settings, or files that are no run.
        """
        mine = config.as_dict()
        if (path / CONFIG).is_file():
            old = _read_json(path / CONFIG)
            other = [name for name in RunConfig.FIXED if old.get(name) != mine[name]]
            if other:
                raise InvalidInputError(
                    f"{path} holds a run with {other[0]}={old.get(other[0])!r}, not {mine[other[0]]!r}; choose another "
                    "--out"
                )
            for name in ("tasks", "lengths", "methods", "retentions"):
                mine[name] = list(dict.fromkeys([*old.get(name, ()), *mine[name]]))
            mine["samples"] = max(old.get("samples", 0), mine["samples"])
            mine["substitutes"] = {**old.get("substitutes", {}), **mine["substitutes"]}
        elif path.exists() and any(path.iterdir()):
            raise InvalidInputError(f"{path} is not empty and holds no run; choose another --out")
        path.mkdir(parents=True, exist_ok=True)
        _write_json(path / CONFIG, mine)
        _cut_off(path / file)
        return cls(path, mine, _all_records(path), file)

    @classmethod
    def load(cls, path: Path) -> RunDirectory:
        """A run to be reported on; nothing is written.

        Raises:
            InvalidInputError: there is no run.
        """
        if not (path / CONFIG).is_file():
            raise InvalidInputError(f"{path} holds no run: it has no {CONFIG}")
        return cls(path, _read_json(path / CONFIG), _all_records(path))

    def append(self, records: Sequence[Record]) -> None:
        """Writes records at once, so that an interruption loses nothing that was computed."""
        with self.file.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        self.records |= {record_key(record): record for record in records}

    def write_metrics(self) -> dict[str, Any]:
        """Computes, writes and returns what is in metrics.json; see `metrics`."""
        result = metrics(self.config, list(self.records.values()))
        _write_json(self.path / METRICS, result)
        return result

    def pack(self, path: Path) -> None:
        """Writes the run to another directory, its predictions sorted and compressed: the same run, the same bytes.

        Raises:
            InvalidInputError: the directory holds something already.
        """
        if path.exists() and any(path.iterdir()):
            raise InvalidInputError(f"{path} is not empty; choose another --out")
        path.mkdir(parents=True, exist_ok=True)
        _write_json(path / CONFIG, self.config)
        _write_json(path / METRICS, metrics(self.config, list(self.records.values())))
        lines = (json.dumps(self.records[key], ensure_ascii=False) + "\n" for key in sorted(self.records))
        (path / PACKED).write_bytes(lzma.compress("".join(lines).encode(), preset=9))


def metrics(config: Mapping[str, Any], records: Sequence[Record]) -> dict[str, Any]:
    """Means of every cell, and the same in kvpress's form.

    Returns:
        "cells": a row for each task, length, method and retention, with the number of samples, the mean of each measure
            (per cent for scores) and of what the cache took.
        "kvpress": for each of kvpress's directory names ("ruler__4096__model__compactor__0.75", the fraction removed)
            its metrics by task, such as {"vt": {"string_match": 99.8}}.
    """
    groups: dict[tuple[str, int, str, float], list[Record]] = defaultdict(list)
    for record in records:
        groups[record["task"], record["length"], record["method"], record["retention"]].append(record)
    cells, named = [], defaultdict(dict)  # type: ignore[var-annotated]
    model = str(config.get("model", "")).strip("/").replace("/", "--")
    for (task, length, method, retention), members in sorted(
        groups.items(), key=lambda item: (*item[0][:3], -item[0][3])
    ):
        measures = cell_measures(members)
        row = {"task": task, "length": length, "method": method, "retention": retention, "samples": len(members)}
        cells.append(row | measures | cell_costs(members))
        press = "no_press" if method == "none" else method
        directory = f"{config.get('suite')}__{length}__{model}__{press}__{round(1 - retention, 6):g}"
        named[directory][task] = measures
    return {"cells": cells, "kvpress": dict(named)}


def cell_measures(members: Sequence[Record]) -> dict[str, float]:
    """The measures of one cell: its metric (and those of groups) in per cent, or the label-free ones."""
    if "nll" in members[0]:
        full, own = fmean(m["nll_full"] for m in members), fmean(m["nll"] for m in members)
        return {
            "nll": own,
            "nll_ratio": full / own if own > 0 else 1.0,
            "top1_agreement": round(100 * fmean(m["top1"] for m in members), 2),
            "kl": fmean(m["kl"] for m in members),
            "attention_error": fmean(m["attention_error"] for m in members),
        }
    name = members[0].get("metric", "score")
    result = {name: round(100 * fmean(m["score"] for m in members), 2)}
    for group in members[0].get("groups", {}):
        for value in sorted({m["groups"][group] for m in members}):
            chosen = [m["score"] for m in members if m["groups"][group] == value]
            result[f"{name}_{value}"] = round(100 * fmean(chosen), 2)
    return result


def cell_costs(members: Sequence[Record]) -> dict[str, float]:
    """Mean kept fraction, bytes of the cache, and tokens per second of the engine, where the records have them."""
    result = {}
    for name in ("kept_fraction", "kv_bytes", "kv_bytes_full"):
        values = [m[name] for m in members if m.get(name) is not None]
        if values:
            result[name] = fmean(values)
    seconds = sum(m.get("seconds", 0.0) for m in members)
    if seconds > 0:
        result["tokens_per_second"] = sum(m.get("tokens", 0) for m in members) / seconds
    return result


def _all_records(path: Path) -> list[Record]:
    """The complete records of all files of predictions in a directory."""
    files = sorted(path.glob("predictions*.jsonl"))
    records = [record for file in files for record in _read_records(file.read_bytes())[0]]
    packed = path / PACKED
    return (_read_records(lzma.decompress(packed.read_bytes()))[0] if packed.is_file() else []) + records


def _cut_off(file: Path) -> None:
    """Cuts off the end of a file where that is not a complete record."""
    if file.is_file():
        intact = _read_records(file.read_bytes())[1]
        if intact < file.stat().st_size:
            os.truncate(file, intact)


def _read_records(content: bytes) -> tuple[list[Record], int]:
    """The complete records at the beginning of a file, and the bytes that they take."""
    records: list[Record] = []
    intact = 0
    for line in content.splitlines(keepends=True):
        try:
            record = json.loads(line)
            record_key(record)
        except (ValueError, KeyError, TypeError):
            break
        if not line.endswith(b"\n"):
            break
        records.append(record)
        intact += len(line)
    return records, intact


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidInputError(f"{file} is not JSON: {error}") from error


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Replaces the file at once; several processes may."""
    draft = file.with_suffix(f".{os.getpid()}.tmp")
    draft.write_text(json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    draft.replace(file)
