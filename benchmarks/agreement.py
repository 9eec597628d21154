"""Greedy tokens of the built-in model: a GPU against a CPU, and the attention backends among themselves.

    PYTHONPATH=src python -m benchmarks.agreement --device cpu     # once: plain PyTorch in float32, the reference
    PYTHONPATH=src python -m benchmarks.agreement --device cuda    # float32 against it; the backends in bfloat16

Where two answers part, a row says after how many tokens and how far apart the log-probabilities of the reference's two
best tokens are at that place: a small margin is a tie within rounding.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.timing import gpu_name, write_results
from compactor_vllm import LLM, BatchCompressionParams, LLMConfig, SamplingParams, SequenceCompressionParams
from compactor_vllm.evaluation.tasks.niah import make_samples

MODEL = "smollm2-135m-instruct"
NEW_TOKENS = 12
CASES = [("none", 1.0), *((method, ratio) for method in ("compactor", "snapkv") for ratio in (1.0, 0.5, 0.25))]
BACKENDS = ("compactor_triton", "flash_attention", "torch")
REFERENCE = Path(__file__).parent / "results" / "agreement-cpu.json"


def prompts(llm: LLM, count: int) -> list[list[int]]:
    """Beginnings, 150 to 450 tokens long, of needle prompts."""
    samples = make_samples("niah_multikey_2", llm.tokenizer, length=512, count=count)
    rows = [llm.tokenizer(sample.prompt)["input_ids"] for sample in samples]
    return [row[: 150 + 61 * i % 300] for i, row in enumerate(rows)]


def answers(llm: LLM, inputs: list[list[int]], method: str, ratio: float, margins: bool) -> list[dict[str, Any]]:
    """Tokens of every answer, and the margin of each where asked for."""
    sampling = SamplingParams(
        temperature=0, max_new_tokens=NEW_TOKENS, ignore_eos=True, logprobs=2 if margins else None
    )
    params = SequenceCompressionParams(compression_ratio=ratio)
    batch = BatchCompressionParams(compression_method=method)
    rows = []
    for sequence in llm.generate(inputs, sampling, batch, params, return_sequences=True):
        row: dict[str, Any] = {"tokens": sequence.output_token_ids, "error": sequence.error}
        if margins:
            best = [sorted(entry.values(), reverse=True) for entry in sequence.logprobs]
            row["margins"] = [round(values[0] - values[1], 5) for values in best]
        rows.append(row)
    return rows


def compare(got: list[dict[str, Any]], want: list[dict[str, Any]]) -> dict[str, Any]:
    """How many answers are the same, and where the others part; margins are those of `want`, where it has them."""
    partings = []
    for index, (mine, theirs) in enumerate(zip(got, want, strict=True)):
        if mine["error"] is not None:
            raise SystemExit(f"answer {index} failed: {mine['error']}")
        pairs = zip(mine["tokens"], theirs["tokens"], strict=True)
        place = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        if place is not None:
            margin = theirs["margins"][place] if "margins" in theirs else None
            partings.append({"prompt": index, "token": place, "margin": margin})
    return {"same": len(got) - len(partings), "of": len(got), "partings": partings}


def engine(device: str, dtype: str, backend: str) -> LLM:
    config = LLMConfig(
        model=MODEL, device=device, dtype=dtype, attention_backend=backend, max_num_seqs=40, max_model_len=1024,
        kv_cache_memory_bytes=2 * 2**30, show_progress_bar=False,
    )  # fmt: skip
    llm = LLM(config)
    kernels = llm.describe()["kernels"]
    assert kernels["backend"] == backend, kernels
    return llm


def write_reference(count: int) -> None:
    with engine("cpu", "float32", "torch") as llm:
        inputs = prompts(llm, count)
        cases = {f"{method} {ratio}": answers(llm, inputs, method, ratio, True) for method, ratio in CASES}
    REFERENCE.write_text(json.dumps({"model": MODEL, "prompts": inputs, "answers": cases}) + "\n")
    print(REFERENCE)


def measure(dtypes: list[str], out: str | None) -> None:
    """Measures the parts asked for, beside the rows of the others in the file of an earlier run."""
    reference = json.loads(REFERENCE.read_text())
    earlier = REFERENCE.with_name(f"agreement-{gpu_name()}.json")
    rows = json.loads(earlier.read_text())["rows"] if earlier.exists() else []
    rows = [row for row in rows if row["what"].split(",")[0] not in dtypes]
    for dtype, part in (("bfloat16", backends_rows), ("float32", reference_rows)):
        if dtype in dtypes:
            for row in part(reference):
                rows.append(row)
                print(row, flush=True)
                path = write_results("agreement", rows, {"model": MODEL}, out)  # a run that is cut short keeps its rows
    print(path)


def reference_rows(reference: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The kernels in float32 against the CPU's answers."""
    with engine("cuda", "float32", "compactor_triton") as llm:
        for method, ratio in CASES:
            got = answers(llm, reference["prompts"], method, ratio, False)
            case = {"case": f"{method} {ratio}", "what": "float32, compactor_triton against the CPU"}
            yield {**case, **compare(got, reference["answers"][f"{method} {ratio}"])}


def backends_rows(reference: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The backends among themselves, in bfloat16."""
    want: dict[str, Any] = {}
    for backend in BACKENDS[::-1]:  # PyTorch first: the others are compared with it
        with engine("cuda", "bfloat16", backend) as llm:
            for method, ratio in (("none", 1.0), ("compactor", 0.5)):
                got = answers(llm, reference["prompts"], method, ratio, backend == "torch")
                if want.setdefault(method, got) is not got:
                    case = {"case": f"{method} {ratio}", "what": f"bfloat16, {backend} against torch"}
                    yield {**case, **compare(got, want[method])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--dtype", nargs="+", choices=("bfloat16", "float32"), default=["bfloat16", "float32"])
    parser.add_argument("--prompts", type=int, default=40, help="prompts of the reference")
    parser.add_argument("--out", help="folder of a GPU's JSON file (default: $OUT or benchmarks/results)")
    options = parser.parse_args()
    if options.device == "cpu":
        write_reference(options.prompts)
    else:
        measure(options.dtype, options.out)


if __name__ == "__main__":
    main()
