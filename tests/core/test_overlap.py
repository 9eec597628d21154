"""Steps launched before the tokens of the step before are read give the same answers."""

from __future__ import annotations

import numpy as np
import pytest

from compactor_vllm import BatchCompressionParams, SamplingParams, SequenceCompressionParams


class RunAhead:
    """What a GPU allows: the host goes on while the device works."""

    overlaps = True

    def unit_done(self) -> None:
        pass


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, 256, n).tolist() for n in (30, 3, 90, 17, 1, 55)]


SAMPLINGS = {
    "greedy": SamplingParams(temperature=0, max_new_tokens=40, ignore_eos=True),
    "one token": SamplingParams(temperature=0, max_new_tokens=1),
    "drawn": SamplingParams(temperature=1.0, top_p=0.9, seed=5, max_new_tokens=9, ignore_eos=True),
    "several": SamplingParams(temperature=1.0, seed=2, n=3, max_new_tokens=6, ignore_eos=True),
    "penalties": SamplingParams(temperature=0, repetition_penalty=1.3, max_new_tokens=10, ignore_eos=True),
    "log-probabilities": SamplingParams(temperature=0, logprobs=2, max_new_tokens=5, ignore_eos=True),
    "stop": SamplingParams(temperature=0, max_new_tokens=40, stop_token_ids=tuple(range(0, 256, 9))),
}


@pytest.mark.parametrize("name", SAMPLINGS)
@pytest.mark.parametrize("pages", ["ample", "scarce"])
def test_answers_are_the_same(make_llm, name, pages):
    """With scarce pages requests are preempted while their tokens are on their way."""
    memory = {} if pages == "ample" else {"kv_cache_memory_bytes": 100_000}
    batch = BatchCompressionParams(compression_method="compactor")
    params = SequenceCompressionParams(compression_ratio=0.6, protected_first_tokens=1, protected_last_tokens=1)
    results = []
    for ahead in (False, True):
        with make_llm(**memory) as llm:
            if ahead:
                llm._engine._pace = RunAhead()
            answers = llm.generate(prompts(), SAMPLINGS[name], batch, params, return_sequences=True)
            rows = [sequence for answer in answers for sequence in (answer if isinstance(answer, list) else [answer])]
            results.append([(s.output_token_ids, s.finish_reason, s.logprobs, s.error) for s in rows])
            llm._engine.step()  # what was launched in vain is read and dropped
            assert not llm._engine.has_work and llm.free_pages == llm.num_pages
    assert results[0] == results[1]


def test_a_request_is_aborted_while_its_token_is_on_its_way(make_llm):
    with make_llm() as llm:
        llm._engine._pace = RunAhead()
        stream = llm.stream([1, 2, 3], SAMPLINGS["greedy"])
        for _ in range(3):
            next(stream)
        stream.close()
        assert stream.sequence.finish_reason == "abort"
        other = llm.generate([4, 5, 6], SAMPLINGS["greedy"], return_sequences=True)
        assert len(other.output_token_ids) == 40 and llm.free_pages == llm.num_pages


def test_a_short_prompt_interrupts_a_long_prefill(make_llm):
    """And the long one ends the same as without."""
    long, short = list(range(200)) * 4, [7, 8, 9]
    with make_llm() as llm:
        alone = llm.generate(long, SAMPLINGS["greedy"], return_sequences=True)
        first = llm.stream(long, SAMPLINGS["greedy"])
        engine = llm._engine
        engine._start_job()
        next(engine._jobs[0].progress)
        second = llm.stream(short, SAMPLINGS["greedy"])
        next(second)
        assert not first.sequence.output_token_ids and len(engine._jobs) == 1
        for _ in first:
            pass
        assert first.sequence.output_token_ids == alone.output_token_ids
        assert second.sequence.output_token_ids
        second.close()
        assert llm.free_pages == llm.num_pages
