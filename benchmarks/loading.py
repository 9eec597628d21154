"""How fast a checkpoint's weights become a model, beside how fast its files can be read.

    PYTHONPATH=src python -m benchmarks.loading [--shape qwen3-8b] [--folder DIR] [--out FOLDER]
    PYTHONPATH=src python -m benchmarks.loading --device cpu --shape tiny

A checkpoint of random weights is written once, in files of 4 GB. Then, with the files forgotten by the page cache
("cold") and with them in it ("cached"), the same bytes are read by several threads that do nothing with them, and
loaded. Goal: loading runs at half of the rate of reading. A cold run wants files on a disk, not in memory. Needs no
network.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.contexts import drop_from_cache, read_rate
from benchmarks.engine import Shape
from benchmarks.engine_report import Results
from compactor_vllm import LLMConfig
from compactor_vllm.models.registry import load_model, model_spec
from compactor_vllm.utils.loader import open_checkpoint

GOAL = 0.5
FILE_BYTES = 4 * 2**30


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-8b", help="name of a folder in benchmarks/shapes, or a path")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    parser.add_argument("--folder", help="where the checkpoint is written; default a temporary one")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", help="folder of the results; default $OUT, else benchmarks/results")
    options = parser.parse_args(argv)
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    return options


def write_checkpoint(shape: Shape, folder: Path, device: torch.device) -> list[Path]:
    """A checkpoint of random bfloat16 weights; returns its weight files."""
    shutil.copy(shape.folder / "config.json", folder)
    config = LLMConfig(model=str(shape.folder), load_format="dummy", show_progress_bar=False)
    model = load_model(config, device, torch.bfloat16, open_checkpoint(config))
    parts: list[dict[str, torch.Tensor]] = [{}]
    room = FILE_BYTES
    for slot in model.weight_slots():
        if room < slot.target.nbytes:
            parts.append({})
            room = FILE_BYTES
        parts[-1][slot.name] = slot.target.cpu().contiguous()
        room -= slot.target.nbytes
    names = [f"model-{i:05d}-of-{len(parts):05d}.safetensors" for i in range(1, len(parts) + 1)]
    for name, tensors in zip(names, parts, strict=True):
        save_file(tensors, folder / name, metadata={"format": "pt"})
    index = {tensor: name for name, tensors in zip(names, parts, strict=True) for tensor in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return [folder / name for name in names]


def load(folder: Path, device: torch.device) -> float:
    """Seconds from an open checkpoint, whose configuration has been read, to weights on the device."""
    config = LLMConfig(model=str(folder), show_progress_bar=False)
    checkpoint = open_checkpoint(config)
    spec = model_spec(checkpoint)
    began = time.perf_counter()
    load_model(config, device, torch.bfloat16, checkpoint, spec)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def measure(folder: Path, files: list[Path], device: torch.device, repeats: int, cold: bool) -> dict[str, list[float]]:
    """GB/s of reading and of loading, in turn."""
    size = sum(file.stat().st_size for file in files)
    rates: dict[str, list[float]] = {"read": [], "load": []}
    for _ in range(repeats):
        forget(files, cold)
        rates["read"].append(size / 1e9 / sum(file.stat().st_size / read_rate(file) for file in files))
        forget(files, cold)
        rates["load"].append(size / 1e9 / load(folder, device))
    return rates


def forget(files: list[Path], cold: bool) -> None:
    if cold and not all([drop_from_cache(file) for file in files]):
        raise SystemExit("this system cannot make the page cache forget files")


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    device, results, shape = torch.device(options.device), Results(options.out, kind="loading"), Shape(options.shape)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        files = write_checkpoint(shape, Path(name), device)
        load(Path(name), device)  # imports, and the device's first use
        for state in ("cold", "cached"):
            rates = measure(Path(name), files, device, options.repeats, state == "cold")
            middle = {what: statistics.median(samples) for what, samples in rates.items()}
            for what, samples in rates.items():
                row = {"engine": "compactor-vllm", "workload": f"{what}, {state}", "shape": shape.name}
                row |= {"bytes": sum(file.stat().st_size for file in files), "metric": "GB/s", "higher_is_better": True}
                row |= {"samples": samples, "value": middle[what]}
                results.put(row | ({"share": middle["load"] / middle["read"], "goal": GOAL} if what == "load" else {}))
            share = middle["load"] / middle["read"]
            print(
                f"{state:7s} read {middle['read']:6.2f} GB/s, load {middle['load']:6.2f} GB/s: {share:.2f}", flush=True
            )
    print(f"wrote {results.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
