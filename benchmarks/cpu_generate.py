"""Time of a long prompt and a short answer on this CPU: the engine and transformers' generate, same weights.

usage: python benchmarks/cpu_generate.py [--tokens 2048] [--new 12] [--repeats 5] [--out benchmarks/results/FILE.json]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch
import transformers

from compactor_vllm import LLM, BatchCompressionParams, LLMConfig, SamplingParams, SequenceCompressionParams

MODEL = "smollm2-135m-instruct"


def seconds(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def transformers_copy(llm: LLM) -> transformers.LlamaForCausalLM:
    """The same weights in transformers' own model."""
    from compactor_vllm.utils.loader import open_checkpoint

    checkpoint = open_checkpoint(llm.config)
    config = checkpoint.hf_config
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    model = model.to_empty(device="cpu").eval()
    state = {name: tensor().float() for name, tensor in checkpoint.tensors()}
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    model.model.rotary_emb = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--new", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out")
    options = parser.parse_args()
    llm = LLM(LLMConfig(model=MODEL, show_progress_bar=False, max_num_seqs=4))
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(1000, 40_000, (options.tokens,), generator=generator).tolist()
    sampling = SamplingParams(temperature=0, max_new_tokens=options.new, ignore_eos=True)
    peer = transformers_copy(llm)
    ids = torch.tensor([prompt])

    def run_peer() -> list[int]:
        with torch.inference_mode():
            out = peer.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=options.new, eos_token_id=None
            )
        return out[0, options.tokens :].tolist()

    def run_ours(method: str, ratio: float) -> list[int]:
        return llm.generate(
            prompt,
            sampling,
            BatchCompressionParams(compression_method=method),
            SequenceCompressionParams(compression_ratio=ratio),
            return_sequences=True,
        ).output_token_ids

    cases: dict[str, Callable[[], object]] = {
        "transformers": run_peer,
        "none 1.0": lambda: run_ours("none", 1.0),
        "compactor 0.5": lambda: run_ours("compactor", 0.5),
        "compactor 0.25": lambda: run_ours("compactor", 0.25),
        "snapkv 0.5": lambda: run_ours("snapkv", 0.5),
    }
    same = run_peer() == run_ours("none", 1.0)
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(options.repeats):  # interleaved, so that a busy machine disturbs all alike
        for name, run in cases.items():
            times[name].append(seconds(run))
    rows = {name: {"median_s": statistics.median(t), "all_s": t} for name, t in times.items()}
    base = rows["transformers"]["median_s"]
    print(f"{options.tokens} prompt tokens, {options.new} new; same greedy tokens: {same}")
    for name, row in rows.items():
        print(f"{name:16s} {row['median_s']:7.2f} s   {base / row['median_s']:5.2f}x transformers")
    result = {
        "benchmark": "cpu_generate",
        "model": MODEL,
        "prompt_tokens": options.tokens,
        "new_tokens": options.new,
        "same_greedy_tokens": same,
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "rows": rows,
    }
    if options.out:
        with open(options.out, "w") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
