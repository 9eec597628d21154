"""LongBench's loaders, with fixtures in its formats."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compactor_vllm.errors import InvalidInputError, MissingDependencyError
from compactor_vllm.evaluation.tasks import files
from compactor_vllm.evaluation.tasks.longbench import LONGBENCH_TASKS, longbench_samples, longbench_v2_samples

ROW = {"input": "Who?", "context": "Long text.", "answers": ["Ada", "Bob"], "all_classes": None, "language": "en"}


def write(directory: Path, name: str, *rows: dict) -> None:
    (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("task", LONGBENCH_TASKS)
def test_prompts_are_whole(task: str, tmp_path: Path, tokenizer) -> None:
    recipe = LONGBENCH_TASKS[task]
    write(tmp_path, task, ROW | {"input": f"Who?\n{recipe.cut}"})
    (sample,) = longbench_samples(task, tmp_path, tokenizer, 10_000)
    assert "Long text." in sample.context and "{" not in sample.prompt
    assert sample.prompt.count("Who?") == ("{input}" in recipe.question)
    assert sample.prompt.endswith(recipe.prefix) and sample.prompt.count(recipe.prefix) == 1 + recipe.context.count(
        recipe.prefix
    )
    assert sample.answers == ["Ada", "Bob"] and sample.max_new_tokens in (32, 64, 128, 512)
    assert sample.chat == (task not in ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"))


def test_a_prompt_is_the_official_one(tmp_path: Path, tokenizer) -> None:
    write(tmp_path, "multifieldqa_en", ROW)
    (sample,) = longbench_samples("multifieldqa_en", tmp_path, tokenizer, 10_000)
    assert sample.prompt == (
        "Read the following text and answer briefly.\n\nLong text.\n\nNow, answer the following question based on the "
        "above text, only give me the answer and do not output any other words.\n\nQuestion: Who?\nAnswer:"
    )
    assert sample.question == "Question: Who?\n"


def test_long_contexts_lose_their_middle(tmp_path: Path, tokenizer) -> None:
    text = "start " + "grass is green. " * 400 + "end"
    write(tmp_path, "hotpotqa", ROW | {"context": text}, ROW)
    long, short = longbench_samples("hotpotqa", tmp_path, tokenizer, 700)
    size = len(tokenizer.encode(long.prompt, add_special_tokens=False)) + long.max_new_tokens
    assert 690 <= size <= 702 and "start grass" in long.context and "green. end" in long.context
    assert "Long text." in short.context
    with pytest.raises(InvalidInputError, match="too short for a question of hotpotqa"):
        longbench_samples("hotpotqa", tmp_path, tokenizer, 40)


def test_v2(tmp_path: Path, tokenizer) -> None:
    row = {"question": " Why? ", "answer": "C", "context": "Doc", "difficulty": "hard", "length": "short"}
    row |= {f"choice_{letter}": letter.lower() for letter in "ABCD"}
    (tmp_path / "data.json").write_text(json.dumps([row]))
    (sample,) = longbench_v2_samples(tmp_path, tokenizer, 10_000)
    assert sample.prompt == (
        "Please read the following text and answer the question below.\n\n<text>\nDoc\n</text>\n\n"
        "What is the correct answer to this question: Why?\nChoices:\n(A) a\n(B) b\n(C) c\n(D) d\n\n"
        'Format your response as follows: "The correct answer is (insert answer here)".'
    )
    assert sample.answers == ["C"] and sample.groups == {"difficulty": "hard", "length": "short"}


def test_wrong_files_say_what_is_wrong(tmp_path: Path, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidInputError, match="unknown task 'squad'; choose from narrativeqa"):
        longbench_samples("squad", tmp_path, tokenizer, 100)
    with pytest.raises(InvalidInputError, match=r"neither trec\.jsonl nor trec\.json"):
        longbench_samples("trec", tmp_path, tokenizer, 100)
    (tmp_path / "trec.jsonl").write_text("not json\n")
    with pytest.raises(InvalidInputError, match=r"trec\.jsonl is not JSON"):
        longbench_samples("trec", tmp_path, tokenizer, 100)
    (tmp_path / "trec.jsonl").write_text('{"input": "x"}\n')
    with pytest.raises(InvalidInputError, match="a row of trec lacks the field 'context'"):
        longbench_samples("trec", tmp_path, tokenizer, 100)
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(MissingDependencyError, match="pip install datasets, or pass --data DIR"):
        files.hub_rows("some/set", None, "test")
