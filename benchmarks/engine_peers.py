"""Peers of `benchmarks/engine.py`: vLLM, and transformers with and without kvpress. Runs as a process of its own.

    python -m benchmarks.engine_peers JOB

JOB is a JSON object (see `Job`); `engine.py` writes it. The peer starts once and measures all workloads of the job;
one that fails does not keep the next from running. Results are written to the job's file after every sample.
Nothing of this project's engine is imported: the peers may bring a transformers of their own.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["Job", "Work", "main", "random_prompts", "run", "stopped"]

KVPRESS_CASES = (("none", 1.0), ("compactor", 0.5), ("compactor", 0.25), ("snapkv", 0.5))
SHORT, LONG = 128, 640
"""Decode steps of the two vLLM runs whose difference is timed, at most."""
TIMED_STEPS = 48


@dataclass(frozen=True)
class Work:
    """A workload; its name decides how a value is computed, its metric is "tok/s", "ms/step" or "s"."""

    name: str
    metric: str
    requests: int
    prompt_tokens: int
    new_tokens: int
    repeats: int

    def value(self, seconds: float) -> float:
        """Value of the metric of a run of all requests. Prefill counts only what goes in."""
        if self.metric != "tok/s":
            return seconds
        return self.requests * (self.prompt_tokens + (0 if self.name == "prefill" else self.new_tokens)) / seconds


@dataclass(frozen=True)
class Job:
    """What one engine is made of, and what it measures.

    Attributes:
        peer: "vllm" or "kvpress".
        works: measured one after another.
        model: folder with a config.json; weights are random.
        max_num_seqs: of vLLM.
        out: file of the results, a list of {"workload", "engine", "method", "retention", "samples", ...}.
    """

    peer: str
    works: tuple[Work, ...]
    model: str
    vocab: int
    device: str
    kv_cache_dtype: str
    memory_utilization: float
    max_num_seqs: int
    out: str

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        fields = json.loads(text)
        return cls(**{**fields, "works": tuple(Work(**work) for work in fields["works"])})


class Output:
    """The results of a job, written when one changes."""

    def __init__(self, file: str):
        self.file, self.entries = Path(file), []  # type: Path, list[dict[str, Any]]

    def entry(self, work: Work, **fields: Any) -> dict[str, Any]:
        self.entries.append({"workload": work.name, "samples": [], **fields})
        self.write()  # should the process die, its last entry says where
        return self.entries[-1]

    def add(self, entry: dict[str, Any], value: float, **fields: Any) -> None:
        entry["samples"].append(value)
        entry.update(fields)
        self.write()

    def note(self, peer: str, work: Work, field: str, text: str) -> None:
        """Says in the workload's last entry why it goes no further; it gets one if it has none."""
        mine = [entry for entry in self.entries if entry["workload"] == work.name]
        entry = mine[-1] if mine else self.entry(work, engine=peer, method="none", retention=1.0)
        entry[field] = text
        self.write()

    def write(self) -> None:
        partial = self.file.with_suffix(".partial")  # the file is read while it grows
        partial.write_text(json.dumps(self.entries))
        partial.replace(self.file)


def stopped(job: Job, entries: list[dict[str, Any]], error: str) -> list[dict[str, Any]]:
    """What the entries of a job lack whose process has died: the error of the workload that it was at, or of all if it
    had come to none."""
    blank = {"engine": job.peer, "method": "none", "retention": 1.0, "error": error}
    if not entries:
        return [{"workload": work.name, **blank} for work in job.works]
    last = entries[-1]
    repeats = next(work.repeats for work in job.works if work.name == last["workload"])
    done = {"error", "skipped"} & set(last) or len(last["samples"]) >= repeats
    return [] if done else [{**last, "error": error}]


def random_prompts(count: int, tokens: int, seed: int, vocab: int) -> list[list[int]]:
    """Random token ids, the same for every engine."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    low, high = min(100, vocab // 4), min(150_000, vocab)
    return torch.randint(low, high, (count, tokens), generator=generator).tolist()


# ---- vLLM --------------------------------------------------------------------------------------------------------


class VLLM:
    """vLLM as it comes: compiled, CUDA graphs, chunked prefill, engine in this process, no prefix cache."""

    def __init__(self, job: Job):
        os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        import vllm

        self.job, self.versions = job, {"vllm": vllm.__version__}
        self.warm: set[int] = set()  # lengths of the prompts that have run
        self.llm = vllm.LLM(
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

    def measure(self, work: Work, output: Output) -> None:
        """All samples of a workload."""
        entry = output.entry(work, engine="vllm", method="none", retention=1.0, versions=self.versions)
        self._drain()
        self._warm_up(work)
        for repeat in range(work.repeats):
            if work.metric == "ms/step":
                value = self._step_ms(work, repeat)
                fields: dict[str, float] = {"timed_steps": LONG - SHORT}
            else:
                seconds = self._seconds(work.requests, work.prompt_tokens, work.new_tokens, repeat)
                value, fields = work.value(seconds), {"seconds": seconds}
            output.add(entry, value, **fields)

    def _drain(self) -> None:
        """Ends what a failed run has left in the engine: it would run, and be timed, with the next one's requests."""
        while self.llm.llm_engine.has_unfinished_requests():
            self.llm.llm_engine.step()

    def _warm_up(self, work: Work) -> None:
        """A small batch once per engine, and one prompt of each length: the engine is shared, and so is its warmth."""
        if not self.warm:
            self._seconds(min(4, work.requests), min(2048, work.prompt_tokens), 8, 900)
        if work.prompt_tokens not in self.warm:
            self._seconds(1, work.prompt_tokens, 8, 901)
        self.warm.add(work.prompt_tokens)

    def _seconds(self, count: int, tokens: int, new_tokens: int, seed: int) -> float:
        """Seconds to generate exactly `new_tokens` tokens for every prompt."""
        import torch
        from vllm import SamplingParams, TokensPrompt

        params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        batch = [TokensPrompt(prompt_token_ids=ids) for ids in random_prompts(count, tokens, seed, self.job.vocab)]
        _synchronize(torch, self.job.device)
        begin = time.perf_counter()
        answers = self.llm.generate(batch, params, use_tqdm=False)
        _synchronize(torch, self.job.device)
        seconds = time.perf_counter() - begin
        if [len(answer.outputs[0].token_ids) for answer in answers] != [new_tokens] * count:
            raise RuntimeError("vLLM generated other numbers of tokens than were asked for")
        return seconds

    def _step_ms(self, work: Work, seed: int) -> float:
        """Milliseconds per step: the difference of two lengths of the output, as the anchors were measured."""
        short, long = (
            self._seconds(work.requests, work.prompt_tokens, 1 + steps, 2 * seed + i)
            for i, steps in enumerate((SHORT, LONG))
        )
        return (long - short) / (LONG - SHORT) * 1e3


# ---- transformers, kvpress ---------------------------------------------------------------------------------------


class KVPress:
    """transformers with SDPA attention, eager: without a press, then with kvpress's, as far as they can be imported."""

    def __init__(self, job: Job):
        import torch
        import transformers

        self.job, self.versions = job, {"transformers": transformers.__version__}
        config = transformers.AutoConfig.from_pretrained(job.model)
        dtype = torch.float32 if job.device == "cpu" else torch.bfloat16
        load = transformers.AutoModelForCausalLM.from_config
        with torch.device(job.device):
            self.model = load(config, dtype=dtype, attn_implementation="sdpa").eval()

    def measure(self, work: Work, output: Output) -> None:
        """All cases of a workload; one that fails is said to, and the next goes on."""
        import torch

        for method, retention in KVPRESS_CASES:
            engine = "transformers" if method == "none" else "kvpress"
            entry = output.entry(work, engine=engine, method=method, retention=retention, versions=self.versions)
            try:
                self._case(work, output, entry)
            except ImportError as error:
                entry["skipped"] = f"kvpress cannot be imported: {error}"
            except Exception as error:
                entry["error"] = _said(error)
                traceback.print_exc()
            output.write()
            if self.job.device == "cuda":
                torch.cuda.empty_cache()

    def _case(self, work: Work, output: Output, entry: dict[str, Any]) -> None:
        press = _press(entry["method"], entry["retention"])
        transformers_sample(self.model, press, self.job, work, 900)
        for repeat in range(work.repeats):
            prefill_s, step_ms, kv_bytes = transformers_sample(self.model, press, self.job, work, repeat)
            value = step_ms if work.metric == "ms/step" else work.value(prefill_s)
            output.add(entry, value, kv_bytes_per_sequence=kv_bytes / work.requests)


def _press(method: str, retention: float) -> Any:
    """kvpress's object for a method; its ratio is the fraction that is removed."""
    if method == "none":
        return None
    import kvpress

    cls = {"compactor": kvpress.CompactorPress, "snapkv": kvpress.SnapKVPress}[method]
    return cls(compression_ratio=1 - retention)


def transformers_sample(model: Any, press: Any, job: Job, work: Work, seed: int) -> tuple[float, float, int]:
    """(seconds to prefill all prompts one by one, milliseconds per decode step of all, bytes of all caches)."""
    import torch

    ids = torch.tensor(random_prompts(work.requests, work.prompt_tokens, seed, job.vocab), device=job.device)
    with torch.inference_mode():
        _synchronize(torch, job.device)
        begin = time.perf_counter()
        caches, tokens = _prefill_each(model, press, ids)
        _synchronize(torch, job.device)
        prefill_s = time.perf_counter() - begin
        step_ms = 0.0
        cache = _merged(caches)
        kv_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        if work.metric == "ms/step":
            step_ms = _decode_ms(model, cache, tokens, job.device, work)
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


def _decode_ms(model: Any, cache: Any, tokens: Any, device: str, work: Work) -> float:
    import torch

    timed = min(TIMED_STEPS, 3 * work.new_tokens // 4)
    times = [time.perf_counter()]
    for step in range(work.new_tokens - 1):
        position = torch.full_like(tokens, work.prompt_tokens + step)
        logits = model(input_ids=tokens, past_key_values=cache, position_ids=position, use_cache=True).logits
        tokens = logits[:, -1].argmax(-1, keepdim=True)
        _synchronize(torch, device)
        times.append(time.perf_counter())
    return (times[-1] - times[-1 - timed]) / timed * 1e3


def _synchronize(torch: Any, device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# ---- the process -------------------------------------------------------------------------------------------------


PEERS: dict[str, type[VLLM] | type[KVPress]] = {"vllm": VLLM, "kvpress": KVPress}


def run(job: Job) -> None:
    """Runs a job; what cannot be imported, and what fails, is said in its file: of a peer that does not start, of each
    workload."""
    output = Output(job.out)
    try:
        peer = PEERS[job.peer](job)
    except Exception as error:
        traceback.print_exc()
        missing, text = isinstance(error, ImportError), _said(error)
        for work in job.works:
            said = ("skipped", f"{job.peer} cannot be imported: {text}") if missing else ("error", text)
            output.note(job.peer, work, *said)
        return
    for work in job.works:
        try:
            peer.measure(work, output)
        except Exception as error:
            traceback.print_exc()
            output.note(job.peer, work, "error", _said(error))


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:300]}"


def main(argv: list[str]) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    run(Job.from_json(argv[0]))


if __name__ == "__main__":
    main(sys.argv[1:])
