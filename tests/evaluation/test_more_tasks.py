"""InfiniteBench's generated tasks, and many questions about one context."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from compactor_vllm import LLM, LLMConfig
from compactor_vllm.errors import InvalidInputError
from compactor_vllm.evaluation.run_config import MethodChoice, RunConfig
from compactor_vllm.evaluation.run_directory import RunDirectory
from compactor_vllm.evaluation.runner import Answers
from compactor_vllm.evaluation.scores import score
from compactor_vllm.evaluation.suites import SuiteOptions, suite_sources
from compactor_vllm.evaluation.tasks.infinitebench import INFINITEBENCH_TASKS, make_infinitebench_sample
from compactor_vllm.evaluation.tasks.questions import make_question_sample
from tests.evaluation.test_run import call


@pytest.mark.parametrize("task", INFINITEBENCH_TASKS)
@pytest.mark.parametrize("length", [900, 3000])
def test_samples_of_infinitebench(tokenizer, task: str, length: int) -> None:
    samples = [make_infinitebench_sample(task, tokenizer, length=length, seed=3, index=i) for i in range(4)]
    assert samples[1] == make_infinitebench_sample(task, tokenizer, length=length, seed=3, index=1)
    assert len({sample.answers[0] for sample in samples}) == 4
    for sample in samples:
        tokens = len(tokenizer.encode(sample.prompt, add_special_tokens=False)) + sample.max_new_tokens
        unit = 60 if task == "kv_retrieval" else 12  # a pair of UUIDs, or a sentence
        assert length - unit <= tokens <= length
        assert sample.context.count(sample.answers[0]) == (1 if task == "kv_retrieval" else 2)
        assert score(sample, f" {sample.answers[0]}.") == 1 and score(sample, "12345, no") == 0
    assert make_infinitebench_sample(task, tokenizer, length=length, seed=4) != samples[0]


def test_what_infinitebench_hides(tokenizer) -> None:
    kv = make_infinitebench_sample("kv_retrieval", tokenizer, length=3000, index=2)
    pairs = json.loads(kv.context[kv.context.index("{") :])
    assert pairs[kv.key] == kv.answers[0] and kv.key in kv.question and len(pairs) > 10
    place = list(pairs).index(kv.key)
    assert place == round(kv.depth * (len(pairs) - 1))
    strings = [make_infinitebench_sample("number_string", tokenizer, length=600, index=i).answers[0] for i in range(9)]
    assert all(len(text) == 10 and text.isdigit() for text in strings)
    assert sum(bool(re.search(r"(\d)\1", text)) for text in strings) >= 7
    assert 10_000 <= int(make_infinitebench_sample("passkey", tokenizer, length=600).answers[0]) < 100_000
    sample = make_infinitebench_sample("passkey", tokenizer, length=600)
    assert score(sample, f"1{sample.answers[0]}") == 0 and score(sample, f"is {sample.answers[0]}2") == 0
    with pytest.raises(InvalidInputError, match="unknown task 'math'"):
        make_infinitebench_sample("math", tokenizer, length=600)


def test_questions_share_their_context(tokenizer) -> None:
    samples = [make_question_sample(tokenizer, length=1500, questions=5, seed=1, index=i) for i in range(10)]
    contexts = [sample.context for sample in samples]
    assert len(set(contexts)) == 2 and len(set(contexts[:5])) == 1
    for sample in samples:
        assert sample.context.count(sample.answers[0]) == sample.context.count(sample.key) == 1
        assert sample.key in sample.question and f"for {sample.key} is: {sample.answers[0]}." in sample.context
        tokens = len(tokenizer.encode(sample.prompt, add_special_tokens=False)) + sample.max_new_tokens
        assert 1500 * 0.98 <= tokens <= 1500
    assert len({sample.answers[0] for sample in samples}) == 10
    for wrong in (0, 10**6):
        with pytest.raises(InvalidInputError, match="questions, not"):
            make_question_sample(tokenizer, length=1500, questions=wrong)
    [source], substitutes = suite_sources("questions", tokenizer, SuiteOptions(samples=3, questions=4, lengths=(1500,)))
    assert source.count == 12 and substitutes == {"questions": "made-up prose instead of essays"}


def test_a_context_is_compressed_once_for_all_its_questions(tiny_checkpoint: Path, tmp_path: Path, capsys) -> None:
    common = ["--model", tiny_checkpoint, "--device", "cpu", "--length", 1300, "--max-new-tokens", 4, "--ratio", 1, 0.5]
    arguments = ["questions", *common, "--questions", 3, "--samples", 2, "--batch-size", 3, "--out", tmp_path / "run"]
    code, printed, _ = call(capsys, *arguments, "--json")
    assert code == 0
    cells = {cell["retention"]: cell for cell in json.loads(printed)["cells"]}
    assert cells[1.0]["samples"] == cells[0.5]["samples"] == 6
    assert cells[1.0]["kept_fraction"] == 1 and 0.5 < cells[0.5]["kept_fraction"] < 0.65
    # The same answers as without sharing.
    records = RunDirectory.load(tmp_path / "run").records
    config = RunConfig(
        suite="questions", model="m", methods=["compactor"], retentions=[1.0, 0.5], protected_first=8, protected_last=4
    )
    with LLM(LLMConfig(model=str(tiny_checkpoint), device="cpu", show_progress_bar=False)) as llm:
        options = SuiteOptions(samples=2, questions=3, lengths=(1300,))
        [source], _ = suite_sources("questions", llm.tokenizer, options)
        cells = config.cells([MethodChoice.parse("compactor")])
        pairs = [(source.make(index), cell) for cell in cells for index in range(6)]
        apart = Answers(llm, replace(config, max_new_tokens=4)).measure(pairs)
    keys = [("questions", 1300, index, cell.choice.label, cell.retention) for cell in cells for index in range(6)]
    assert [records[key]["prediction"] for key in keys] == [record["prediction"] for record in apart]
    code, _, errors = call(capsys, "ruler", "--questions", 3)
    assert code == 2 and "--questions has no effect on ruler" in " ".join(errors.split())
