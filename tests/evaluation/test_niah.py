"""Needle tasks: contents, lengths, depths, reproducibility."""

from __future__ import annotations

import re

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from compactor_vllm.errors import InvalidInputError
from compactor_vllm.evaluation.tasks import NIAH_TASKS, make_sample, make_samples
from compactor_vllm.evaluation.tasks.niah import _largest_fit
from compactor_vllm.evaluation.tasks.words import ADJECTIVES, NOUNS

LINE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Words and pieces of words, about as long as those of a large vocabulary."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    corpus = [LINE, "One of the special magic numbers for what is: mentioned in the provided text", *ADJECTIVES[:40]]
    backend.train_from_iterator(corpus * 3, trainers.BpeTrainer(vocab_size=600, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=100)


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


@pytest.mark.parametrize("task", NIAH_TASKS)
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
    assert _largest_fit(measure, limit) == expected
    assert len(calls) < 40
