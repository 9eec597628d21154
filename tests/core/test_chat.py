"""Conversations: the template, what is protected, where the context ends, stop strings and streaming."""

from __future__ import annotations

import pytest

from compactor_vllm import BatchCompressionParams, SamplingParams, SequenceCompressionParams
from compactor_vllm.core.chat import chat_prompt
from tests.tiny import byte_tokenizer

TALK = [
    {"role": "system", "content": "You know things."},
    {"role": "user", "content": "A long story. " * 20},
    {"role": "assistant", "content": "Fine."},
    {"role": "user", "content": "What was it about?"},
]
SAMPLING = SamplingParams(temperature=0, max_new_tokens=8, ignore_eos=True)


def ratio(value, **options):
    return SequenceCompressionParams(
        compression_ratio=value, protected_first_tokens=2, protected_last_tokens=2, **options
    )


def test_tokens_are_those_of_the_template():
    tokenizer = byte_tokenizer()
    prompt = chat_prompt(tokenizer, TALK, ratio(0.5), {})
    assert prompt.token_ids == tokenizer.apply_chat_template(TALK, add_generation_prompt=True)["input_ids"]


def test_the_last_user_message_is_protected_where_it_fits():
    tokenizer = byte_tokenizer()
    prompt = chat_prompt(tokenizer, TALK, ratio(0.5), {})
    ((low, high),) = prompt.params.protected_ranges
    assert high == len(prompt.token_ids)
    assert tokenizer.decode(prompt.token_ids[low:]) == "What was it about?<|end|><|assistant|>"
    short = chat_prompt(tokenizer, TALK[:2], ratio(0.1), {})  # the message itself is larger than the budget
    ((low, high),) = short.params.protected_ranges
    assert tokenizer.decode(short.token_ids[low:]).strip() == "<|end|><|assistant|>"


def test_context_end_is_a_message_index():
    tokenizer = byte_tokenizer()
    prompt = chat_prompt(tokenizer, TALK, ratio(0.5, context_end=3), {})
    context = tokenizer.decode(prompt.token_ids[: prompt.params.context_end])
    assert context.endswith("Fine.<|end|><|user|>") and prompt.params.protected_ranges == ()
    other = chat_prompt(tokenizer, [*TALK[:3], {"role": "user", "content": "Why?"}], ratio(0.5, context_end=3), {})
    end = prompt.params.context_end
    assert other.token_ids[:end] == prompt.token_ids[:end]
    with pytest.raises(ValueError, match="context_end=4 must be the index of a message after"):
        chat_prompt(tokenizer, TALK, ratio(0.5, context_end=4), {})


def test_chat_answers_in_order_with_compression(llm):
    batch = BatchCompressionParams(compression_method="compactor")
    talks = [TALK, TALK[:2], [{"role": "user", "content": "Hi"}]]
    answers = llm.generate_chat(talks, SAMPLING, batch, ratio(0.5), return_sequences=True)
    alone = [llm.generate_chat(talk, SAMPLING, batch, ratio(0.5)) for talk in talks]
    assert [a.text for a in answers] == alone and all(isinstance(a, str) for a in alone)
    assert 0.45 < answers[0].kept_fraction < 0.55


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([[]], "input 0: a conversation is a non-empty list"),
        ([TALK, ["hello"]], "input 1: a message needs"),
        ([TALK, [{"role": "user"}]], 'input 1: a message needs "role" and "content"'),
    ],
)
def test_bad_conversations(llm, messages, message):
    with pytest.raises(ValueError, match=message):
        llm.generate_chat(messages, SAMPLING)


def test_a_model_without_template_says_so(make_llm):
    llm = make_llm()
    llm.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no chat template; pass LLMConfig"):
        llm.generate_chat([TALK], SAMPLING)


def test_streamed_text_is_the_text(llm):
    whole = llm.generate_chat(TALK, SamplingParams(seed=3, max_new_tokens=60, ignore_eos=True))
    chunks = list(llm.stream(TALK, SamplingParams(seed=3, max_new_tokens=60, ignore_eos=True)))
    assert "".join(chunk.text for chunk in chunks) == whole
    assert [chunk.finish_reason for chunk in chunks][-1] == "length"
    assert all(chunk.finish_reason is None for chunk in chunks[:-1])


def test_stop_strings_cut_across_tokens(llm):
    sampling = SamplingParams(seed=5, max_new_tokens=60, ignore_eos=True)
    text = llm.generate("Once upon", sampling)
    stop = text[20:23]
    cut = llm.generate(
        "Once upon", SamplingParams(seed=5, max_new_tokens=60, ignore_eos=True, stop=stop), return_sequences=True
    )
    assert cut.finish_reason == "stop" and cut.text == text[: text.index(stop)]
