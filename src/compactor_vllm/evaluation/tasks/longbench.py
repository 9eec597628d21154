"""LongBench v1 (arXiv 2308.14508), and LongBench v2 (arXiv 2412.15204), from files.

Prompts are the official ones, cut where the question begins as kvpress cuts them; the last words of a prompt
("Answer:") begin the answer. Data of v1 is NAME.jsonl for each task, as in its archive; that of v2 is data.json.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from compactor_vllm.errors import InvalidInputError
from compactor_vllm.evaluation.tasks.files import Row, field, hub_rows, read_rows
from compactor_vllm.evaluation.tasks.sample import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

V2_REPOSITORY = "THUDM/LongBench-v2"
V2_TASK = "longbench_v2"
V2_TOKENS = 128
V2_CONTEXT = "Please read the following text and answer the question below.\n\n<text>\n{context}\n</text>\n\n"
V2_QUESTION = (
    "What is the correct answer to this question: {question}\nChoices:\n(A) {choice_A}\n(B) {choice_B}\n"
    '(C) {choice_C}\n(D) {choice_D}\n\nFormat your response as follows: "The correct answer is (insert answer here)".'
)


@dataclass(frozen=True)
class LongBenchTask:
    """How a row becomes a prompt, and how its answer is measured.

    Attributes:
        context, question, prefix: templates over the row's fields "context" and "input".
        metric: a name in `scores.SCORERS`.
        max_new_tokens: the official limit.
        chat: whether the official script uses the chat template.
        cut: an ending of "input" that the prefix repeats.
    """

    context: str
    question: str
    prefix: str
    metric: str
    max_new_tokens: int
    chat: bool = True
    cut: str = ""


_NO_EXPLANATION = "using a single phrase if possible. Do not provide any explanation."
_NARRATIVE = (
    "You are given a story, which can be either a novel or a movie script, and a question. Answer the question as "
    f"concisely as you can, {_NO_EXPLANATION}\n\nStory: {{context}}\n\nNow, answer the question based on the story as "
    f"concisely as you can, {_NO_EXPLANATION}\n\n"
)
_QASPER_RULES = (
    "as concisely as you can, using a single phrase or sentence if possible. If the question cannot be answered based "
    'on the information in the article, write "unanswerable". If the question is a yes/no question, answer "yes", '
    '"no", or "unanswerable". Do not provide any explanation.\n\n'
)
_QASPER = (
    f"You are given a scientific article and a question. Answer the question {_QASPER_RULES}Article: {{context}}\n\n "
    f"Answer the question based on the above article {_QASPER_RULES}"
)
_FIELDS = (
    "Read the following text and answer briefly.\n\n{context}\n\nNow, answer the following question based on the above "
    "text, only give me the answer and do not output any other words.\n\n"
)
_ONLY_ANSWER = "Only give me the answer and do not output any other words."
_PASSAGES = (
    f"Answer the question based on the given passages. {_ONLY_ANSWER}\n\nThe following are given passages.\n{{context}}"
    f"\n\nAnswer the question based on the given passages. {_ONLY_ANSWER}\n\n"
)
_REPORT = (
    "You are given a report by a government agency. Write a one-page summary of the report.\n\nReport:\n{context}\n\n"
)
_MEETING_RULES = "the query based on the above meeting transcript in one or more sentences.\n\n"
_MEETING = (
    "You are given a meeting transcript and a query containing a question or instruction. Answer the query in one or "
    f"more sentences.\n\nTranscript:\n{{context}}\n\nNow, answer {_MEETING_RULES}"
)
_NEWS = "You are given several news passages. Write a one-page summary of all news. \n\nNews:\n{context}\n\n"
_TREC = "Please determine the type of the question below. Here are some examples of questions.\n\n{context}\n"
_TRIVIA = (
    f"Answer the question based on the given passage. {_ONLY_ANSWER} The following are some examples.\n\n"
    "{context}\n\n"
)
_DIALOGUE = "Summarize the dialogue into a few short sentences. The following are some examples.\n\n{context}\n\n"
_COUNT = (
    "There are some paragraphs below sourced from Wikipedia. Some of them may be duplicates. Please carefully read "
    "these paragraphs and determine how many unique paragraphs there are after removing duplicates. In other words, "
    "how many non-repeating paragraphs are there in total?\n\n{context}\n\n"
)
_COUNT_QUESTION = (
    "Please enter the final count of unique paragraphs after removing duplicates. The output format should only "
    "contain the number, such as 1, 2, 3, and so on.\n\n"
)
_RETRIEVE = (
    "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which paragraph the abstract is "
    "from.\n\n{context}\n\nThe following is an abstract.\n\n"
)
_RETRIEVE_QUESTION = (
    "{input}\n\nPlease enter the number of the paragraph that the abstract is from. The answer format must be like "
    '"Paragraph 1", "Paragraph 2", etc.\n\n'
)
_FIELDS_ZH = (
    "阅读以下文字并用中文简短回答：\n\n{context}\n\n"
    "现在请基于上面的文章回答下面的问题，只告诉我答案，不要输出任何其他字词。\n\n"
)
_ARTICLES_ZH = "请基于给定的文章回答下述问题。\n\n文章：{context}\n\n请基于上述文章回答下面的问题。\n\n"
_QUESTION_ZH = "问题：{input}\n"
_MEETING_ZH = "下面有一段会议记录，请你阅读后，写一段总结，总结会议的内容。\n会议记录：\n{context}\n\n"
_NEWS_ZH = "请判断给定新闻的类别，下面是一些例子。\n\n{context}\n"
_RETRIEVE_ZH = (
    "以下是若干段落文字，以及其中一个段落的摘要。请确定给定的摘要出自哪一段。\n\n{context}\n\n下面是一个摘要\n\n"
)
_RETRIEVE_QUESTION_ZH = '{input}\n\n请输入摘要所属段落的编号。答案格式必须是"段落1"，"段落2"等格式\n\n'
_CODE = "Please complete the code given below. \n{context}"
_QUESTION, _SPACED_QUESTION = "Question: {input}\n", "Question: {input}\n\n"

LONGBENCH_TASKS: dict[str, LongBenchTask] = {
    "narrativeqa": LongBenchTask(_NARRATIVE, _SPACED_QUESTION, "Answer:", "qa_f1", 128),
    "qasper": LongBenchTask(_QASPER, _SPACED_QUESTION, "Answer:", "qa_f1", 128),
    "multifieldqa_en": LongBenchTask(_FIELDS, _QUESTION, "Answer:", "qa_f1", 64),
    "hotpotqa": LongBenchTask(_PASSAGES, _QUESTION, "Answer:", "qa_f1", 32),
    "2wikimqa": LongBenchTask(_PASSAGES, _QUESTION, "Answer:", "qa_f1", 32),
    "musique": LongBenchTask(_PASSAGES, _QUESTION, "Answer:", "qa_f1", 32),
    "gov_report": LongBenchTask(
        _REPORT, "Now, write a one-page summary of the report.\n\n", "Summary:", "rouge_l", 512
    ),
    "qmsum": LongBenchTask(_MEETING, "Query: {input}\n", "Answer:", "rouge_l", 512),
    "multi_news": LongBenchTask(
        _NEWS, "Now, write a one-page summary of all the news.\n\n", "Summary:", "rouge_l", 512
    ),
    "trec": LongBenchTask(_TREC, "{input}", "Type:", "classification", 64, chat=False, cut="Type:"),
    "triviaqa": LongBenchTask(_TRIVIA, "{input}", "Answer:", "qa_f1_first_line", 32, chat=False, cut="Answer:"),
    "samsum": LongBenchTask(_DIALOGUE, "{input}", "Summary:", "rouge_l_first_line", 128, chat=False, cut="Summary:"),
    "passage_count": LongBenchTask(_COUNT, _COUNT_QUESTION, "The final answer is: ", "count", 32),
    "passage_retrieval_en": LongBenchTask(_RETRIEVE, _RETRIEVE_QUESTION, "The answer is: ", "retrieval", 32),
    "multifieldqa_zh": LongBenchTask(_FIELDS_ZH, _QUESTION_ZH, "回答：", "qa_f1_zh", 64),
    "dureader": LongBenchTask(_ARTICLES_ZH, _QUESTION_ZH, "回答：", "rouge_l_zh", 128),
    "vcsum": LongBenchTask(_MEETING_ZH, "", "会议总结：", "rouge_l_zh", 512),
    "lsht": LongBenchTask(_NEWS_ZH, "{input}", "类别：", "classification", 64, chat=False, cut="类别："),
    "passage_retrieval_zh": LongBenchTask(_RETRIEVE_ZH, _RETRIEVE_QUESTION_ZH, "答案是：", "retrieval_zh", 32),
    "lcc": LongBenchTask(_CODE, "", "Next line of code:\n", "code_similarity", 64, chat=False),
    "repobench-p": LongBenchTask(_CODE, "{input}", "Next line of code:\n", "code_similarity", 64, chat=False),
}


def longbench_samples(task: str, directory: Path, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Sample]:
    """All samples of a task of v1; contexts that would make the prompt longer than `max_length` lose their middle.

    Raises:
        InvalidInputError: unknown task, or its file is missing or has other fields.
    """
    if task not in LONGBENCH_TASKS:
        raise InvalidInputError(f"unknown task {task!r}; choose from {', '.join(LONGBENCH_TASKS)}")
    return [shortened(_sample(task, row), tokenizer, max_length) for row in read_rows(directory, task)]


def _sample(task: str, row: Row) -> Sample:
    recipe = LONGBENCH_TASKS[task]
    question = str(field(row, "input", task))
    return Sample(
        task=task,
        context=recipe.context.format(context=field(row, "context", task)),
        question=recipe.question.format(input=question.removesuffix(recipe.cut)),
        answer_prefix=recipe.prefix,
        answers=[str(answer) for answer in field(row, "answers", task)],
        max_new_tokens=recipe.max_new_tokens,
        metric=recipe.metric,
        classes=tuple(row.get("all_classes") or ()),
        chat=recipe.chat,
    )


def longbench_v2_samples(directory: Path | None, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Sample]:
    """All samples of v2, from data.json (or .jsonl) in a directory, else from the hub.

    Raises:
        InvalidInputError: the file is missing or has other fields.
    """
    rows = hub_rows(V2_REPOSITORY, None, "train") if directory is None else read_rows(directory, "data")
    return [shortened(_v2_sample(row), tokenizer, max_length) for row in rows]


def _v2_sample(row: Row) -> Sample:
    names = ("question", "choice_A", "choice_B", "choice_C", "choice_D")
    return Sample(
        task=V2_TASK,
        context=V2_CONTEXT.format(context=str(field(row, "context", V2_TASK)).strip()),
        question=V2_QUESTION.format(**{name: str(field(row, name, V2_TASK)).strip() for name in names}),
        answer_prefix="",
        answers=[str(field(row, "answer", V2_TASK))],
        max_new_tokens=V2_TOKENS,
        metric="choice",
        groups={"difficulty": str(row.get("difficulty", "")), "length": str(row.get("length", ""))},
    )


def shortened(sample: Sample, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Sample:
    """The sample with so much of the middle of its context left out that prompt and output take `max_length` tokens."""
    parts: Sequence[str] = (sample.context, sample.question + sample.answer_prefix)
    context, rest = (tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in parts)
    room = max_length - len(rest) - sample.max_new_tokens
    if len(context) <= room:
        return sample
    if room < 2:
        raise InvalidInputError(f"max_length {max_length} is too short for a question of {sample.task}")
    head, tail = context[: room // 2], context[len(context) - room // 2 :]
    halves = (str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in (head, tail))
    return replace(sample, context="".join(halves))
