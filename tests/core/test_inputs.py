"""Bad input: an error that says what is wrong and what would be right, and nothing has been done."""

from __future__ import annotations

import math

import pytest

from compactor_vllm import (
    LLM,
    BatchCompressionParams,
    EngineClosedError,
    LLMConfig,
    MissingDependencyError,
    SamplingParams,
    Sequence,
    SequenceCompressionParams,
)

GOOD = [[1, 2, 3], [4, 5, 6]]


def params(**options):
    return {"per_sequence_compression_params": SequenceCompressionParams(**options)}


def method(name):
    return {"batch_compression_params": BatchCompressionParams(compression_method=name)}


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1], []], {}, r"input 1: the prompt is empty"),
        ([[1], ""], {}, r"input 1: the prompt is empty"),
        ([[1], [1] * 3000], {}, r"input 1: the prompt has 3000 tokens.*max_model_len=2048"),
        ([[1], [1, 260]], {}, r"input 1: token id 260 at position 1 is outside of the vocabulary \[0, 260\)"),
        ([[-1]], {}, r"input 0: token id -1 at position 0"),
        ([[1, 2.5]], {}, r"token id 2.5"),
        ([[1], None], {}, r"input 1: a prompt is text or a list of token ids"),
        (GOOD, {"sampling_params": [SamplingParams()]}, r"sampling_params has 1 entries for 2 inputs"),
        (GOOD, {"sampling_params": [SamplingParams(), 3]}, r"input 1: sampling_params must hold SamplingParams"),
        (GOOD, {"sampling_params": {"temperature": 0}}, r"sampling_params must be a SamplingParams or a list"),
        (GOOD, {"per_sequence_compression_params": []}, r"per_sequence_compression_params has 0 entries for 2 inputs"),
        (GOOD, method("compactr"), r"compactr.*compactor"),
        (GOOD, params(compression_method="snapkv", method_params={"windw": 3}), r"window"),
        (GOOD, params(compression_method="compactor", method_params={"prune_every": 3}), r"prune_every"),
        (GOOD, params(context_end=3), r"input 0: context_end=3 leaves no token"),
        (GOOD, params(protected_ranges=[(0, 5)]), r"input 0: protected range \(0, 5\) ends beyond"),
        (GOOD, {"sampling_params": SamplingParams(n=17)}, r"n=17 is more than max_num_seqs=16"),
    ],
)
def test_bad_calls_name_the_input_and_do_nothing(llm, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        llm.generate(prompts, **options)
    assert not llm._engine.has_work and llm.free_pages == llm.num_pages


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SamplingParams(temperature=math.nan), "temperature must be a number in"),
        (lambda: SamplingParams(temperature=-1), "temperature"),
        (lambda: SamplingParams(max_new_tokens=0), "max_new_tokens must be an integer >= 1"),
        (lambda: SamplingParams(top_p=0), "top_p"),
        (lambda: SamplingParams(top_k=-3), "top_k"),
        (lambda: SamplingParams(stop=[""]), "stop"),
        (lambda: SamplingParams(n=True), "n must be"),
        (lambda: SequenceCompressionParams(compression_ratio=0), "fraction kept and must lie in"),
        (lambda: SequenceCompressionParams(compression_ratio=1.5), "fraction kept and must lie in"),
        (lambda: SequenceCompressionParams(compression_ratio=math.nan), "fraction kept"),
        (
            lambda: SequenceCompressionParams(protected_first_tokens=-1),
            "protected_first_tokens must be an integer >= 0",
        ),
        (lambda: SequenceCompressionParams(max_kept_tokens=0), "max_kept_tokens"),
        (lambda: SequenceCompressionParams(protected_ranges=[(3, 3)]), "begin < end"),
        (lambda: BatchCompressionParams(compression_type="token"), "compression_type"),
        (lambda: LLMConfig(model=""), "model must be"),
        (lambda: LLMConfig(model="x", max_num_seqs=0), "max_num_seqs must be a positive integer"),
        (lambda: LLMConfig(model="x", kvcache_page_size=100), "kvcache_page_size must be one of 16"),
        (lambda: LLMConfig(model="x", dtype="int8"), "dtype must be one of"),
        (lambda: LLMConfig(model="x", gpu_memory_utilization=2), "gpu_memory_utilization"),
        (lambda: LLMConfig(model="x", attention_backend="fast"), "attention_backend must be one of"),
        (lambda: LLM("smollm2-135m-instruct"), "LLM takes an LLMConfig"),
    ],
)
def test_bad_parameters_say_what_would_be_right(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"max_model_len": 5000}, ValueError, r"max_model_len=5000 is more than the checkpoint's 4096"),
        ({"kv_cache_memory_bytes": 1000}, ValueError, r"raise kv_cache_memory_bytes"),
        ({"tensor_parallel_size": 4}, ValueError, r"tensor_parallel_size=4 does not divide .*; possible: 1, 2, 6"),
        ({"attention_backend": "flash_attention"}, MissingDependencyError, r"needs an NVIDIA GPU"),
    ],
)
def test_engines_that_cannot_be_made(make_llm, changes, error, message):
    with pytest.raises(error, match=message):
        make_llm(**changes)


def test_parameters_are_immutable(llm):
    compression = SequenceCompressionParams(compression_ratio=0.5, method_params={"window": 4})
    with pytest.raises(AttributeError):
        compression.compression_ratio = 1.0
    with pytest.raises(TypeError):
        compression.method_params["window"] = 8


def test_a_sequence_runs_once(llm):
    sequence = Sequence(prompt_token_ids=[1, 2, 3], sampling_params=SamplingParams(max_new_tokens=2))
    assert llm.generate_from_sequences([sequence]) == [sequence] and sequence.is_finished
    with pytest.raises(ValueError, match="input 0: this sequence has run before"):
        llm.generate_from_sequences([sequence])


def test_a_failing_method_ends_its_sequence_and_no_other(llm, tmp_path):
    file = tmp_path / "bad.py"
    file.write_text(
        "from dataclasses import dataclass\n"
        "from compactor_vllm.compression import BaseCompressionMethod\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Bad(BaseCompressionMethod):\n"
        "    def post_rope_scoring(self, q, k, v, pre_rope_scores, context):\n"
        "        raise RuntimeError('no idea')\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Nan(BaseCompressionMethod):\n"
        "    def post_rope_scoring(self, q, k, v, pre_rope_scores, context):\n"
        "        return k.float().norm(dim=-1) * float('nan')\n"
    )
    prompts = [list(range(50)), list(range(100, 150)), list(range(120, 180))]
    methods = [f"{file}:Bad", "compactor", f"{file}:Nan"]
    compression = [
        SequenceCompressionParams(
            compression_ratio=0.5, protected_first_tokens=2, protected_last_tokens=2, compression_method=m
        )
        for m in methods
    ]
    sampling = SamplingParams(temperature=0, max_new_tokens=5, ignore_eos=True)
    bad, good, nan = llm.generate(prompts, sampling, per_sequence_compression_params=compression, return_sequences=True)
    assert bad.finish_reason == "error" and "no idea" in bad.error
    assert nan.finish_reason == "error" and "NaN scores" in nan.error
    alone = llm.generate(prompts[1], sampling, per_sequence_compression_params=compression[1], return_sequences=True)
    assert good.finish_reason == "length" and good.output_token_ids == alone.output_token_ids
    assert llm.free_pages == llm.num_pages


def test_a_closed_engine_says_so(make_llm):
    with make_llm() as llm:
        assert llm.generate([1, 2], SamplingParams(max_new_tokens=1)) is not None
    with pytest.raises(EngineClosedError):
        llm.generate([1, 2])
    llm.close()


def test_interrupting_frees_everything(make_llm):
    llm = make_llm()
    step, calls = llm._engine.step, 0

    def interrupted():
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        step()

    llm._engine.step = interrupted
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[1] * 50, [2] * 60], SamplingParams(max_new_tokens=50, ignore_eos=True))
    assert llm.free_pages == llm.num_pages and not llm._engine.has_work


def test_options_without_effect_say_so(llm, caplog):
    llm.generate([1, 2, 3], SamplingParams(max_new_tokens=1), method("compactor")["batch_compression_params"])
    assert "compression_ratio=1.0 keeps everything" in caplog.text
    caplog.clear()
    llm.generate([1, 2, 3], SamplingParams(max_new_tokens=1), **params(compression_ratio=0.5))
    assert "no effect with the method NONE" in caplog.text
