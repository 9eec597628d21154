"""Turns of a conversation: each answer's context takes the next question, as if all had been one prompt."""

from __future__ import annotations

import gc

import numpy as np
import pytest

from compactor_vllm import BatchCompressionParams, InvalidInputError, SamplingParams, SequenceCompressionParams
from compactor_vllm.compression import SnapKV
from compactor_vllm.core.context import MOST_SEGMENTS
from tests.core.test_context import COMPACTOR, DOCUMENT, GREEDY, HALF, all_free
from tests.core.test_overlap import RunAhead

RNG = np.random.default_rng(17)
QUESTIONS = [RNG.integers(0, 256, n).tolist() for n in (5, 20, 1, 16, 9, 30, 3, 8, 12)]


def turn(llm, context, question, sampling=GREEDY, **options):
    return llm.generate(question, sampling, return_sequences=True, context=context, extend_context=True, **options)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("compressed", [False, True])
def test_turns_equal_one_growing_prompt(make_llm, ahead, compressed):
    """Nine turns: more than a context has segments, so that turns are merged."""
    with make_llm(prefix_cache=False) as llm:
        if ahead:
            llm._engine._pace = RunAhead()
        context = llm.compress(DOCUMENT, COMPACTOR if compressed else None, HALF if compressed else None)
        params = SequenceCompressionParams(
            **(
                {"compression_ratio": 0.5, "protected_first_tokens": 2, "protected_last_tokens": 2}
                if compressed
                else {}
            ),
            context_end=len(DOCUMENT),
        )
        batch, tokens, held = COMPACTOR if compressed else BatchCompressionParams(), list(DOCUMENT), [context]
        for question in QUESTIONS:
            tokens += question
            want = llm.generate(tokens, GREEDY, batch, params, return_sequences=True)
            answer = turn(llm, held[-1], question)
            assert answer.output_token_ids == want.output_token_ids and answer.prompt_token_ids == tokens
            assert answer.cached_tokens == held[-1].num_tokens and answer.kept_fraction == want.kept_fraction
            tokens += answer.output_token_ids
            held.append(answer.extended_context)
            assert held[-1].followed_by([]) == tokens and len(held[-1].segments) <= MOST_SEGMENTS
            llm._engine._read_drawn()
            llm._engine.manager.check_integrity()
        assert len(held[-1].segments) == MOST_SEGMENTS and held[-1].segments[0] is context.segments[0]
        # Older ones are as they were, and a conversation may branch anywhere.
        again = turn(llm, held[3], QUESTIONS[3])
        assert again.output_token_ids == tokens[again.extended_context.num_tokens + 1 - 10 :][:10]
        for one in [*held, again.extended_context]:
            one.close()
        assert all_free(llm)


def test_messages_have_what_the_template_writes_between_them(llm):
    """Also where an answer ends by itself: its end token and that of the template are one."""

    def encode(text: str) -> list[int]:
        return llm.tokenizer(text, add_special_tokens=False)["input_ids"]

    sampling = SamplingParams(seed=1, max_new_tokens=12)
    book = [{"role": "system", "content": "Short."}, {"role": "user", "content": "A river. " * 9}]
    held, joint, reasons = [llm.compress(book)], "", []
    expected = encode(f"<|system|>Short.<|end|><|user|>{'A river. ' * 9}")
    for i, question in enumerate([" Who?", "And when?", "Why?", "So?"]):
        message = [{"role": "user", "content": question}]
        options = {"return_sequences": True, "context": held[-1]}
        drawn = llm.generate_chat(message, sampling, **options).output_token_ids
        stop = SamplingParams(seed=1, max_new_tokens=12, stop_token_ids=[drawn[5]] if i % 2 else [])
        answer = llm.generate_chat(message, stop, extend_context=True, **options)
        expected += encode(f"{joint}{question}<|end|><|assistant|>")
        assert answer.prompt_token_ids == expected
        reasons.append(answer.finish_reason)
        expected += answer.output_token_ids[: -1 if answer.finish_reason == "stop" else None]
        held.append(answer.extended_context)
        joint = "<|end|><|user|>"
    assert reasons == ["length", "stop"] * 2
    for one in held:
        one.close()
    assert all_free(llm)


def test_conversations_without_a_document(llm):
    """The first message becomes a context with its answer; a stream extends as well, and so does each completion."""
    question = [{"role": "user", "content": "Tell me about a river."}]
    several = SamplingParams(seed=2, n=3, max_new_tokens=9, ignore_eos=True)
    group = llm.generate_chat(question, several, return_sequences=True, extend_context=True)
    contexts = [sequence.extended_context for sequence in group]
    for sequence, context in zip(group, contexts, strict=True):
        assert context.followed_by([]) == sequence.prompt_token_ids + sequence.output_token_ids
        assert context.segments[0] is contexts[0].segments[0]
        stream = llm.stream([{"role": "user", "content": "More?"}], GREEDY, context=context, extend_context=True)
        assert len("".join(chunk.text for chunk in stream)) > 0
        assert stream.sequence.prompt_token_ids[: len(context.followed_by([]))] == context.followed_by([])
        stream.sequence.extended_context.close()
        context.close()
    assert all_free(llm)


def test_old_turns_are_compressed_when_that_is_asked_for(llm, tmp_path):
    with llm.compress(DOCUMENT, COMPACTOR, HALF) as book:
        held = [book]
        for question in QUESTIONS[:3]:
            held.append(turn(llm, held[-1], question).extended_context)
        talk = held[-1]
        with pytest.raises(InvalidInputError, match=r"tokens 150 to 164 were kept whole.*llm.compress\("):
            talk.recompress(0.3, protected_first_tokens=2, protected_last_tokens=2)
        said = talk.token_ids[book.num_tokens :]
        with (
            llm.compress(said, COMPACTOR, HALF, context=book) as shorter,
            shorter.recompress(0.3, protected_first_tokens=2, protected_last_tokens=2) as shortest,
        ):
            assert shorter.token_ids == talk.token_ids and len(shorter.segments) == 2
            assert talk.kept_tokens == 75 + len(said) and shorter.kept_tokens == 75 + -(-len(said) // 2)
            assert shortest.kept_fraction == pytest.approx(0.3, abs=0.02)
        # What is pending after the last answer survives a file.
        talk.save(tmp_path / "talk.kv")
        with llm.load_context(tmp_path / "talk.kv") as loaded:
            assert loaded.pending_ids == talk.pending_ids != () and loaded.followed_by([1]) == talk.followed_by([1])
            want, got = (turn(llm, context, [7, 8]) for context in (talk, loaded))
            assert want.output_token_ids == got.output_token_ids
            for answer in (want, got):
                answer.extended_context.close()
        for one in held:
            one.close()
    assert all_free(llm)


def test_what_cannot_be_extended_says_so(llm):
    with pytest.raises(InvalidInputError, match="return_sequences"):
        llm.generate([1, 2], GREEDY, extend_context=True)
    snapkv = BatchCompressionParams(compression_method=SnapKV(prune_every=4))
    half = SequenceCompressionParams(compression_ratio=0.5)
    with pytest.raises(InvalidInputError, match="prunes answers"):
        llm.generate([1, 2], GREEDY, snapkv, half, return_sequences=True, extend_context=True)
    held = [llm.compress(DOCUMENT[:20], COMPACTOR, HALF)]
    for i in range(MOST_SEGMENTS - 1):
        held.append(llm.compress(DOCUMENT[i : i + 20], COMPACTOR, HALF, context=held[-1]))
    assert len(held[-1].segments) == MOST_SEGMENTS
    assert len(llm.generate([1], GREEDY, context=held[-1], return_sequences=True).output_token_ids) == 10
    with pytest.raises(InvalidInputError, match="6 compressed segments"):
        turn(llm, held[-1], [1])
    for one in held:
        one.close()
    assert all_free(llm)


def test_aborted_and_failed_turns_make_no_context(llm):
    with llm.compress(DOCUMENT, COMPACTOR, HALF) as book:
        stream = llm.stream([1, 2], GREEDY, context=book, extend_context=True)
        next(stream)
        stream.close()
        assert stream.sequence.extended_context is None
        turn(llm, book, [1, 2])  # dropped without being closed
    gc.collect()
    assert llm.free_pages == llm.num_pages and all_free(llm)
