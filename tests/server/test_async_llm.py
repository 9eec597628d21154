"""AsyncLLM: answers equal the offline ones; whatever ends a request early frees its pages."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from compactor_vllm import (
    LLM,
    AsyncLLM,
    BatchCompressionParams,
    LLMConfig,
    SamplingParams,
    SequenceCompressionParams,
)
from compactor_vllm.errors import CheckpointError, EngineClosedError, InvalidInputError, RequestError

SAMPLING = SamplingParams(seed=5, max_new_tokens=20, ignore_eos=True)
ENDLESS = SamplingParams(seed=5, max_new_tokens=2000, ignore_eos=True)
COMPACTOR = BatchCompressionParams(compression_method="compactor")
HALF = SequenceCompressionParams(compression_ratio=0.5, protected_first_tokens=4, protected_last_tokens=4)
TEXT = "Once upon a time there was a river. " * 5
TALK = [{"role": "user", "content": TEXT}]

Use = Callable[[Callable[[AsyncLLM], Awaitable[None]]], None]


@pytest.fixture(scope="module")
def use(make_config: Callable[..., LLMConfig]) -> Use:
    """Runs a coroutine with an engine of its own, which it must leave idle."""

    def run(body: Callable[[AsyncLLM], Awaitable[None]]) -> None:
        async def with_engine() -> None:
            async with AsyncLLM(make_config()) as engine:
                await body(engine)
                await idle(engine)

        asyncio.run(with_engine())

    return run


async def idle(engine: AsyncLLM, seconds: float = 5) -> None:
    for _ in range(int(seconds / 0.01)):
        stats = engine.stats
        if stats.running == stats.waiting == 0 and stats.free_pages == stats.pages > 0:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(engine.stats)


async def running(engine: AsyncLLM, count: int = 1) -> None:
    while engine.stats.running < count:
        await asyncio.sleep(0.005)


def test_chunks_make_up_the_offline_answer(use: Use, llm: LLM) -> None:
    async def body(engine: AsyncLLM) -> None:
        for prompt, call in ((TEXT, llm.generate), (TALK, llm.generate_chat), ([5, 6, 7], llm.generate)):
            expected = call(prompt, SAMPLING, COMPACTOR, HALF, return_sequences=True)
            answer = engine.generate(prompt, SAMPLING, COMPACTOR, HALF)  # type: ignore[arg-type]
            assert answer.sequences == []
            chunks = [chunk async for chunk in answer]
            assert "".join(chunk.text for chunk in chunks) == answer.sequence.text == expected.text
            assert [token for chunk in chunks for token in chunk.token_ids] == expected.output_token_ids
            assert answer.sequence.is_finished and answer.sequence.kept_tokens == expected.kept_tokens
            assert len(answer.token_times[0]) == 20 and answer.token_times[0] == sorted(answer.token_times[0])

    use(body)


def test_many_at_once(use: Use, llm: LLM) -> None:
    prompts = [TEXT[: 20 + 9 * i] for i in range(12)]

    async def body(engine: AsyncLLM) -> None:
        answers = [engine.generate(prompt, SAMPLING, COMPACTOR, HALF) for prompt in prompts]
        results = await asyncio.gather(*(answer.complete() for answer in answers))
        assert [group[0].text for group in results] == llm.generate(prompts, SAMPLING, COMPACTOR, HALF)

    use(body)


def test_several_completions(use: Use, llm: LLM) -> None:
    params = SamplingParams(seed=5, max_new_tokens=8, ignore_eos=True, n=3)

    async def body(engine: AsyncLLM) -> None:
        answer = engine.generate(TEXT, params)
        texts = ["", "", ""]
        async for chunk in answer:
            texts[chunk.index] += chunk.text
        assert texts == [s.text for s in answer.sequences] == llm.generate(TEXT, params)

    use(body)


def test_closing_frees_pages_before_it_returns(use: Use) -> None:
    async def body(engine: AsyncLLM) -> None:
        async with aclosing(engine.generate(TEXT, ENDLESS)) as answer:
            async for _ in answer:
                break
        assert engine.stats.free_pages == engine.stats.pages and engine.stats.running == 0
        assert answer.sequence.finish_reason == "abort"
        assert [chunk async for chunk in answer] == []
        await answer.aclose()
        closed = engine.generate(TEXT, ENDLESS)
        closed.close()
        assert [chunk async for chunk in closed] == [] and closed.sequences == []

    use(body)


def test_cancelling_the_task_ends_the_request(use: Use) -> None:
    async def body(engine: AsyncLLM) -> None:
        task = asyncio.ensure_future(engine.generate(TEXT, ENDLESS).complete())
        await running(engine)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await idle(engine, 2)
        for delay in (0, 1, 2, 3):  # while it is prepared, submitted, ...
            task = asyncio.ensure_future(engine.generate(TEXT, ENDLESS).complete())
            for _ in range(delay):
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(engine.generate(TEXT, ENDLESS).complete(), 0.1)

    use(body)


def test_dropping_it_ends_the_request(use: Use) -> None:
    async def body(engine: AsyncLLM) -> None:
        answer = engine.generate(TEXT, ENDLESS)
        await answer.__anext__()
        del answer
        gc.collect()
        await idle(engine, 2)

    use(body)


def test_wrong_inputs_raise_where_they_are_awaited(use: Use) -> None:
    async def body(engine: AsyncLLM) -> None:
        for prompt, error in (([1, 2, 999], RequestError), ("", RequestError), ([{"role": "x"}], InvalidInputError)):
            with pytest.raises(error):
                await engine.generate(prompt).start()  # type: ignore[arg-type]
            with pytest.raises(error):
                async for _ in engine.generate(prompt):  # type: ignore[arg-type]
                    pass
        with pytest.raises(ValueError, match="gzip"):
            await engine.generate(TEXT, SAMPLING, BatchCompressionParams(compression_method="gzip")).complete()

    use(body)


def test_prepared_sequences_and_text(use: Use, llm: LLM) -> None:
    async def body(engine: AsyncLLM) -> None:
        sequence = await engine.prepare(TALK, SAMPLING)
        [result] = await engine.generate_from_sequence(sequence).complete()
        assert result is sequence and result.text == llm.generate_chat(TALK, SAMPLING)
        assert await engine.detokenize(await engine.tokenize("a river")) == "a river"
        assert engine.max_model_len == 2048 and engine.vocab_size == 260 and engine.tokenizer is not None
        assert engine.is_ready and engine.failure is None and engine.step_seconds == 0

    use(body)


def test_preemptions_are_counted(make_config: Callable[..., LLMConfig], llm: LLM) -> None:
    prompts = [TEXT[: 60 + i] for i in range(6)]
    params = SamplingParams(seed=1, max_new_tokens=40, ignore_eos=True)
    small = make_config(kv_cache_memory_bytes=60 * (16 * 2 * 16 * 4 + 8 * 16))

    async def main() -> None:
        async with AsyncLLM(small) as engine:
            results = await asyncio.gather(*(engine.generate(prompt, params).complete() for prompt in prompts))
            assert [group[0].text for group in results] == llm.generate(prompts, params)
            assert engine.stats.preemptions > 0

    asyncio.run(main())


def test_loading_errors_are_raised_by_ready(tmp_path: Path) -> None:
    async def main() -> None:
        engine = AsyncLLM(LLMConfig(model=str(tmp_path / "nothing"), device="cpu"))
        for _ in range(2):
            with pytest.raises(CheckpointError):
                await engine.ready()
        with pytest.raises(CheckpointError):
            await engine.generate("a").complete()
        assert not engine.is_ready and "nothing" in str(engine.failure)
        with pytest.raises(CheckpointError):
            _ = engine.max_model_len
        engine.close()

    asyncio.run(main())
    with pytest.raises(InvalidInputError, match="takes an LLMConfig"):
        AsyncLLM("smollm2-135m-instruct")  # type: ignore[arg-type]


def test_closing_the_engine_ends_what_runs(make_config: Callable[..., LLMConfig]) -> None:
    async def main() -> None:
        async with AsyncLLM(make_config()) as engine:
            task = asyncio.ensure_future(engine.generate(TEXT, ENDLESS).complete())
            await running(engine)
        with pytest.raises(EngineClosedError, match="this engine is closed"):
            await task
        with pytest.raises(EngineClosedError):
            await engine.generate(TEXT).complete()
        engine.close()

    asyncio.run(main())


def test_an_engine_that_fails_says_why(make_config: Callable[..., LLMConfig]) -> None:
    async def main() -> None:
        engine = AsyncLLM(make_config())
        await engine.ready()
        task = asyncio.ensure_future(engine.generate(TEXT, ENDLESS).complete())
        await running(engine)

        def broken() -> None:
            raise RuntimeError("the lights went out")

        engine._thread.llm._engine.step = broken  # type: ignore[union-attr]
        for work in (task, engine.generate(TEXT).complete(), engine.ready(), engine.prepare(TEXT)):
            with pytest.raises(EngineClosedError, match="the engine has failed: RuntimeError: the lights went out"):
                await work
        assert engine.failure == "the engine has failed: RuntimeError: the lights went out"
        engine.close()

    asyncio.run(main())


def test_loops_of_several_threads_share_one_engine(make_config: Callable[..., LLMConfig], llm: LLM) -> None:
    engine = AsyncLLM(make_config())

    def in_a_loop(prompt: str) -> str:
        async def main() -> str:
            return (await engine.generate(prompt, SAMPLING).complete())[0].text

        return asyncio.run(main())

    async def main() -> list[Any]:
        return await asyncio.gather(*(asyncio.to_thread(in_a_loop, TEXT[:n]) for n in (30, 50, 70)))

    try:
        assert asyncio.run(main()) == llm.generate([TEXT[:n] for n in (30, 50, 70)], SAMPLING)

        async def abandoned() -> None:
            answer = engine.generate(TEXT, ENDLESS)
            await answer.__anext__()
            engine.kept = answer  # type: ignore[attr-defined]

        asyncio.run(abandoned())  # its loop is closed while the request runs

        asyncio.run(idle(engine))
    finally:
        engine.close()
