"""RULER's other tasks: exact answers, lengths, reproducibility, and the user's data."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest

from compactor_vllm.errors import InvalidInputError
from compactor_vllm.evaluation.tasks import OFFLINE_TASKS, RULER_TASKS, RulerData, make_ruler_sample
from compactor_vllm.evaluation.tasks.extraction import coded_words
from compactor_vllm.evaluation.tasks.haystack import made_up_sentences, split_sentences
from compactor_vllm.evaluation.tasks.prebuilt import prebuilt_samples
from compactor_vllm.evaluation.tasks.sample import num_tokens

COARSE = {"niah_multikey_2": 40, "niah_multikey_3": 120, "qa_1": 220, "qa_2": 220}
"""Tasks whose filler comes in pieces of up to so many of the tests' small tokens: a needle, a document."""


def make(task: str, tokenizer, length: int = 2500, **more):
    return make_ruler_sample(task, tokenizer, length=length, **more)


@pytest.mark.parametrize("task", RULER_TASKS)
def test_length_question_and_reproducibility(task: str, tokenizer) -> None:
    for index in range(2):
        sample = make(task, tokenizer, seed=4, index=index)
        size = num_tokens(tokenizer, sample.prompt) + sample.max_new_tokens
        assert 2500 - max(25, COARSE.get(task, 0)) <= size <= 2500  # 1 %, or a piece of filler
        assert sample == make(task, tokenizer, seed=4, index=index)
        assert sample.task == task and sample.answers and sample.question.endswith(" ")
    assert sample.context != make(task, tokenizer, seed=4, index=0).context
    assert sample.context != make(task, tokenizer, seed=5, index=1).context
    with pytest.raises(InvalidInputError, match=f"too short for {task}"):
        make(task, tokenizer, length=60)


def test_names_and_limits_are_rulers() -> None:
    assert len(RULER_TASKS) == 13 and set(OFFLINE_TASKS) < set(RULER_TASKS)
    assert OFFLINE_TASKS == ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe")


def test_limits_of_the_output(tokenizer) -> None:
    limits = {"niah_single_1": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32}
    assert {task: make(task, tokenizer).max_new_tokens for task in limits} == limits


# kvpress finds the question as the last match of these patterns.
CUTS = {"vt": "Question: Find all variables", "cwe": "Question: What are the 10", "fwe": "Question: Do not provide"}
CUTS |= dict.fromkeys(("qa_1", "qa_2"), "Answer the question based on the given documents")


@pytest.mark.parametrize("task", CUTS)
def test_the_cut_is_kvpresss(task: str, tokenizer) -> None:
    sample = make(task, tokenizer)
    assert sample.prompt[: sample.prompt.rindex(CUTS[task])] == sample.context
    assert sample.answer_prefix.startswith("Answer:") and (sample.question + sample.answer_prefix).count("Answer:") == 1


def follow(lines: list[str]) -> dict[str, set[str]]:
    """Value -> variables that have it, by reading the assignments in order."""
    value_of: dict[str, str] = {}
    for line in lines:
        if match := re.fullmatch(r"VAR ([A-Z]+) = (?:VAR )?(\w+) ?", line):
            value_of[match[1]] = value_of.get(match[2], match[2])
    result: dict[str, set[str]] = {}
    for name, value in value_of.items():
        result.setdefault(value, set()).add(name)
    return result


def test_variables_are_those_that_following_the_chain_finds(tokenizer) -> None:
    for index in range(5):
        sample = make("vt", tokenizer, index=index)
        example, text = sample.context.split("\n\nMemorize and track", 1)
        value = re.search(r"assigned the value (\d{5}) in", sample.question)[1]
        assert follow(text.splitlines()) == {value: set(sample.answers)}
        assert len(set(sample.answers)) == 5 and all(re.fullmatch("[A-Z]{5}", name) for name in sample.answers)
        assert f"5 variables are assigned the value {value}, they are: " in sample.answer_prefix
        (solved,) = follow(example.splitlines()).items()
        names = example.rsplit("they are: ", 1)[1].split()
        assert solved[1] == set(names) and all(len(name) == 3 for name in names)
        assert solved[0] in example and num_tokens(tokenizer, example) <= 510


@pytest.mark.parametrize(("length", "often", "seldom"), [(2500, 6, 1), (5000, 30, 3)])
def test_the_ten_common_words_are_common(length: int, often: int, seldom: int, tokenizer) -> None:
    sample = make("cwe", tokenizer, length, index=3)
    example, words = sample.context.split("Memorize the ones that appear most often.\n")[1:]
    numbered = re.findall(r"(\d+)\. ([a-z]+)", words)
    assert [int(number) for number, _ in numbered] == list(range(1, len(numbered) + 1))
    counts = Counter(word for _, word in numbered)
    assert {word for word, count in counts.items() if count == often} == set(sample.answers)
    others = [count for word, count in counts.items() if word not in sample.answers]
    assert sorted(others)[1:] == [seldom] * (len(others) - 1) and len(others) > 5
    listed = example.split("Answer:")[1]
    shown = Counter(re.findall(r"[a-z]+", example.split("Question:")[0]))
    assert set(re.findall(r"\d+\. ([a-z]+)", listed)) == {w for w, _ in shown.most_common(10)}


def test_the_three_frequent_words_are_frequent(tokenizer) -> None:
    sample = make("fwe", tokenizer, 4000)
    words = sample.context.split("coded words. ")[1].split()
    counts = Counter(words)
    assert [word for word, _ in counts.most_common(4)] == ["...", *sample.answers]
    assert all(re.fullmatch("[a-z]{6}", word) for word in counts if word != "...")
    # ⌊n · k⁻² / ζ(2)⌋ with ζ(2) = 1.6449: 1000 words are 607, 151, 67 and 37 of ranks 1 to 4.
    assert [coded_words(list("abcd"), 1000).count(word) for word in "abcd"] == [607, 151, 67, 37]


def test_made_up_questions_have_one_answer(tokenizer) -> None:
    for task in ("qa_1", "qa_2"):
        for index in range(6):
            sample = make(task, tokenizer, index=index)
            name = re.search(r"(?:teacher of )?([A-Z]\w+ [A-Z]\w+)(?: born| work)", sample.question)[1]
            pages = {
                page.split(" was born")[0]: page for page in re.split(r"\n?\n?Document \d+:\n", sample.context)[1:]
            }
            if task == "qa_2":
                name = re.search(r"learnt a trade from (\w+ \w+) and", pages[name])[1]
            assert sample.answers[0] in pages[name] and sample.metric == "string_match_part"
            assert list(pages) == list(dict.fromkeys(pages))


def test_made_up_prose_says_nothing_of_magic() -> None:
    rng = random.Random(0)
    sentences = made_up_sentences(rng)
    text = [next(sentences) for _ in range(300)]
    assert all(re.fullmatch(r"[A-Z].*[a-z]\.", sentence) and "{" not in sentence for sentence in text)
    assert len(set(text)) > 290 and not any(re.search(r"magic|\d", sentence) for sentence in text)


def test_sentences_are_split_where_they_end() -> None:
    text = 'It rose by 3.5 points.  "Really?" he asked.\nYes! (He left.)'
    assert split_sentences(text) == ("It rose by 3.5 points.", '"Really?" he asked.', "Yes!", "(He left.)")


# ---- the user's data ----------------------------------------------------------------------------------------------


def write_data(directory: Path) -> Path:
    (directory / "PaulGrahamEssays.json").write_text(json.dumps({"text": "One essay. Another one.\n\nThe end."}))
    paragraphs = [
        {"context": "Rome is in Italy.", "qas": [{"question": "Where is Rome?", "answers": [{"text": "Italy"}]}]},
        {"context": "Oslo is in Norway.", "qas": [{"question": "Who?", "answers": [], "is_impossible": True}]},
    ]
    other = {"paragraphs": [{"context": f"Page {i} of another article.", "qas": []} for i in range(3)]}
    (directory / "squad.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}, other]}))
    hop = {"question": "Which?", "answer": "B", "context": [["T1", ["A. ", "B."]], ["T2", ["C."]]]}
    (directory / "hotpotqa.json").write_text(json.dumps([hop]))
    return directory


def test_the_users_files_replace_what_is_made_up(tmp_path: Path, tokenizer) -> None:
    data = RulerData.load(write_data(tmp_path))
    assert all(data.substitute(task) is None for task in RULER_TASKS)
    needle = make("niah_multikey_1", tokenizer, data=data, length=900)
    assert "One essay. Another one. The end. One essay." in needle.context
    squad = make("qa_1", tokenizer, data=data, index=7)
    assert squad.answers == ["Italy"] and "Question: Where is Rome? " in squad.question
    # All five documents fit, each once.
    assert sorted(re.findall(r"Document (\d):", squad.context)) == list("12345")
    assert squad.context.count("Oslo is in Norway.") == squad.context.count("Page 2 of another article.") == 1
    hotpot = make("qa_2", tokenizer, data=data)
    assert hotpot.answers == ["B"] and re.search(r"Document \d:\nT1\nA. B.", hotpot.context)


def test_without_files_substitutes_are_named(tmp_path: Path) -> None:
    data = RulerData.load(tmp_path)
    named = {task: text for task in RULER_TASKS if (text := data.substitute(task))}
    assert set(named) == set(RULER_TASKS) - set(OFFLINE_TASKS)
    assert "prose instead of essays" in named["niah_single_2"] and "HotpotQA" in named["qa_2"]
    with pytest.raises(InvalidInputError, match="there is no directory"):
        RulerData.load(tmp_path / "nothing")
    (tmp_path / "squad.json").write_text('{"data": [{"title": "x"}]}')
    with pytest.raises(InvalidInputError, match=r"squad\.json is not in the format"):
        RulerData.load(tmp_path)


def test_prebuilt_samples_have_kvpresss_columns(tmp_path: Path) -> None:
    row = {"task": "qa_1", "context": "c", "question": "q", "answer_prefix": "a", "answer": ["x"], "max_new_tokens": 32}
    rows = [row, row | {"task": "vt", "answer": ["A", "B"], "max_new_tokens": 30}, row | {"context": "c2"}]
    (tmp_path / "ruler-4096.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    samples = prebuilt_samples(tmp_path, 4096, ["vt", "qa_1"])
    assert [s.context for s in samples["qa_1"]] == ["c", "c2"] and samples["vt"][0].answers == ["A", "B"]
    assert (samples["vt"][0].metric, samples["qa_1"][0].metric) == ("string_match_all", "string_match_part")
    with pytest.raises(InvalidInputError, match="no rows of cwe"):
        prebuilt_samples(tmp_path, 4096, ["cwe"])
    with pytest.raises(InvalidInputError, match=r"neither ruler-8192\.jsonl"):
        prebuilt_samples(tmp_path, 8192, ["cwe"])
    del row["question"]
    (tmp_path / "ruler-1024.json").write_text(json.dumps([row]))
    with pytest.raises(InvalidInputError, match="lacks the field 'question'"):
        prebuilt_samples(tmp_path, 1024, ["qa_1"])
