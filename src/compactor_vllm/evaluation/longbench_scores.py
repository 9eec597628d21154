"""The official metrics of LongBench v1 (Bai et al., arXiv 2308.14508), of one prediction and one reference.

They count as LongBench's own script does, which takes ROUGE-L from the package "rouge" (summary level, over sets of
words) and the edit similarity of code from difflib, rounded to whole per cent.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from difflib import SequenceMatcher

from compactor_vllm.errors import MissingDependencyError

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
# fmt: off
_CHINESE_PUNCTUATION = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～"
    "｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏"
)
# fmt: on
_ALL_PUNCTUATION = str.maketrans("", "", string.punctuation + _CHINESE_PUNCTUATION)


def normalized_words(text: str) -> list[str]:
    """Lower-case words without punctuation and articles."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def qa_f1(prediction: str, reference: str) -> float:
    """F1 of the two bags of words."""
    return _f1(normalized_words(prediction), normalized_words(reference))


def _f1(words: Sequence[str], wanted: Sequence[str]) -> float:
    common = sum((Counter(words) & Counter(wanted)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(words), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def chinese_words(text: str) -> list[str]:
    """Words of a Chinese text, as the package "jieba" cuts it.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import jieba
    except ImportError as error:
        raise MissingDependencyError("Chinese tasks need jieba: pip install 'compactor-vllm[eval]'") from error
    jieba.setLogLevel("ERROR")
    return list(jieba.cut(text, cut_all=False))


def qa_f1_zh(prediction: str, reference: str) -> float:
    """F1 of the two bags of words, lower case and without punctuation."""
    words, wanted = (
        [plain for word in chinese_words(text) if (plain := "".join(word.lower().translate(_ALL_PUNCTUATION).split()))]
        for text in (prediction, reference)
    )
    return _f1(words, wanted)


def rouge_l_zh(prediction: str, reference: str) -> float:
    """`rouge_l` of texts with spaces between their words."""
    return rouge_l(" ".join(chinese_words(prediction)), " ".join(chinese_words(reference)))


def retrieval_zh(prediction: str, reference: str) -> float:
    """As `retrieval`, of "段落7"."""
    found = re.search(r"段落(\d+)", reference)
    return count(prediction, found[1]) if found else 0.0


def rouge_l(prediction: str, reference: str) -> float:
    """Summary-level ROUGE-L, F1: sentences end at full stops, and each word counts once.

    For every sentence of the reference, the words of its longest common subsequences with all sentences of the
    prediction; what no earlier sentence has brought counts. An empty text has 0.
    """
    hypothesis, wanted = _sentences(prediction), _sentences(reference)
    words, wanted_words = {w for s in hypothesis for w in s}, {w for s in wanted for w in s}
    if not words or not wanted_words:
        return 0.0
    common = {w for target in wanted for sentence in hypothesis for w in common_subsequence(target, sentence)}
    recall, precision = len(common) / len(wanted_words), len(common) / len(words)
    return 2 * precision * recall / (precision + recall + 1e-8)


def _sentences(text: str) -> list[list[str]]:
    # A sentence of white space alone is one empty word, there as here.
    return [" ".join(sentence.split()).split(" ") for sentence in text.split(".") if sentence]


def common_subsequence(a: Sequence[str], b: Sequence[str]) -> list[str]:
    """A longest common subsequence; among equals the one that the package "rouge" walks back to."""
    lengths = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            lengths[i + 1][j + 1] = lengths[i][j] + 1 if x == y else max(lengths[i][j + 1], lengths[i + 1][j])
    result: list[str] = []
    i, j = len(a), len(b)
    while i and j:
        if a[i - 1] == b[j - 1]:
            result.append(a[i - 1])
            i, j = i - 1, j - 1
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return result[::-1]


def classification(prediction: str, reference: str, classes: Sequence[str]) -> float:
    """1 over the number of labels that the prediction names, if the right one is among them.

    Labels that are part of the right one do not count against it; but, as in LongBench's script, the label after one
    that was left out for this is not looked at.
    """
    named = [label for label in classes if label in prediction]
    at = 0
    while at < len(named):
        if named[at] in reference and named[at] != reference:
            del named[at]
        at += 1
    return 1 / len(named) if reference in named else 0.0


def retrieval(prediction: str, reference: str) -> float:
    """The fraction of the numbers in the prediction that are the reference's ("Paragraph 7")."""
    found = re.search(r"Paragraph (\d+)", reference)
    return count(prediction, found[1]) if found else 0.0


def count(prediction: str, reference: str) -> float:
    """The fraction of the numbers in the prediction that are the reference."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(reference) / len(numbers) if numbers else 0.0


def code_similarity(prediction: str, reference: str) -> float:
    """Similarity of the first line that is neither a comment nor a code fence."""
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return round(100 * SequenceMatcher(None, line, reference).ratio()) / 100
