"""The host's part of a decode step: everything but what the device computes.

    PYTHONPATH=src python -m benchmarks.host_step [--sequences 64] [--layers 36] [--kv-heads 8] [--out FOLDER]

Sequences with compressed prompts decode with the heads of a large model and the built-in model's tokenizer, while the
launches of a step are replaced by tokens that are there already. What is left is measured: admission, growth of pages,
a step's inputs, reading tokens, detokenising, ends. Goal: below 10 % of a step for 64 sequences of 36 layers of 8
heads. Once with text that is read while it is drawn, as a server's is, once with text that is wanted at the end, as
`LLM.generate` wants it. Runs on any CPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from benchmarks.engine_report import Results
from compactor_vllm import LLM, BatchCompressionParams, LLMConfig, SamplingParams, SequenceCompressionParams
from compactor_vllm.core.decode_step import DecodeOutput
from compactor_vllm.utils.loader import open_checkpoint


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", help="folder of the results; default $OUT, else benchmarks/results")
    return parser.parse_args(argv)


def write_model(folder: Path, layers: int, kv_heads: int) -> None:
    """A model with many small heads, and the built-in model's tokenizer."""
    builtin = open_checkpoint(LLMConfig(model="smollm2-135m-instruct", show_progress_bar=False))
    tokenizer = builtin.tokenizer()
    assert tokenizer is not None
    tokenizer.save_pretrained(folder)
    config = json.loads((Path(__file__).parent / "shapes" / "tiny" / "config.json").read_text())
    config |= {"num_hidden_layers": layers, "num_key_value_heads": kv_heads, "num_attention_heads": 2 * kv_heads}
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": len(tokenizer)}))


def make_llm(folder: Path, sequences: int) -> LLM:
    return LLM(
        LLMConfig(
            model=str(folder),
            load_format="dummy",
            device="cpu",
            max_model_len=4096,
            max_num_seqs=sequences,
            kv_cache_memory_bytes=3 * 2**30,
            show_progress_bar=False,
        )
    )


def time_steps(llm: LLM, options: argparse.Namespace, followed: bool) -> list[float]:
    """Seconds of each step while all sequences run; `followed`: their text is read while it is drawn."""
    draw = np.random.default_rng(0)
    vocab = llm.spec.vocab_size
    half = SequenceCompressionParams(compression_ratio=0.5)
    streams = [
        llm.stream(
            draw.integers(0, vocab, int(draw.integers(100, 300))).tolist(),
            SamplingParams(temperature=0, max_new_tokens=3500, ignore_eos=True),
            BatchCompressionParams(compression_method="compactor"),
            half,
        )
        for _ in range(options.sequences)
    ]
    engine: Any = llm._engine
    while len(engine.scheduler.running) < options.sequences:
        engine.step()
    for request in engine.scheduler.running:
        request.followed = followed
    tokens = torch.from_numpy(draw.integers(0, vocab, (options.steps, options.sequences)))
    drawn = iter(torch.stack([tokens, torch.zeros_like(tokens)], dim=1))

    def launch(rows: int, several: bool) -> DecodeOutput:
        return DecodeOutput(logits_BV=torch.empty(rows, 0), greedy_2B=next(drawn))

    seconds = []
    with mock.patch.object(engine.runner.step, "_launch", launch):
        for _ in range(options.steps):
            began = time.perf_counter()
            engine.step()
            seconds.append(time.perf_counter() - began)
    for stream in streams:
        stream.close()
    return seconds


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    results = Results(options.out, kind="host_step")
    for followed, text in ((True, "read while it is drawn"), (False, "read at the end")):
        with tempfile.TemporaryDirectory() as name:
            write_model(Path(name), options.layers, options.kv_heads)
            with make_llm(Path(name), options.sequences) as llm:
                milliseconds = [1000 * s for s in time_steps(llm, options, followed)]
        row = {"engine": "compactor-vllm", "workload": f"host's part of a decode step, text {text}", "metric": "ms"}
        row |= {"higher_is_better": False, "requests": options.sequences, "steps": len(milliseconds)}
        row |= {"layers": options.layers, "kv_heads": options.kv_heads}
        row |= {"value": statistics.median(milliseconds), "p99": statistics.quantiles(milliseconds, n=100)[-1]}
        results.put(row)
        print(f"text {text}: {row['value']:.2f} ms a step (99 %: {row['p99']:.2f} ms), {options.sequences} sequences")
    print(f"wrote {results.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
