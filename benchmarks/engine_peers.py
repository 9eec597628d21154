"""Peers of `benchmarks/engine.py`: vLLM, and transformers with and without kvpress. Runs as a process of its own.

    python -m benchmarks.engine_peers JOB

JOB is a JSON object (see `Job`); `engine.py` writes it. Results are written to the job's file after every sample.
Nothing of this project's engine is imported: the peers may bring a transformers of their own.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Job", "main", "random_prompts", "run"]

KVPRESS_CASES = (("none", 1.0), ("compactor", 0.5), ("compactor", 0.25), ("snapkv", 0.5))
SHORT, LONG = 128, 640
"""Decode steps of the two vLLM runs whose difference is timed, at most."""
TIMED_STEPS = 48


@dataclass(frozen=True)
class Job:
    """What to measure.

    Attributes:
        peer: "vllm" or "kvpress".
        workload: its name; decides how a value is computed.
        model: folder with a config.json; weights are random.
        metric: "tok/s", "ms/step" or "s".
        out: file of the results, a list of {"method", "retention", "engine", "samples", ...}.
    """

    peer: str
    workload: str
    model: str
    metric: str
    requests: int
    prompt_tokens: int
    new_tokens: int
    max_num_seqs: int
    repeats: int
    vocab: int
    device: str
    kv_cache_dtype: str
    memory_utilization: float
    out: str

    def value(self, seconds: float) -> float:
        """Value of the metric of a run of all requests. Prefill counts only what goes in."""
        if self.metric != "tok/s":
            return seconds
        return self.requests * (self.prompt_tokens + (0 if self.workload == "prefill" else self.new_tokens)) / seconds


class Output:
    """The results of a job, written when one changes."""

    def __init__(self, file: str):
        self.file, self.entries = Path(file), []  # type: Path, list[dict[str, Any]]

    def entry(self, **fields: Any) -> dict[str, Any]:
        self.entries.append({"samples": [], **fields})
        return self.entries[-1]

    def add(self, entry: dict[str, Any], value: float, **fields: Any) -> None:
        entry["samples"].append(value)
        entry.update(fields)
        self.write()

    def write(self) -> None:
        self.file.write_text(json.dumps(self.entries))


def random_prompts(count: int, tokens: int, seed: int, vocab: int) -> list[list[int]]:
    """Random token ids, the same for every engine."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    low, high = min(100, vocab // 4), min(150_000, vocab)
    return torch.randint(low, high, (count, tokens), generator=generator).tolist()


# ---- vLLM --------------------------------------------------------------------------------------------------------


def run_vllm(job: Job, output: Output) -> None:
    """vLLM as it comes: compiled, CUDA graphs, chunked prefill, engine in this process, no prefix cache."""
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    import vllm

    llm = vllm.LLM(
        model=job.model,
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=40_960,
        gpu_memory_utilization=job.memory_utilization,
        kv_cache_dtype=job.kv_cache_dtype,
        enable_prefix_caching=False,
        disable_cascade_attn=True,
        max_num_seqs=job.max_num_seqs,
    )
    entry = output.entry(engine="vllm", method="none", retention=1.0)
    entry["versions"] = {"vllm": vllm.__version__}
    vllm_seconds(llm, job, min(4, job.requests), min(2048, job.prompt_tokens), 8, 900)
    vllm_seconds(llm, job, 1, job.prompt_tokens, 8, 901)
    for repeat in range(job.repeats):
        if job.metric == "ms/step":
            value = vllm_step(llm, job, repeat)
            fields: dict[str, float] = {"timed_steps": LONG - SHORT}
        else:
            seconds = vllm_seconds(llm, job, job.requests, job.prompt_tokens, job.new_tokens, repeat)
            value, fields = job.value(seconds), {"seconds": seconds}
        output.add(entry, value, **fields)


def vllm_seconds(llm: Any, job: Job, count: int, tokens: int, new_tokens: int, seed: int) -> float:
    """Seconds to generate exactly `new_tokens` tokens for every prompt."""
    import torch
    from vllm import SamplingParams, TokensPrompt

    params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
    batch = [TokensPrompt(prompt_token_ids=ids) for ids in random_prompts(count, tokens, seed, job.vocab)]
    _synchronize(torch, job.device)
    begin = time.perf_counter()
    answers = llm.generate(batch, params, use_tqdm=False)
    _synchronize(torch, job.device)
    seconds = time.perf_counter() - begin
    if any(len(answer.outputs[0].token_ids) != new_tokens for answer in answers):
        raise RuntimeError("vLLM generated fewer tokens than were asked for")
    return seconds


def vllm_step(llm: Any, job: Job, seed: int) -> float:
    """Milliseconds per step: the difference of two lengths of the output, as the anchors were measured."""
    short, long = (
        vllm_seconds(llm, job, job.requests, job.prompt_tokens, 1 + steps, 2 * seed + i)
        for i, steps in enumerate((SHORT, LONG))
    )
    return (long - short) / (LONG - SHORT) * 1e3


# ---- transformers, kvpress ---------------------------------------------------------------------------------------


def run_kvpress(job: Job, output: Output) -> None:
    """transformers with SDPA attention, eager: without a press, then with kvpress's, as far as they can be imported."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(job.model)
    dtype = torch.float32 if job.device == "cpu" else torch.bfloat16
    with torch.device(job.device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    versions = {"transformers": transformers.__version__}
    for method, retention in KVPRESS_CASES:
        engine = "transformers" if method == "none" else "kvpress"
        entry = output.entry(engine=engine, method=method, retention=retention, versions=versions)
        try:
            press = _press(method, retention)
            transformers_sample(model, press, job, 900)
            for repeat in range(job.repeats):
                prefill_s, step_ms, kv_bytes = transformers_sample(model, press, job, repeat)
                value = step_ms if job.metric == "ms/step" else job.value(prefill_s)
                output.add(entry, value, kv_bytes_per_sequence=kv_bytes / job.requests)
        except ImportError as error:
            entry["skipped"] = f"kvpress cannot be imported: {error}"
        except (RuntimeError, KeyError, TypeError, AttributeError) as error:
            entry["error"] = f"{type(error).__name__}: {str(error)[:300]}"
            traceback.print_exc()
        output.write()
        if job.device == "cuda":
            torch.cuda.empty_cache()


def _press(method: str, retention: float) -> Any:
    """kvpress's object for a method; its ratio is the fraction that is removed."""
    if method == "none":
        return None
    import kvpress

    cls = {"compactor": kvpress.CompactorPress, "snapkv": kvpress.SnapKVPress}[method]
    return cls(compression_ratio=1 - retention)


def transformers_sample(model: Any, press: Any, job: Job, seed: int) -> tuple[float, float, int]:
    """(seconds to prefill all prompts one by one, milliseconds per decode step of all, bytes of all caches)."""
    import torch

    ids = torch.tensor(random_prompts(job.requests, job.prompt_tokens, seed, job.vocab), device=job.device)
    with torch.inference_mode():
        _synchronize(torch, job.device)
        begin = time.perf_counter()
        caches, tokens = _prefill_each(model, press, ids)
        _synchronize(torch, job.device)
        prefill_s = time.perf_counter() - begin
        step_ms = 0.0
        cache = _merged(caches)
        kv_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        if job.metric == "ms/step":
            step_ms = _decode_ms(model, cache, tokens, job)
    return prefill_s, step_ms, kv_bytes


def _prefill_each(model: Any, press: Any, ids: Any) -> tuple[list[Any], Any]:
    import torch
    from transformers import DynamicCache

    caches, firsts = [], []
    for prompt in ids:
        cache = DynamicCache()
        with press(model) if press is not None else contextlib.nullcontext():
            logits = model(input_ids=prompt[None], past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        caches.append(cache)
        firsts.append(logits[0, -1].argmax())
    return caches, torch.stack(firsts)[:, None]


def _merged(caches: list[Any]) -> Any:
    """One cache of all sequences, which have equal lengths: kvpress keeps as many tokens of every head."""
    import torch

    first, *others = caches
    for index, layer in enumerate(first.layers):
        layer.keys = torch.cat([layer.keys, *(cache.layers[index].keys for cache in others)])
        layer.values = torch.cat([layer.values, *(cache.layers[index].values for cache in others)])
        for cache in others:
            cache.layers[index].keys = cache.layers[index].values = None
    return first


def _decode_ms(model: Any, cache: Any, tokens: Any, job: Job) -> float:
    import torch

    timed = min(TIMED_STEPS, 3 * job.new_tokens // 4)
    times = [time.perf_counter()]
    for step in range(job.new_tokens - 1):
        position = torch.full_like(tokens, job.prompt_tokens + step)
        logits = model(input_ids=tokens, past_key_values=cache, position_ids=position, use_cache=True).logits
        tokens = logits[:, -1].argmax(-1, keepdim=True)
        _synchronize(torch, job.device)
        times.append(time.perf_counter())
    return (times[-1] - times[-1 - timed]) / timed * 1e3


def _synchronize(torch: Any, device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# ---- the process -------------------------------------------------------------------------------------------------


def run(job: Job) -> None:
    """Runs a job; what cannot be imported, and what fails, is said in its file."""
    output = Output(job.out)
    try:
        (run_vllm if job.peer == "vllm" else run_kvpress)(job, output)
    except Exception as error:
        traceback.print_exc()
        missing = isinstance(error, ImportError) and not output.entries
        text = f"{type(error).__name__}: {str(error)[:300]}"
        entry = output.entries[-1] if output.entries else output.entry(engine=job.peer, method="none", retention=1.0)
        entry["skipped" if missing else "error"] = f"{job.peer} cannot be imported: {text}" if missing else text
        output.write()


def main(argv: list[str]) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    run(Job(**json.loads(argv[0])))


if __name__ == "__main__":
    main(sys.argv[1:])
