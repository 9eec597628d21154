"""Runs: their directory, the grid, records, label-free measures, and the command with a tiny model."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.calibration_test import summary
from compactor_vllm import LLM, LLMConfig, SamplingParams, Sequence, SequenceCompressionParams
from compactor_vllm.cli.main import main
from compactor_vllm.cli.many_values import repeated
from compactor_vllm.compression.calibration import load_calibrations, mean_nll, predicted_quality, probe_window
from compactor_vllm.errors import CompactorError, InvalidInputError
from compactor_vllm.evaluation.label_free import compare, continuation_sample, divergence
from compactor_vllm.evaluation.run_config import MethodChoice, RunConfig
from compactor_vllm.evaluation.run_directory import RunDirectory, cell_measures, metrics
from compactor_vllm.evaluation.runner import Answers, Shard, TaskSource, prompt_of, run_grid
from compactor_vllm.evaluation.tasks.sample import Sample
from tests.tiny import save_tiny

CONFIG = RunConfig(
    suite="ruler", model="org/tiny", methods=["keydiff"], retentions=[1, 0.5], tasks=["t"], lengths=[64], samples=4
)


class Letters:
    """A token a character; the chat template is brackets."""

    chat_template = "letters"

    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [0] * add_special_tokens + [ord(c) for c in text]}

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
        return f"<{messages[0]['content']}>A:"


class Engine:
    """Answers every prompt with `reply(text, ratio)` and remembers the calls."""

    def __init__(self, reply=lambda text, ratio: "42") -> None:
        self.reply, self.tokenizer, self.calls = reply, Letters(), []

    def generate(self, prompts, sampling, batch, compressions, return_sequences: bool) -> list[SimpleNamespace]:
        self.calls.append((prompts, sampling, batch, compressions))
        texts = ["".join(map(chr, prompt)) for prompt in prompts]
        return [
            SimpleNamespace(
                text=self.reply(text, c.compression_ratio),
                finish_reason="stop",
                error=None,
                prompt_token_ids=prompt,
                output_token_ids=[1, 2],
                chosen_ratio=None,
                kept_fraction=c.compression_ratio,
                kv_bytes=int(1000 * c.compression_ratio),
                kv_bytes_full=1000,
            )
            for text, prompt, c in zip(texts, prompts, compressions, strict=True)
        ]


def sample(index: int) -> Sample:
    return Sample("t", f"context {index} ", "question? ", "answer:", ["42"], 8, depth=index / 3)


def source(count: int = 4) -> TaskSource:
    return TaskSource(task="t", length=64, count=count, make=sample)


CELLS = CONFIG.cells([MethodChoice.parse("keydiff")])


# ---- configuration ------------------------------------------------------------------------------------------------


def test_methods_are_parsed_with_their_options() -> None:
    assert MethodChoice.parse("snapkv") == MethodChoice(label="snapkv", method="snapkv")
    choice = MethodChoice.parse("dir/my file.py:Mine[window=64, pool_kind=max,flag=True]")
    assert choice.method == "dir/my file.py:Mine" and choice.options == {"window": 64, "pool_kind": "max", "flag": True}
    for wrong in ("a[b", "a[b]", "a[1=2]", "[x=1]", ""):
        with pytest.raises(InvalidInputError):
            MethodChoice.parse(wrong)
    with pytest.raises(InvalidInputError, match="no option 'windw'"):
        MethodChoice.parse("snapkv[windw=3]").resolve()


def test_the_full_cache_is_one_cell() -> None:
    config = replace(CONFIG, retentions=[0.25, 1.0, 0.5])
    cells = config.cells([MethodChoice.parse(m) for m in ("none", "keydiff", "knorm")])
    grid = [(cell.choice.label, cell.retention) for cell in cells]
    assert grid == [("none", 1.0), ("keydiff", 0.5), ("keydiff", 0.25), ("knorm", 0.5), ("knorm", 0.25)]
    for wrong in ({"samples": 0}, {"retentions": [0.0]}, {"retentions": [1.1]}):
        with pytest.raises(InvalidInputError):
            replace(CONFIG, **wrong)


def test_the_question_follows_the_context_or_belongs_to_it() -> None:
    for aware, context in ((False, "<context 1 "), (True, "<context 1 question? ")):
        prompt = prompt_of(Letters(), sample(1), aware)
        text = "".join(map(chr, prompt.token_ids))
        assert text == "<context 1 question? >A:answer:" and text[: prompt.context_end] == context
        raw = prompt_of(Letters(), replace(sample(1), chat=False), aware)
        assert raw.token_ids[0] == 0 and raw.context_end == len(context)
        assert "".join(map(chr, raw.token_ids[1:])) == "context 1 question? answer:"


def test_values_may_follow_one_option() -> None:
    given = ["--ratio", "1", "0.5", "--out", "x", "y", "--task=a", "b", "-m", "z", "--ratio", "0.1"]
    assert repeated(given, {"--ratio", "--task"}) == [
        *("--ratio", "1", "--ratio", "0.5", "--out", "x", "y", "--task=a", "b", "-m", "z", "--ratio", "0.1")
    ]
    assert repeated(["--ratio", "1", "--", "2"], {"--ratio"}) == ["--ratio", "1", "--", "2"]


# ---- the directory and the grid -----------------------------------------------------------------------------------


def test_a_grid_is_measured_once(tmp_path: Path) -> None:
    llm = Engine(lambda text, ratio: "It is 42" if ratio == 1 or "context 3" in text else "no")
    run_grid([source()], CELLS, Answers(llm, CONFIG), RunDirectory.create(tmp_path / "run", CONFIG), batch_size=3)
    assert [len(prompts) for prompts, *_ in llm.calls] == [6, 2]  # three samples, then one, under two cells
    prompts, sampling, batch, compressions = llm.calls[0]
    assert "".join(map(chr, prompts[5])) == "<context 2 question? >A:answer:" and prompts[5] is prompts[4]
    assert sampling[3].greedy and sampling[3].max_new_tokens == 8 and batch.compression_type == "layer"
    assert [c.compression_ratio for c in compressions] == [1, 0.5, 1, 0.5, 1, 0.5]
    assert compressions[3].compression_method == "keydiff" and compressions[3].context_end == len("<context 1 ")
    result = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert [(c["method"], c["retention"], c["string_match"]) for c in result["cells"]] == [
        *(("keydiff", 0.5, 25.0), ("none", 1.0, 100.0))
    ]
    assert result["cells"][0]["kv_bytes"] == 500 and result["cells"][0]["samples"] == 4
    assert result["kvpress"] == {
        "ruler__64__org--tiny__no_press__0": {"t": {"string_match": 100.0}},
        "ruler__64__org--tiny__keydiff__0.5": {"t": {"string_match": 25.0}},
    }
    again = RunDirectory.create(tmp_path / "run", replace(CONFIG, methods=["knorm"], samples=5))
    assert again.config["methods"] == ["keydiff", "knorm"] and again.config["samples"] == 5
    run_grid([source(5)], CELLS, Answers(llm, CONFIG), again, batch_size=3)
    assert [len(prompts) for prompts, *_ in llm.calls[2:]] == [2]
    record = again.records["t", 64, 1, "none", 1.0]
    assert record["depth"] == 0.3333 and record["prediction"] == "It is 42" and record["answers"] == ["42"]


def test_calls_of_one_cell_are_timed(tmp_path: Path) -> None:
    llm, directory = Engine(), RunDirectory.create(tmp_path, CONFIG)
    run_grid([source(2)], CELLS, Answers(llm, CONFIG), directory, apart=True)
    assert [len(prompts) for prompts, *_ in llm.calls] == [2, 2]
    assert all(r["seconds"] >= 0 and r["tokens"] == r["prompt_tokens"] + 2 for r in directory.records.values())
    mixed = RunDirectory.create(tmp_path / "mixed", CONFIG)
    run_grid([source(2)], CELLS, Answers(llm, CONFIG), mixed)
    assert not any("seconds" in record for record in mixed.records.values())


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_shards_are_the_whole_and_even(count: int) -> None:
    sources = [TaskSource(task=name, length=64, count=13, make=sample) for name in "abcdef"]
    shares = [Shard(index, count).of(sources, 2) for index in range(count)]
    whole = sorted((s.task, r.start, r.stop) for share in shares for s, r in share)
    assert whole == [(name, begin, min(begin + 2, 13)) for name in "abcdef" for begin in range(0, 13, 2)]
    for name in "abcdef":  # no process has much more of a long task than others
        numbers = [sum(s.task == name for s, _ in share) for share in shares]
        assert max(numbers) - min(numbers) <= 1
    for share in shares:  # what is broken off has about as many samples of each task
        assert [r.start for _, r in share] == sorted(r.start for _, r in share)


def test_shards_of_a_run_share_its_directory(tmp_path: Path) -> None:
    llm = Engine()
    for index in (0, 1):
        directory = RunDirectory.create(tmp_path, CONFIG, f"predictions-{index}-of-2.jsonl")
        assert run_grid([source()], CELLS, Answers(llm, CONFIG), directory, batch_size=1, shard=Shard(index, 2))
    assert len(llm.calls) == 4 and all(len(prompts) == 2 for prompts, *_ in llm.calls)
    assert len(RunDirectory.load(tmp_path).records) == 8
    whole = RunDirectory.create(tmp_path, CONFIG)
    run_grid([source()], CELLS, Answers(llm, CONFIG), whole)
    assert len(llm.calls) == 4  # all was there
    for wrong in ("2/2", "1", "a/b", "-1/2", "0/0"):
        with pytest.raises(InvalidInputError, match="shard"):
            Shard.parse(wrong)
    assert Shard.parse("1/4") == Shard(1, 4)


def test_nothing_begins_that_would_end_after_the_time_limit(tmp_path: Path, monkeypatch) -> None:
    clock = iter(range(0, 1000, 10))  # every look at the clock is ten seconds later
    monkeypatch.setattr("compactor_vllm.evaluation.runner.time.monotonic", lambda: float(next(clock)))
    llm, directory = Engine(), RunDirectory.create(tmp_path, CONFIG)
    # A batch takes 10 s, and begins 10, 30, 50 s after the start.
    assert not run_grid([source()], CELLS, Answers(llm, CONFIG), directory, batch_size=1, time_limit=41)
    assert len(llm.calls) == 2 and len(directory.records) == 4


def test_a_packed_run_is_the_same_run(tmp_path: Path) -> None:
    llm, directory = Engine(), RunDirectory.create(tmp_path / "run", CONFIG)
    run_grid([source()], CELLS, Answers(llm, CONFIG), directory)
    directory.pack(tmp_path / "packed")
    RunDirectory.load(tmp_path / "packed").pack(tmp_path / "again")
    files = [tmp_path / name / "predictions.jsonl.xz" for name in ("packed", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()
    packed = RunDirectory.load(tmp_path / "packed")
    assert packed.records == directory.records and packed.write_metrics() == directory.write_metrics()
    run_grid([source(5)], CELLS, Answers(llm, CONFIG), RunDirectory.create(tmp_path / "packed", CONFIG))
    assert len(llm.calls[-1][0]) == 2 and len(RunDirectory.load(tmp_path / "packed").records) == 10
    with pytest.raises(InvalidInputError, match="not empty"):
        directory.pack(tmp_path / "packed")


def test_a_broken_line_is_cut_off_and_measured_again(tmp_path: Path) -> None:
    llm = Engine()
    run_grid([source(2)], CELLS[:1], Answers(llm, CONFIG), RunDirectory.create(tmp_path, CONFIG))
    file = tmp_path / "predictions.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    directory = RunDirectory.create(tmp_path, CONFIG)
    assert len(directory.records) == 1 and file.read_bytes() == whole.splitlines(keepends=True)[0]
    run_grid([source(2)], CELLS[:1], Answers(llm, CONFIG), directory)
    assert len(RunDirectory.load(tmp_path).records) == 2 and len(file.read_text().splitlines()) == 2


def test_a_directory_holds_one_run(tmp_path: Path) -> None:
    RunDirectory.create(tmp_path / "run", CONFIG)
    with pytest.raises(InvalidInputError, match=r"holds a run with seed=0, not 1; choose another --out"):
        RunDirectory.create(tmp_path / "run", replace(CONFIG, seed=1))
    (tmp_path / "file").write_text("x")
    with pytest.raises(InvalidInputError, match="is not empty and holds no run"):
        RunDirectory.create(tmp_path, CONFIG)
    with pytest.raises(InvalidInputError, match=r"holds no run: it has no config\.json"):
        RunDirectory.load(tmp_path)


def test_a_failed_answer_ends_the_run_and_keeps_what_was_done(tmp_path: Path) -> None:
    llm, directory = Engine(), RunDirectory.create(tmp_path, CONFIG)
    answer = llm.generate

    def fails(*args: Any, **more: Any) -> list[SimpleNamespace]:
        sequences = answer(*args, **more)
        if len(llm.calls) > 1:
            sequences[0].finish_reason, sequences[0].error = "error", "no pages"
        return sequences

    llm.generate = fails  # type: ignore[method-assign]
    with pytest.raises(CompactorError, match="could not be finished: no pages"):
        run_grid([source()], CELLS, Answers(llm, CONFIG), directory, batch_size=2)
    assert len(RunDirectory.load(tmp_path).records) == 4  # the first batch


def test_measures_of_groups() -> None:
    rows = [
        {"score": score, "metric": "choice", "groups": {"difficulty": level}}
        for score, level in ((1, "easy"), (0, "hard"), (1, "hard"))
    ]
    assert cell_measures(rows) == {"choice": 66.67, "choice_easy": 100.0, "choice_hard": 50.0}
    assert metrics({}, []) == {"cells": [], "kvpress": {}}


# ---- label-free ---------------------------------------------------------------------------------------------------


def test_label_free_measures_by_hand() -> None:
    log = math.log
    full = [{1: log(0.5), 2: log(0.25)}, {3: log(0.8), 4: log(0.1)}]
    own = [{2: log(0.5), 1: log(0.25)}, {3: log(0.4), 5: log(0.3)}]
    result = compare(full, own, [1, 3])
    assert result["nll_full"] == pytest.approx(-(log(0.5) + log(0.8)) / 2)
    assert result["nll"] == pytest.approx(-(log(0.25) + log(0.4)) / 2)
    assert result["nll_ratio"] == pytest.approx(result["nll_full"] / result["nll"]) and result["top1"] == 0.5
    first = 0.5 * log(0.5 / 0.25) + 0.25 * log(0.25 / 0.5)  # both leave 0.25 for the rest
    second = 0.8 * log(0.8 / 0.4) + 0.2 * log(0.2 / 0.6)  # only token 3 is in both
    assert result["kl"] == pytest.approx((first + second) / 2)
    same = compare(full, full, [1, 3])
    assert (same["nll_ratio"], same["top1"], same["kl"]) == (1.0, 1.0, 0.0)


def test_the_divergence_is_a_lower_bound_that_listing_more_tokens_raises() -> None:
    p, q = [0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]
    exact = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    bounds = []
    for listed in range(1, 5):
        first, second = ({t: math.log(x[t]) for t in range(listed)} for x in (p, q))
        bounds.append(divergence(first, second))
    assert bounds == sorted(bounds) and bounds[-1] == pytest.approx(exact) and bounds[0] > 0


def test_continuations(tokenizer) -> None:
    one = continuation_sample(tokenizer, length=300, target=40, seed=1)
    text = one.context + one.answers[0]
    assert len(tokenizer.encode(text, add_special_tokens=False)) == pytest.approx(300, abs=2)
    assert one == continuation_sample(tokenizer, length=300, target=40, seed=1)
    assert one != continuation_sample(tokenizer, length=300, target=40, seed=2) and not one.chat
    mine = continuation_sample(tokenizer, length=60, target=10, text=["The grass is green.", "The sky is blue."])
    assert "The grass is green. The sky is blue. The grass" in mine.context and "Ada" not in mine.context
    with pytest.raises(InvalidInputError, match="must be more than the 64 tokens"):
        continuation_sample(tokenizer, length=64)


# ---- the command, with an engine ----------------------------------------------------------------------------------


def call(capsys, *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main(["eval", *map(str, arguments)])
    captured = capsys.readouterr()
    return int(exit_.value.code or 0), captured.out, captured.err


MINE = """
from dataclasses import dataclass
from compactor_vllm.compression import BaseCompressionMethod

@dataclass(frozen=True, kw_only=True)
class Mine(BaseCompressionMethod):
    sign: float = 1.0

    def post_rope_scoring(self, q, k, v, early, context):
        return self.sign * context.positions_T.float()[:, None].expand(k.shape[:2]).contiguous()
"""


def test_ruler_with_a_method_of_ones_own(tiny_checkpoint: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    out, mine = tmp_path / "run", f"{tmp_path}/mine.py:Mine[sign=-1]"
    arguments = ["ruler", "--model", tiny_checkpoint, "--device", "cpu", "--task", "fwe", "niah_multikey_1"]
    arguments += ["--length", 1100, "--samples", 1, "--max-new-tokens", 4, "--out", out]
    code, printed, _ = call(capsys, *arguments, "--method", "expected_attention", mine, "--discard", 0, 0.75, "--json")
    assert code == 0
    cells = json.loads(printed)["cells"]
    assert {(c["task"], c["method"], c["retention"]) for c in cells} == {
        (task, method, kept)
        for task in ("fwe", "niah_multikey_1")
        for method, kept in (("none", 1.0), ("expected_attention", 0.25), (mine, 0.25))
    }
    assert all(c["kept_fraction"] < 0.5 for c in cells if c["retention"] < 1)
    config = json.loads((out / "config.json").read_text())
    assert config["substitutes"] == {"niah_multikey_1": "made-up prose instead of essays"}
    assert config["environment"]["engine"]["device"] == "cpu" and config["retentions"] == [1.0, 0.25]
    code, printed, errors = call(capsys, *arguments, "--method", "expected_attention", "--ratio", 1, 0.25)
    assert code == 0 and "| kept | 100 % | 25 % |" in printed and "made-up prose" in errors
    assert len((out / "predictions.jsonl").read_text().splitlines()) == 6  # nothing was computed again


def test_processes_share_a_run(tiny_checkpoint: Path, tmp_path: Path, capfd) -> None:
    out = tmp_path / "run"
    arguments = [
        "ruler",
        "--model",
        tiny_checkpoint,
        "--device",
        "cpu",
        "--task",
        "fwe",
        "--length",
        1100,
        "--out",
        out,
    ]
    arguments += ["--samples", 2, "--batch-size", 1, "--max-new-tokens", 2, "--ratio", 0.5, "--processes", 2]
    code, _, errors = call(capfd, *arguments, "--time-limit", 0)
    assert code == 75 and "stopped at the time limit" in errors and not RunDirectory.load(out).records
    code, printed, _ = call(capfd, *arguments, "--json")
    assert code == 0 and json.loads(printed)["cells"][0]["samples"] == 2
    assert sorted(len(file.read_text().splitlines()) for file in out.glob("predictions-*-of-2.jsonl")) == [1, 1]
    code, _, errors = call(capfd, *arguments, "--method", "compactor[nonsense=1]")
    assert code == 2 and "of 2 failed" in errors


@pytest.mark.parametrize("first", [0, 1, 30, 40, 41, 55, 64])
def test_log_probabilities_from_one_token_on(tiny_checkpoint: Path, first: int) -> None:
    tokens = [(7 * i) % 250 for i in range(64)]
    with LLM(LLMConfig(model=str(tiny_checkpoint), device="cpu", show_progress_bar=False)) as llm:
        whole, part = (
            Sequence(
                prompt_token_ids=tokens,
                sampling_params=SamplingParams(temperature=0, max_new_tokens=1, prompt_logprobs=2),
                compression_params=SequenceCompressionParams(context_end=40),  # two segments
                prompt_logprobs_from=begin,
            )
            for begin in (0, first)
        )
        llm.generate_from_sequences([whole, part])
    assert whole.prompt_logprobs[0] is None and all(len(entry) >= 2 for entry in whole.prompt_logprobs[1:])
    assert part.prompt_logprobs == [None] * first + whole.prompt_logprobs[first:]


def test_label_free_of_the_full_cache_is_no_change(tiny_checkpoint: Path, tmp_path: Path, capsys) -> None:
    arguments = ["label-free", "--model", tiny_checkpoint, "--device", "cpu", "--task", "continuation", "vt"]
    arguments += ["--length", 1200, "--samples", 1, "--target", 24, "--protected-last", 0]
    code, printed, _ = call(capsys, *arguments, "--ratio", 1, 0.1, "--out", tmp_path / "run", "--json")
    assert code == 0
    cells = json.loads(printed)["cells"]
    full = [c for c in cells if c["method"] == "none"]
    assert [c["nll_ratio"] for c in full] == [1.0, 1.0] and all(c["top1_agreement"] == 100 for c in full)
    assert all(c["kl"] == c["attention_error"] == 0 for c in full)
    rest = [c for c in cells if c["method"] == "compactor"]
    assert len(rest) == 2 and all(0 < c["attention_error"] < 2 for c in rest)
    assert all(c["kl"] > 0 and c["nll"] != f["nll"] for c, f in zip(rest, full, strict=True))


def test_wrong_options_are_said_in_one_line(tiny_checkpoint: Path, tmp_path: Path, capsys) -> None:
    model = ["--model", tiny_checkpoint, "--device", "cpu", "--out", tmp_path / "run"]
    for arguments, message in [
        (["ruler", "--ratio", "0.5", "--discard", "0.5"], "give one of them"),
        (["ruler", "--ratio", "0"], "--ratio must lie in (0, 1]"),
        (["ruler", "--depths", "3"], "--depths has no effect on ruler; it is an option of needle"),
        (["longbench", "--length", "100"], "--length has no effect on longbench"),
        (["ruler", "--method", "compacter", *model], "Did you mean 'compactor'"),
        (["ruler", "--task", "niah", *model], "unknown task 'niah'"),
        (["longbench", *model], "--data DIR with its NAME.jsonl"),
        (["report", tmp_path], "holds no run"),
    ]:
        code, _, errors = call(capsys, *arguments)
        assert code == 2 and message in " ".join(errors.split()), errors
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_promised_table_from_end_to_end(tmp_path: Path, capsys, monkeypatch) -> None:
    """The specification's command, with a recorded sample of each task and a tiny checkpoint of the same family."""
    save_tiny(tmp_path / "Qwen3-8B", "qwen3")
    arguments = ["ruler", "--length", 4096, "--model", tmp_path / "Qwen3-8B", "--method", "compactor", "--samples", 1]
    arguments += ["--discard", 0, 0.25, 0.5, 0.75, 0.9, 0.95, "--device", "cpu", "--max-new-tokens", 2]
    data = Path(__file__).parent / "fixtures"
    code, printed, _ = call(capsys, *arguments, "--data", data, "--out", tmp_path / "run")
    assert code == 0
    lines = printed.splitlines()
    begin = lines.index("| fraction of the cache discarded | 0 | 0.25 | 0.5 | 0.75 | 0.9 | 0.95 |")
    promised, measured = (line.split(" | ") for line in lines[begin + 2 : begin + 4])
    assert promised == ["| Qwen3-8B: promised", "95.01", "94.57", "92.29", "76.48", "44.69", "44.69 |"]
    assert len(measured) == 7 and all("±" in cell for cell in measured[1:])
    records = RunDirectory.load(tmp_path / "run").records
    assert len({key[0] for key in records}) == 13 and len(records) == 13 * 6
    # Without --data the rows come from the data set of the leaderboard, and no other.
    asked = []

    def rows(repository: str, configuration: str, split: str) -> list[dict]:
        asked.append((repository, configuration, split))
        return [json.loads(line) for line in (data / "ruler-4096.jsonl").read_text().splitlines()]

    monkeypatch.setattr("compactor_vllm.evaluation.tasks.prebuilt.hub_rows", rows)
    code, again, _ = call(capsys, *arguments, "--out", tmp_path / "again")
    assert code == 0 and asked == [("simonjegou/ruler", "4096", "test")] and again == printed


def test_a_calibration_is_fitted_and_used(tiny_checkpoint: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COMPACTOR_CACHE", str(tmp_path / "cache"))
    arguments = ["--model", tiny_checkpoint, "--device", "cpu", "--task", "fwe", "niah_single_1", "--length", 1100]
    arguments += ["--samples", 2, "--ratio", 0.2, 0.7, "--method", "knorm", "keydiff", "--out", tmp_path / "run"]
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main(["calibrate", *map(str, arguments)])
    assert not exit_.value.code
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in printed] == ["knorm", "keydiff"] and "from 8 triples" in printed[0]
    run = RunDirectory.load(tmp_path / "run")
    calibrations = load_calibrations(run.config["environment"]["fingerprint"])
    assert set(calibrations) == {"knorm", "keydiff"}
    known = {r["context_nll"] for r in run.records.values()}
    assert len(known) == 4 and min(known) == calibrations["knorm"].lowest > 0
    with LLM(LLMConfig(model=str(tiny_checkpoint), device="cpu", show_progress_bar=False)) as llm:
        params = SequenceCompressionParams(compression_ratio="auto", compression_method="knorm")
        sequence = llm.generate(list(range(200)), SamplingParams(max_new_tokens=1), None, params, return_sequences=True)
    b = calibrations["knorm"].steepness(sequence_nll(run, sequence))
    assert sequence.predicted_quality == pytest.approx(predicted_quality(sequence.chosen_ratio, b), abs=0.05)


def test_the_summary_of_a_held_out_test() -> None:
    ratios = {0.0: [0.96, 0.91, 0.89, 1.2], 0.3: [0.2, 0.9, 0.3, 0.95], 0.6: [0.5, 0.9, 0.95, 1], 0.9: [1, 1, 1, 0.99]}
    records = [
        {"method": "compactor", "retention": r, "nll_ratio": g, "chosen_ratio": 0.2 if i < 2 else 0.6}
        for r, values in ratios.items()
        for i, g in enumerate(values)
    ]
    records.append({"method": "none", "retention": 1.0, "nll_ratio": 0.0})
    found = summary(records, "compactor", 0.95)
    assert found["auto"] == {
        "contexts": 4,
        "share": 0.75,
        "share_two_sided": 0.5,
        "kept": pytest.approx(0.4),
        "nll_ratio": pytest.approx(0.99),
    }
    assert found["fixed"] == {0.3: 0.5, 0.6: 0.75, 0.9: 1.0} and found["equal_fixed_ratio"] == 0.6


def sequence_nll(run: RunDirectory, sequence: Any) -> float:
    """NLL(context) of the one sequence, by a run of its window."""
    begin, end = probe_window(len(sequence.prompt_token_ids))
    window = sequence.prompt_token_ids[begin:end]
    with LLM(LLMConfig(model=run.config["model"], device="cpu", show_progress_bar=False)) as llm:
        sampling = SamplingParams(max_new_tokens=1, prompt_logprobs=0)
        entries = llm.generate(window, sampling, return_sequences=True).prompt_logprobs
    return mean_nll([entry[token] for token, entry in zip(window[1:], entries[1:], strict=True)])
