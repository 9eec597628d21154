"""Scores on cases worked out by hand."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from compactor_vllm.errors import InvalidInputError, MissingDependencyError
from compactor_vllm.evaluation import longbench_scores as longbench
from compactor_vllm.evaluation.longbench_scores import (
    classification,
    code_similarity,
    common_subsequence,
    count,
    qa_f1,
    retrieval,
    rouge_l,
)
from compactor_vllm.evaluation.scores import SCORERS, score
from compactor_vllm.evaluation.tasks.sample import Sample


def sample(metric: str, *answers: str, classes: tuple[str, ...] = ()) -> Sample:
    return Sample("t", "", "", "", list(answers), 1, metric=metric, classes=classes)


def test_string_match() -> None:
    assert score(sample("string_match_all", "One", "two", "three", "four"), "ONE, and three") == 0.5
    assert score(sample("string_match_part", "One", "two"), "only TWO") == 1
    assert score(sample("string_match_part", "One", "two"), "neither") == 0
    with pytest.raises(InvalidInputError, match="unknown metric 'x'; choose from string_match_all"):
        score(sample("x", "a"), "")


def test_qa_f1() -> None:
    # "the" goes, "Cat." becomes "cat": words cat sat (2), reference cat sat down (3), 2 in common.
    assert qa_f1("The Cat. sat", "a cat sat down") == pytest.approx(2 * 1 * (2 / 3) / (1 + 2 / 3))
    assert qa_f1("red red", "red blue") == pytest.approx(0.5)  # bags: one "red" counts
    assert qa_f1("x", "y") == qa_f1("", "y") == 0
    assert score(sample("qa_f1", "y", "x"), "x") == 1
    assert score(sample("qa_f1_first_line", "x"), "\nx\nmore words") == 1


def test_rouge_l() -> None:
    assert common_subsequence("abcbdab", "bdcaba") == list("bdab")  # of bcba, bcab and bdab the one walked back to
    # "police the gunman": 3 of 4 words on either side.
    value = rouge_l("police kill the gunman", "police killed the gunman")
    assert value == pytest.approx(2 * 0.75 * 0.75 / (1.5 + 1e-8))
    # Sentences: "a b" gives {a, b}, "c d" gives {c}; 3 common words of 4 in the reference and of 3 in the prediction.
    assert rouge_l("a b.c", "a b.c d") == pytest.approx(2 * 0.75 / (1.75 + 1e-8))
    # Order counts inside a sentence: only one of the two words.
    assert rouge_l("b a", "a b") == pytest.approx(0.5)
    assert rouge_l("", "a") == rouge_l("a", "b") == 0
    assert rouge_l("same words here", "same words here") == pytest.approx(1, abs=1e-7)


def test_classification() -> None:
    labels = ("Date", "Food", "Number of something", "Number")
    assert classification("It is a Date", "Date", labels) == 1
    assert classification("Date or Food", "Food", labels) == 0.5
    assert classification("Number of something", "Number of something", labels) == 1  # "Number" is part of it
    assert classification("Food", "Date", labels) == 0
    # LongBench's script skips the label after one that it takes out.
    assert classification("abc", "abc", ("a", "b", "abc")) == 0.5
    assert score(sample("classification", "Food", classes=labels), "\nFood\nDate") == 1


def test_numbers_and_code() -> None:
    assert retrieval("Paragraph 7, not 12", "Paragraph 7") == 0.5
    assert count("5 5 6", "5") == pytest.approx(2 / 3) and count("none", "5") == 0
    assert code_similarity("```\n# no\nreturn x", "return x") == 1
    # difflib: "abcd" against "abxd" shares ab and d, 2 * 3 / 8.
    assert code_similarity("abcd\nmore", "abxd") == 0.75


def test_choices() -> None:
    for text, right in [
        ("The correct answer is (B).", 1),
        ("**The correct answer is B**", 1),
        ("The correct answer is (A)", 0),
        ("B", 0),
    ]:
        assert score(sample("choice", "B"), text) == right


@pytest.fixture
def segmenter(monkeypatch: pytest.MonkeyPatch) -> None:
    """In jieba's place one that cuts at bars, so that the words are those of the test."""
    jieba = SimpleNamespace(cut=lambda text, cut_all: iter(text.split("|")), setLogLevel=lambda level: None)
    monkeypatch.setitem(sys.modules, "jieba", jieba)


@pytest.mark.usefixtures("segmenter")
def test_every_metric_is_between_zero_and_one() -> None:
    for metric in SCORERS:
        assert 0 <= score(sample(metric, "Paragraph 3", classes=("a", "Paragraph 3")), "Paragraph 3. x") <= 1


@pytest.mark.usefixtures("segmenter")
def test_chinese_scores_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    # Words 北京, 是, 首都 and 上海, 是, 首都, 吗: two of three and of four in common; punctuation is no word.
    assert longbench.qa_f1_zh("北京|是|首都|。", "上海|，|是|首都|吗|？") == pytest.approx(
        2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4)
    )
    assert longbench.qa_f1_zh("ABC|、", "abc") == 1 and longbench.qa_f1_zh("。", "北京") == 0
    assert longbench.rouge_l_zh("猫|坐|在|垫子", "猫|在|垫子") == pytest.approx(2 * 1 * 0.75 / 1.75, abs=1e-6)
    assert longbench.retrieval_zh("段落7，不是段落8", "段落7") == 0.5 and longbench.retrieval_zh("没有", "段落7") == 0
    monkeypatch.setitem(sys.modules, "jieba", None)
    with pytest.raises(MissingDependencyError, match=r"compactor-vllm\[eval\]"):
        longbench.qa_f1_zh("北京", "北京")


def test_chinese_words_of_the_real_segmenter() -> None:
    pytest.importorskip("jieba", reason="jieba is not installed: pip install -e '.[eval]'")
    assert longbench.chinese_words("我来到北京清华大学") == ["我", "来到", "北京", "清华大学"]
    assert longbench.qa_f1_zh("北京清华大学。", "我来到北京清华大学") == pytest.approx(2 * 1 * 0.5 / 1.5)
