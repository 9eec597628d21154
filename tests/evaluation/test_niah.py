"""Needle tasks: contents, lengths, depths, reproducibility."""

from __future__ import annotations

import re

import pytest

from compactor_vllm.errors import InvalidInputError
from compactor_vllm.evaluation.tasks import NIAH_TASKS, make_sample, make_samples
from compactor_vllm.evaluation.tasks.sample import largest_fit
from compactor_vllm.evaluation.tasks.words import ADJECTIVES, NOUNS

PROSE_TASKS = [name for name, task in NIAH_TASKS.items() if task.haystack == "prose"]
LINE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


def size(tokenizer, sample) -> int:
    return len(tokenizer.encode(sample.prompt, add_special_tokens=False)) + sample.max_new_tokens


def test_single_1_text(tokenizer):
    sample = make_sample("niah_single_1", tokenizer, length=600, seed=3, depth=0.5)
    assert re.fullmatch(r"[a-z]+-[a-z]+", sample.key) and re.fullmatch(r"[1-9]\d{6}", sample.answers[0])
    head, *lines, end = sample.context.split("\n")
    assert head == (
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards."
    )
    assert end == ""
    needle = lines.pop(len(lines) // 2)
    assert needle == f"One of the special magic numbers for {sample.key} is: {sample.answers[0]}."
    assert set(lines[:-1]) == {LINE} and LINE.startswith(lines[-1])
    assert sample.question == f"What is the special magic number for {sample.key} mentioned in the provided text? "
    assert sample.answer_prefix == f"The special magic number for {sample.key} mentioned in the provided text is"
    assert sample.prompt == sample.context + sample.question + sample.answer_prefix
    assert (sample.max_new_tokens, len(sample.answers), sample.depth) == (128, 1, 0.5)


@pytest.mark.parametrize("task", ["niah_single_1", "niah_multikey_2", "niah_multikey_3"])
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0, None])
def test_needle_lies_once_where_it_should(task, depth, tokenizer):
    sample = make_sample(task, tokenizer, length=3000, seed=1, depth=depth)
    lines = sample.context.splitlines()[1:]
    places = [i for i, line in enumerate(lines) if sample.key in line]
    assert len(places) == 1
    assert sample.context.count(sample.key) == sample.context.count(sample.answers[0]) == 1
    assert sample.answers[0] not in sample.question + sample.answer_prefix
    assert abs(places[0] / (len(lines) - 1) - sample.depth) <= 0.51 / (len(lines) - 1)
    # kvpress finds the question as the last match of this pattern, and the answer's prefix behind it.
    match = list(re.finditer("What (?:is|are all) the special magic", sample.prompt))[-1]
    assert sample.prompt[: match.start()] == sample.context
    assert (sample.question + sample.answer_prefix).index("The special magic") == len(sample.question)


@pytest.mark.parametrize("length", [1024, 2048, 6000])
def test_length_within_one_percent_and_never_above(length, tokenizer):
    for seed in range(3):
        sample = make_sample("niah_single_1", tokenizer, length=length, seed=seed)
        assert 0.99 * length <= size(tokenizer, sample) <= length


@pytest.mark.parametrize("task", ["niah_multikey_2", "niah_multikey_3"])
def test_length_of_needles_leaves_less_than_a_line(task, tokenizer):
    for seed in range(3):
        sample = make_sample(task, tokenizer, length=2500, seed=seed)
        lines = sample.context.splitlines()[1:]
        longest = max(len(tokenizer.encode(line + "\n", add_special_tokens=False)) for line in lines)
        assert 0 <= 2500 - size(tokenizer, sample) <= longest + 8
        assert len(set(lines)) == len(lines) > 10


def test_multikey_values(tokenizer):
    uuid = "[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
    for line in make_sample("niah_multikey_3", tokenizer, length=2000).context.splitlines()[1:]:
        assert re.fullmatch(rf"One of the special magic uuids for {uuid} is: {uuid}\.", line)
    for line in make_sample("niah_multikey_2", tokenizer, length=1000).context.splitlines()[1:]:
        assert re.fullmatch(r"One of the special magic numbers for [a-z]+-[a-z]+ is: [1-9]\d{6}\.", line)


def test_reproducible_and_different(tokenizer):
    first = make_samples("niah_single_1", tokenizer, length=500, count=20, seed=5)
    assert first == make_samples("niah_single_1", tokenizer, length=500, count=20, seed=5)
    assert [s.depth for s in first] == pytest.approx([i / 19 for i in range(20)])
    other = make_samples("niah_single_1", tokenizer, length=500, count=20, seed=6)
    assert len({s.key for s in first + other}) == len({s.answers[0] for s in first + other}) == 40
    # The key does not depend on length and depth.
    again = make_sample("niah_single_1", tokenizer, length=900, seed=5, index=7, depth=0.0)
    assert (again.key, again.answers) == (first[7].key, first[7].answers)
    assert len({make_sample("niah_single_1", tokenizer, length=500, seed=s).depth for s in range(10)}) == 10
    assert make_samples("niah_single_1", tokenizer, length=500, count=1)[0].depth == 0.5


def test_wrong_arguments(tokenizer):
    with pytest.raises(InvalidInputError, match=r"unknown task 'niah'; choose from niah_single_1"):
        make_sample("niah", tokenizer, length=500)
    with pytest.raises(InvalidInputError, match="depth must lie"):
        make_sample("niah_single_1", tokenizer, length=500, depth=1.5)
    with pytest.raises(InvalidInputError, match=r"length 150 is too short for niah_single_1.* takes 2"):
        make_sample("niah_single_1", tokenizer, length=150)
    with pytest.raises(InvalidInputError, match="2 depths for 3 samples"):
        make_samples("niah_single_1", tokenizer, length=500, count=3, depths=[0, 1])


@pytest.mark.parametrize("task", PROSE_TASKS)
def test_needles_in_prose(task, tokenizer):
    recipe, depth = NIAH_TASKS[task], 0.4
    sample = make_sample(task, tokenizer, length=2000, seed=2, depth=depth)
    needles = re.findall(r"One of the special magic (\w+)s for (\S+) is: (\S+)\.", sample.context)
    assert len(needles) == recipe.keys * recipe.values
    assert {kind for kind, _, _ in needles} == {recipe.value_type}
    assert len({key for _, key, _ in needles}) == recipe.keys and len({value for *_, value in needles}) == len(needles)
    # What is asked for is what was hidden: each reference once, and nobody else's.
    asked = {key for _, key, _ in needles if key in sample.question}
    assert len(asked) == recipe.queries and all(key in sample.answer_prefix for key in asked)
    assert sorted(sample.answers) == sorted(value for _, key, value in needles if key in asked)
    assert all(sample.prompt.count(value) == 1 for value in sample.answers)
    many = recipe.queries * recipe.values > 1
    assert sample.context.startswith("Some special magic" if many else "A special magic")
    assert sample.question.startswith("What are all the special magic" if many else "What is the special magic")
    place = sample.context.index(sample.answers[0]) / len(sample.context)
    assert abs(place - depth) < 0.1 and sample.context.count("\n") == 2
    assert 0.985 * 2000 <= size(tokenizer, sample) <= 2000


def test_queries_are_listed_as_ruler_does(tokenizer):
    question = make_sample("niah_multiquery", tokenizer, length=1000).question
    assert re.search(r" for ([a-z]+-[a-z]+, ){3}and [a-z]+-[a-z]+ mentioned in the provided text\? $", question)


def test_essays_of_the_user_are_the_haystack(tokenizer):
    essays = ("First sentence.", "Second one?", "Third!")
    sample = make_sample("niah_single_2", tokenizer, length=600, depth=1.0, essays=essays)
    hay = sample.context.split("\n")[1]
    assert hay.startswith("First sentence. Second one? Third! First sentence.") and "Ada" not in hay


def test_word_lists():
    for words, least in ((ADJECTIVES, 150), (NOUNS, 250)):
        assert len(words) == len(set(words)) >= least
        assert all(re.fullmatch("[a-z]+", word) for word in words)


@pytest.mark.parametrize("slope", [1, 7, 1000])
@pytest.mark.parametrize("limit", [4, 5, 6, 99, 12345])
def test_largest_fit(slope, limit):
    calls = []

    def measure(n: int) -> int:
        calls.append(n)
        return 5 + slope * n + n % 3

    expected = max((n for n in range(limit) if 5 + slope * n + n % 3 <= limit), default=None)
    assert largest_fit(measure, limit) == expected
    assert len(calls) < 40
    for most in (0, 1, 3, 100):
        assert largest_fit(measure, limit, most) == (None if expected is None else min(expected, most))
