"""Greedy tokens of the built-in model: a GPU against a CPU, and the attention backends among themselves.

    PYTHONPATH=src python -m benchmarks.agreement --device cpu           # once: plain PyTorch, float32: the reference
    PYTHONPATH=src python -m benchmarks.agreement --device cuda          # float32 against it; the backends in bfloat16
    PYTHONPATH=src python -m benchmarks.agreement --device cpu --check   # the CPU in smaller batches against it

Every built-in method enters, RANDOM too: its scores are integer arithmetic, the same numbers everywhere. Few tokens are
protected, so that scores decide even where a tenth is kept.

A float32 row says how many of the prompts had the same answer, for how many each layer kept the same (token, KV head)
pairs, and the seconds that it took. Where two answers part, it says after how many tokens, and shows why:

    margin      how far apart, in nats, the reference's two best tokens are at that place
    layers      that keep different pairs of the prompt. A prompt attends to all of itself, so that what one layer
                keeps has no part in the scores of another. If there are any, the CPU has computed the prompt anew:
    again       whose answer and pairs that gave, "the reference's", "the device's" or "neither"
    pairs, of   how many pairs only one of the two keeps, and how many are kept
    distance    how far the score of such a pair lies above the lowest that its device keeps of the layer, at most; in
                median deviations of the scores that it keeps. Protected tokens do not count
    relative    the same as a fraction of that lowest score
    noise       median difference of a score that both keep, in the unit of `distance`; of the worst layer
    tie         "logits": the margin is within rounding (`LOGITS_TIE`); "scores": so are `distance` and `relative`
                (`SCORES_TIE`); "again": the CPU itself came to the device's answer; null: none of them

`drift` is the largest difference of margins between the devices in the answers to "none", as far as they are the same.
The program ends with status 1 where float32 answers part without a tie.

Shape suffix: P the pairs that a layer keeps of a prompt.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.engine_report import machine
from benchmarks.kept_pairs import kept_pairs, scoring_methods
from benchmarks.timing import gpu_name, write_results
from compactor_vllm import (
    LLM,
    BatchCompressionParams,
    LLMConfig,
    SamplingParams,
    SequenceCompressionParams,
)
from compactor_vllm.evaluation.tasks.niah import make_samples
from compactor_vllm.utils.sequence import Sequence

MODEL = "smollm2-135m-instruct"
NEW_TOKENS = 12
RATIOS = (1.0, 0.5, 0.25, 0.1)
PROTECTED: dict[str, Any] = {"protected_first_tokens": 4, "protected_last_tokens": 8}
BACKENDS = ("compactor_triton", "flash_attention", "torch")
REFERENCE = Path(__file__).parent / "results" / "agreement-cpu.json"
LOGITS_TIE = 1e-3
"""Largest `margin`, in nats, of a tie."""
SCORES_TIE = 1e-3
"""Largest `distance`, and largest `relative`, of a tie."""
MOST_AGAIN = 8
"""Prompts of a case that the CPU computes again."""

Case = tuple[str, float]
Row = dict[str, Any]


def cases() -> list[Case]:
    """The built-in methods at every ratio; what keeps everything at one."""
    return [("none", 1.0), *((name, ratio) for name in scoring_methods() for ratio in RATIOS)]


def label(case: Case) -> str:
    return f"{case[0]} {case[1]}"


# ---- answers ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What a layer keeps of a prompt.

    Attributes:
        pairs_P: int64, position * KV heads + head, ascending.
        scores_P: float32, what they were kept for; zeros where everything is kept.
        free_P: bool, those that are not protected.
    """

    pairs_P: np.ndarray
    scores_P: np.ndarray
    free_P: np.ndarray

    def where(self, chosen_P: np.ndarray) -> Layer:
        """Some of the pairs, by a mask or by their indices."""
        return Layer(pairs_P=self.pairs_P[chosen_P], scores_P=self.scores_P[chosen_P], free_P=self.free_P[chosen_P])


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The answer to a prompt.

    Attributes:
        tokens: what was generated.
        margins: for each of them, how far apart the log-probabilities of the two best tokens are; None if not asked.
        kept: eight hexadecimal digits of a hash for each layer, of the prompt's pairs that it keeps.
        layers: these pairs; an answer from a file has none.
    """

    tokens: list[int]
    margins: list[float] | None
    kept: str
    layers: tuple[Layer, ...] = ()


def prompts(llm: LLM, count: int) -> list[list[int]]:
    """Beginnings, 150 to 450 tokens long, of needle prompts."""
    samples = make_samples("niah_multikey_2", llm.tokenizer, length=512, count=count)
    rows = [llm.tokenizer(sample.prompt)["input_ids"] for sample in samples]
    return [row[: 150 + 61 * i % 300] for i, row in enumerate(rows)]


def answers(llm: LLM, inputs: list[list[int]], case: Case, margins: bool) -> list[Answer]:
    """The answers of one batch, which the engine can run at once."""
    logprobs = 2 if margins else None
    sampling = SamplingParams(temperature=0, max_new_tokens=NEW_TOKENS, ignore_eos=True, logprobs=logprobs)
    params = SequenceCompressionParams(compression_ratio=case[1], **PROTECTED)
    batch = BatchCompressionParams(compression_method=case[0])
    options: dict[str, Any] = {"return_sequences": True, "extend_context": True}  # what is kept stays until it is read
    sequences = llm.generate(inputs, sampling, batch, params, **options)
    return [answer(llm, index, sequence) for index, sequence in enumerate(sequences)]


def answer(llm: LLM, index: int, sequence: Sequence) -> Answer:
    """A finished sequence's answer and what is kept of its prompt, which is freed."""
    if sequence.error is not None:
        raise SystemExit(f"answer {index} failed: {sequence.error}")
    margins = None
    if sequence.logprobs is not None:
        best = [sorted(entry.values(), reverse=True) for entry in sequence.logprobs]
        margins = [round(values[0] - values[1], 6) for values in best]
    with sequence.extended_context:
        layers = tuple(kept_layers(llm, sequence))
    hashes = [blake2b(layer.pairs_P.astype("<i8").tobytes(), digest_size=4).hexdigest() for layer in layers]
    return Answer(tokens=sequence.output_token_ids, margins=margins, kept="".join(hashes), layers=layers)


def kept_layers(llm: LLM, sequence: Sequence) -> Iterator[Layer]:
    """What each layer keeps of a prompt, from the segment that its context begins with."""
    engine, context, length = llm._engine, sequence.extended_context, len(sequence.prompt_token_ids)
    first, last = PROTECTED["protected_first_tokens"], PROTECTED["protected_last_tokens"]
    with engine.scheduler.reading(context):
        segment = context.segments[0]
        assert segment.num_tokens >= length, "the prompt lies in several segments"
        for positions_P, heads_P, scores_P in kept_pairs(engine, segment):
            pairs_P = positions_P.astype(np.int64) * llm.spec.num_kv_heads + heads_P
            free_P = (positions_P >= first) & (positions_P < length - last)
            order = np.argsort(pairs_P)
            prompt = order[positions_P[order] < length]
            yield Layer(pairs_P=pairs_P, scores_P=scores_P, free_P=free_P).where(prompt)


# ---- comparison ------------------------------------------------------------------------------------------------------


def compare(got: list[Answer], want: list[Answer]) -> Row:
    """How many answers are the same, and where the others part; margins are those of `want`, where it has them."""
    partings = []
    for index, (mine, theirs) in enumerate(zip(got, want, strict=True)):
        place = parting(mine, theirs)
        if place is not None:
            margin = theirs.margins[place] if theirs.margins is not None else None
            partings.append({"prompt": index, "token": place, "margin": margin})
    return {"same": len(got) - len(partings), "of": len(got), "partings": partings}


def parting(mine: Answer, theirs: Answer) -> int | None:
    """Where two answers part; None if they are the same."""
    pairs = zip(mine.tokens, theirs.tokens, strict=True)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), None)


def drift(got: list[Answer], want: list[Answer]) -> float:
    """The largest difference of two margins, as far as answers are the same."""
    largest = 0.0
    for mine, theirs in zip(got, want, strict=True):
        assert mine.margins is not None and theirs.margins is not None
        pairs = zip(mine.margins, theirs.margins, strict=True)
        largest = max([largest, *(abs(a - b) for a, b in list(pairs)[: parting(mine, theirs)])])
    return round(largest, 6)


def near_threshold(mine: Answer, theirs: Answer) -> Row:
    """Where two selections of a prompt differ, and how close to the threshold; see the top of the file."""
    layers, pairs, distance, relative, noise = 0, 0, 0.0, 0.0, 0.0
    for both in zip(mine.layers, theirs.layers, strict=True):
        a, b = (layer.where(layer.free_P) for layer in both)
        layers += not np.array_equal(a.pairs_P, b.pairs_P)
        for one, other in ((a, b), (b, a)):
            alone_P = ~np.isin(one.pairs_P, other.pairs_P)
            if alone_P.any():
                pairs += int(alone_P.sum())
                limit = float(one.scores_P.min())
                above = float(one.scores_P[alone_P].max()) - limit
                distance, relative = max(distance, above / spread(one)), max(relative, above / (abs(limit) or 1e-30))
                _, in_one, in_other = np.intersect1d(one.pairs_P, other.pairs_P, return_indices=True)
                if len(in_one):
                    differences = np.abs(one.scores_P[in_one] - other.scores_P[in_other])
                    noise = max(noise, float(np.median(differences)) / spread(one))
    measured = {"distance": distance, "relative": relative, "noise": noise}
    kept = sum(len(layer.pairs_P) for layer in theirs.layers)
    return {"layers": layers, "pairs": pairs, "of": kept, **{k: float(f"{v:.3g}") for k, v in measured.items()}}


def spread(layer: Layer) -> float:
    """The median deviation of its scores, which a few large ones do not widen."""
    deviations_P = np.abs(layer.scores_P - np.median(layer.scores_P))
    return float(np.median(deviations_P)) or float(deviations_P.mean()) or 1.0


def tie(found: Row) -> str | None:
    """What is within rounding where two answers part."""
    if found["margin"] <= LOGITS_TIE:
        return "logits"
    if found.get("again") == "the device's":
        return "again"
    within = found.get("pairs", 0) > 0 and max(found["distance"], found["relative"]) <= SCORES_TIE
    return "scores" if within else None


def explain(partings: list[Row], got: list[Answer], want: list[Answer], again: Callable[[int], Answer]) -> None:
    """Adds to each parting what was kept, and why it is a tie.

    Args:
        again: computes the reference's answer to a prompt anew.
    """
    looked = 0
    for found in partings:
        mine, theirs = got[found["prompt"]], want[found["prompt"]]
        if mine.kept == theirs.kept:
            found["layers"] = 0
        elif looked < MOST_AGAIN:
            looked += 1
            anew = again(found["prompt"])
            found |= near_threshold(mine, anew)
            known = {(*mine.tokens, mine.kept): "the device's", (*theirs.tokens, theirs.kept): "the reference's"}
            found["again"] = known.get((*anew.tokens, anew.kept), "neither")
        found["tie"] = tie(found)


# ---- what is measured ------------------------------------------------------------------------------------------------


def engine(device: str, dtype: str, backend: str, sequences: int = 40) -> LLM:
    config = LLMConfig(
        model=MODEL, device=device, dtype=dtype, attention_backend=backend, max_num_seqs=sequences, max_model_len=1024,
        kv_cache_memory_bytes=2 * 2**30, prefix_cache=False, show_progress_bar=False,
    )  # fmt: skip
    llm = LLM(config)
    kernels = llm.describe()["kernels"]
    torch_runs = [name for name in kernels.values() if name.startswith("torch")]
    assert kernels["backend"] == backend and not (backend == "compactor_triton" and torch_runs), kernels
    return llm


def write_reference(count: int) -> None:
    rows: dict[str, list[Row]] = {}
    with engine("cpu", "float32", "torch") as llm:
        inputs = prompts(llm, count)
        for case in cases():
            begin = time.perf_counter()
            found = answers(llm, inputs, case, True)
            rows[label(case)] = [{"tokens": a.tokens, "margins": a.margins, "kept": a.kept} for a in found]
            print(f"{label(case):<24}{time.perf_counter() - begin:6.1f} s", flush=True)
    REFERENCE.write_text(json.dumps({**machine(), "model": MODEL, "prompts": inputs, "answers": rows}) + "\n")
    print(REFERENCE)


def read_reference(count: int) -> tuple[list[list[int]], dict[str, list[Answer]]]:
    """The first prompts of the reference, and their answers in every case."""
    reference = json.loads(REFERENCE.read_text())
    if list(reference["answers"]) != [label(case) for case in cases()]:
        raise SystemExit(f"{REFERENCE} is about other methods or ratios; make it anew with --device cpu")
    want = {name: [Answer(**row) for row in rows[:count]] for name, rows in reference["answers"].items()}
    return reference["prompts"][:count], want


def reference_rows(make: Callable[[], LLM], count: int, batch: int = 40) -> Iterator[Row]:
    """An engine's answers against the reference's.

    Args:
        make: makes the engine.
        count: prompts.
        batch: of how many at a time.
    """
    inputs, want = read_reference(count)
    with ExitStack() as stack:
        llm = stack.enter_context(make())
        kernels = llm.describe()["kernels"]["backend"]
        cpu = cache(lambda: stack.enter_context(engine("cpu", "float32", "torch", 1)))
        for case in cases():
            begin, theirs = time.perf_counter(), want[label(case)]
            full = case[0] == "none"
            got = [a for i in range(0, count, batch) for a in answers(llm, inputs[i : i + batch], case, margins=full)]
            row = {"case": label(case), "what": f"float32, {kernels} against the CPU", **compare(got, theirs)}
            row["same_pairs"] = sum(a.kept == b.kept for a, b in zip(got, theirs, strict=True))
            if full:
                row["drift"] = drift(got, theirs)
            explain(row["partings"], got, theirs, lambda i, case=case: answers(cpu(), [inputs[i]], case, True)[0])  # type: ignore[misc]
            yield {**row, "seconds": round(time.perf_counter() - begin, 2)}


def backends_rows(count: int) -> Iterator[Row]:
    """The backends among themselves, in bfloat16."""
    inputs, _ = read_reference(count)
    want: dict[str, list[Answer]] = {}
    for backend in BACKENDS[::-1]:  # PyTorch first: the others are compared with it
        with engine("cuda", "bfloat16", backend) as llm:
            for case in (("none", 1.0), ("compactor", 0.5)):
                got = answers(llm, inputs, case, backend == "torch")
                if want.setdefault(label(case), got) is not got:
                    row = {"case": label(case), "what": f"bfloat16, {backend} against torch"}
                    yield {**row, **compare(got, want[label(case)])}


def measure(dtypes: list[str], count: int, out: str | None) -> list[Row]:
    """Measures the parts asked for, beside the rows of the others in the file of an earlier run."""
    earlier = REFERENCE.with_name(f"agreement-{gpu_name()}.json")
    rows = json.loads(earlier.read_text())["rows"] if earlier.exists() else []
    rows = [row for row in rows if row["what"].split(",")[0] not in dtypes]
    parts = {
        "float32": lambda: reference_rows(lambda: engine("cuda", "float32", "compactor_triton"), count),
        "bfloat16": lambda: backends_rows(count),  # some minutes: PyTorch's attention loops over sequences and heads
    }
    for dtype in [dtype for dtype in parts if dtype in dtypes]:
        for row in parts[dtype]():
            rows.append(row)
            print(row, flush=True)
            path = write_results("agreement", rows, {"model": MODEL}, out)  # a run that is cut short keeps its rows
    print(path)
    return rows


def check(count: int) -> list[Row]:
    """The CPU in smaller batches, whose sums round differently, against the reference; writes nothing."""
    rows = []
    for row in reference_rows(lambda: engine("cpu", "float32", "torch", 8), count, 8):
        rows.append(row)
        print(row, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--check", action="store_true", help="on a CPU: compare with the reference, do not replace it")
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--prompts", type=int, default=40, help="how many, the first ones")
    parser.add_argument("--out", help="folder of a GPU's JSON file (default: $OUT or benchmarks/results)")
    options = parser.parse_args()
    if options.device == "cpu" and not options.check:
        return write_reference(options.prompts)
    rows = check(options.prompts) if options.check else measure(options.dtype, options.prompts, options.out)
    unexplained = [row["case"] for row in rows if any(found.get("tie", "") is None for found in row["partings"])]
    if unexplained:
        raise SystemExit(f"answers part, and that is no tie: {', '.join(unexplained)}")


if __name__ == "__main__":
    main()
