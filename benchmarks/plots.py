"""Draws the figures of the documentation from the files in benchmarks/results.

    python -m benchmarks.plots [--gpu h100-80gb-hbm3] [--out docs/images]

Needs matplotlib, no GPU.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks import engine_report
from benchmarks.kernels import decode_attention, hopper_prefill

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--gpu", default="h100-80gb-hbm3", help="end of the names of the files")
    parser.add_argument("--out", type=Path, default=Path("docs/images"), help="folder of the figures")
    options = parser.parse_args()

    def read(name: str) -> dict[str, Any]:
        return json.loads((RESULTS / f"{name}-{options.gpu}.json").read_text())

    decode = read("decode_attention")
    options.out.mkdir(parents=True, exist_ok=True)
    hopper_prefill.plot(read("hopper_prefill")["rows"], str(options.out / "prefill-attention.png"))
    decode_attention.plot(decode["rows"], str(options.out / "decode-attention.png"), decode["read_gb_s"])
    engine_report.plot(read("engine")["rows"], str(options.out / "engine.png"))


if __name__ == "__main__":
    main()
