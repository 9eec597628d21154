"""A context that was saved by one number of ranks is loaded by another."""

from __future__ import annotations

import pytest

from compactor_vllm import ContextFileError, SequenceCompressionParams
from tests.core.test_context import COMPACTOR, DOCUMENT, GREEDY, HALF, QUESTIONS, tokens


def ask(llm, context):
    return tokens(llm.generate(QUESTIONS, GREEDY, return_sequences=True, context=context))


def test_contexts_move_between_numbers_of_ranks(make_llm, llm, tmp_path, monkeypatch):
    """Two KV heads: one rank, two with a head each, and six (one query head each), where heads have replicas."""
    from compactor_vllm.contexts import tensor_file

    monkeypatch.setattr(tensor_file, "BLOCK_BYTES", 512)  # blocks of several heads, and of parts of them
    quarter = SequenceCompressionParams(compression_ratio=0.25, protected_first_tokens=2, protected_last_tokens=2)
    with (
        llm.compress(DOCUMENT, COMPACTOR, HALF) as first,
        llm.compress(DOCUMENT[:40], COMPACTOR, quarter, context=first) as one,
    ):
        one.save(tmp_path / "one.kv")
        want = ask(llm, one)
        for ranks in (2, 6):
            with make_llm(tensor_parallel_size=ranks) as several:
                with several.load_context(tmp_path / "one.kv") as loaded:
                    assert ask(several, loaded) == want and loaded.kept_tokens == one.kept_tokens
                    loaded.save(tmp_path / f"{ranks}.kv")
                    several._engine.manager.check_integrity()
                (tmp_path / "bad.kv").write_bytes((tmp_path / "one.kv").read_bytes()[:-1] + b"x")
                with pytest.raises(ContextFileError, match="checksum"):
                    several.load_context(tmp_path / "bad.kv")
                assert several.free_pages == several.num_pages
            assert (tmp_path / f"{ranks}.kv").read_bytes() == (tmp_path / "one.kv").read_bytes()
