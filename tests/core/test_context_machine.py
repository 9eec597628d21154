"""Any order of what can be done with contexts gives right answers, and pages have exactly their owners after each step.

A small engine, which has to evict, preempt and send contexts to host memory all the time, is compared with a roomy one
that keeps no cache.
"""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from compactor_vllm import CompactorError, OutOfPagesError, SamplingParams, SequenceCompressionParams
from compactor_vllm.kv_cache.segment import Segment
from tests.core.test_context import COMPACTOR, all_free
from tests.core.test_context_memory import PAGE_BYTES

GREEDY = SamplingParams(temperature=0, max_new_tokens=10, ignore_eos=True)
SMALL = {"protected_first_tokens": 1, "protected_last_tokens": 1}
QUESTIONS = [[7, 8], list(range(40)), [3]]


class Contexts(RuleBasedStateMachine):
    make_llm = None
    roomy = None
    folder = None

    @initialize(host=st.sampled_from([0, 40, 200]))
    def start(self, host):
        self.llm = self.make_llm(kv_cache_memory_bytes=170 * PAGE_BYTES, context_host_bytes=host * PAGE_BYTES)
        self.contexts: list[tuple] = []  # with their twins in the roomy engine
        self.streams: list[tuple] = []  # with the tokens that they should have
        self.files: list[tuple] = []

    def add(self, make, twin):
        """Makes a context and its twin, if there is room for it."""
        free = self.llm.num_pages - self.llm.free_pages
        try:
            made = make()
        except (OutOfPagesError, CompactorError) as error:
            assert "pages" in str(error) or "slots" in str(error), error
            assert self.contexts or self.streams or free == 0, "what holds the pages?"
            return
        self.contexts.append((made, twin()))
        assert made.kept_tokens == self.contexts[-1][1].kept_tokens

    @precondition(lambda self: len(self.contexts) < 5)
    @rule(length=st.integers(3, 60), ratio=st.sampled_from([1.0, 0.5, 0.2]), data=st.data())
    def compress(self, length, ratio, data):
        parents = [pair for pair in self.contexts if len(pair[0].segments) < 4]
        parent = data.draw(st.sampled_from([(None, None), *parents]))
        params, method = SequenceCompressionParams(compression_ratio=ratio, **SMALL), COMPACTOR if ratio < 1 else None
        document = list(range(length))
        self.add(
            lambda: self.llm.compress(document, method, params, context=parent[0]),
            lambda: self.roomy.compress(document, method, params, context=parent[1]),
        )

    @precondition(lambda self: self.contexts and len(self.contexts) < 5)
    @rule(data=st.data())
    def recompress(self, data):
        context, twin = data.draw(st.sampled_from(self.contexts))
        if any(self.roomy._engine.manager.keeps_whole(segment) for segment in twin.segments):
            return
        self.add(lambda: context.recompress(0.15, **SMALL), lambda: twin.recompress(0.15, **SMALL))

    @precondition(lambda self: self.contexts and len(self.streams) < 4)
    @rule(data=st.data(), question=st.sampled_from(QUESTIONS), n=st.sampled_from([1, 1, 2]))
    def ask(self, data, question, n):
        context, twin = data.draw(st.sampled_from(self.contexts))
        self.begin(question, context, self.roomy.generate(question, GREEDY, return_sequences=True, context=twin), n)

    @precondition(lambda self: len(self.streams) < 4)
    @rule(length=st.integers(1, 90), n=st.sampled_from([1, 1, 2]))
    def ask_without_context(self, length, n):
        prompt = list(range(length))
        self.begin(prompt, None, self.roomy.generate(prompt, GREEDY, return_sequences=True), n)

    def begin(self, prompt, context, want, n):
        sampling = SamplingParams(temperature=0, max_new_tokens=10, ignore_eos=True, n=n)
        self.streams.append((self.llm.stream(prompt, sampling, context=context), want.output_token_ids))

    @precondition(lambda self: self.contexts and len(self.contexts) < 5)
    @rule(data=st.data(), question=st.sampled_from(QUESTIONS))
    def take_a_turn(self, data, question):
        context, twin = data.draw(st.sampled_from(self.contexts))
        if len(context.segments) > 4:
            return
        options = {"return_sequences": True, "extend_context": True}
        answer = self.llm.generate(question, GREEDY, context=context, **options)
        want = self.roomy.generate(question, GREEDY, context=twin, **options)
        if answer.finish_reason == "error":
            assert "pages" in answer.error
            want.extended_context.close()
            return
        assert answer.output_token_ids == want.output_token_ids
        self.contexts.append((answer.extended_context, want.extended_context))

    @precondition(lambda self: self.contexts)
    @rule(data=st.data())
    def close(self, data):
        for context in self.contexts.pop(data.draw(st.integers(0, len(self.contexts) - 1))):
            context.close()

    @precondition(lambda self: self.contexts)
    @rule(data=st.data())
    def pin(self, data):
        context, _ = data.draw(st.sampled_from(self.contexts))
        context.pinned = not context.pinned

    @precondition(lambda self: self.streams)
    @rule(data=st.data(), finish=st.booleans())
    def end(self, data, finish):
        stream, want = self.streams.pop(data.draw(st.integers(0, len(self.streams) - 1)))
        if finish:
            list(stream)
            for sequence in stream.sequences:
                if sequence.finish_reason == "error":
                    assert "pages" in sequence.error
                else:
                    assert sequence.output_token_ids == want
        stream.close()

    @precondition(lambda self: self.contexts)
    @rule(data=st.data())
    def save(self, data):
        context, twin = data.draw(st.sampled_from(self.contexts))
        path = self.folder / f"{len(list(self.folder.iterdir()))}.kv"
        try:
            context.save(path)
        except OutOfPagesError:
            assert context.offloaded
            return
        self.files.append((path, twin.token_ids, twin.kept_tokens))

    @precondition(lambda self: self.files and len(self.contexts) < 5)
    @rule(data=st.data())
    def load(self, data):
        path, token_ids, kept = data.draw(st.sampled_from(self.files))
        count = len(self.contexts)
        self.add(lambda: self.llm.load_context(path), lambda: self.roomy.load_context(path))
        for context, _ in self.contexts[count:]:
            assert context.token_ids == token_ids and context.kept_tokens == kept

    @rule()
    def make_room(self):
        """Evicts a cached prefix, or sends an idle context to host memory."""
        self.llm._engine.scheduler.make_room()

    @precondition(lambda self: self.llm._engine.scheduler.running)
    @rule()
    def preempt(self):
        self.llm._engine._read_drawn()
        scheduler = self.llm._engine.scheduler
        if scheduler.running:
            scheduler.preempt(scheduler.running[-1])

    @rule(steps=st.integers(1, 3))
    def step(self, steps):
        for _ in range(steps):
            self.llm._engine.step()

    @invariant()
    def every_segment_has_exactly_its_owners(self):
        if not hasattr(self, "llm"):
            return
        scheduler, manager = self.llm._engine.scheduler, self.llm._engine.manager
        requests = [*scheduler.queue, *scheduler.prefilling, *scheduler.running]
        owned = [segment for held in scheduler.contexts._held for segment in held.segments]
        owned += scheduler.prefixes.segments
        for request in [member for first in requests for member in (first, *first.siblings)]:
            owned += [*request.segments, *(x for x in request.offloaded or () if isinstance(x, Segment))]
        counts = Counter(map(id, owned))
        assert all(segment.refs == counts[id(segment)] for segment in owned)
        segments = {id(segment): segment for segment in owned}.values()
        manager.check_integrity([segment for segment in segments if segment.parked is None])
        assert manager.parked_bytes == sum(s.parked.nbytes for s in segments if s.parked is not None)
        reading = [s for r in (*scheduler.running, *scheduler.prefilling) for s in r.segments]
        assert not any(segment.parked for segment in reading)

    def teardown(self):
        if not hasattr(self, "llm"):
            return
        for stream, _ in self.streams:
            stream.close()
        for context in [context for pair in self.contexts for context in pair]:
            context.close()
        assert all_free(self.llm) and all_free(self.roomy)
        self.llm.clear_prefix_cache()
        assert self.llm._engine.manager.host_bytes_used == self.llm._engine.manager.parked_bytes == 0
        self.llm.close()


@pytest.mark.parametrize("cached", [True, False])
def test_any_order_of_operations(make_llm, tmp_path, cached):
    from hypothesis.stateful import run_state_machine_as_test

    class Machine(Contexts):
        pass

    Machine.make_llm = staticmethod(lambda **options: make_llm(prefix_cache=cached, **options))
    Machine.folder = tmp_path
    with make_llm(prefix_cache=False) as Machine.roomy:
        run_state_machine_as_test(
            Machine,
            settings=settings(
                max_examples=15,
                stateful_step_count=25,
                deadline=None,
                suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
            ),
        )
