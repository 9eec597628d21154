"""A model class of lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness): `--model compactor`.

    python -m compactor_vllm.evaluation.lm_harness --model compactor \\
        --model_args pretrained=Qwen/Qwen3-8B,method=compactor,ratio=0.5 --tasks hellaswag

is lm-evaluation-harness's own command with this class registered; a program that imports this module has it, too.
What is compressed: the context of log-likelihoods, whose continuation follows uncompressed, and prompts of generations.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from typing import Any

from compactor_vllm.compression.compression_params import BatchCompressionParams, SequenceCompressionParams
from compactor_vllm.config import LLMConfig, SamplingParams
from compactor_vllm.core.llm_engine import LLM
from compactor_vllm.errors import InvalidInputError, MissingDependencyError
from compactor_vllm.evaluation.run_config import MethodChoice
from compactor_vllm.evaluation.runner import NO_THINKING, check_finished
from compactor_vllm.utils.sequence import Sequence

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise MissingDependencyError("this is a model of lm-eval: pip install 'compactor-vllm[lm-eval]'") from error

CALL = 256
"""Requests of one call of the engine."""


@register_model("compactor")
class CompactorLM(TemplateLM):
    """The engine behind lm-evaluation-harness.

    Args:
        pretrained: model, as in `LLMConfig`.
        method: with options in brackets if there are any, "snapkv[window=64]".
        ratio: fraction kept, or "auto" with a `quality`.
        protected_first, protected_last: tokens that are always kept.
        compression_type: "layer" or "head".
        max_gen_toks: tokens generated where a task says nothing.
        max_length: of a prompt and its output; longer prompts lose their beginning. None is the model's own.
        batch_size, max_batch_size: taken because the harness passes them; the engine makes its batches by itself.
        device, dtype, engine: "engine" options are fields of `LLMConfig`.

    Raises:
        InvalidInputError: an argument that does not exist, or a value that cannot work.
    """

    def __init__(
        self,
        pretrained: str = "smollm2-135m-instruct",
        method: str = "none",
        ratio: float | str = 1.0,
        quality: float | None = None,
        protected_first: int = 16,
        protected_last: int = 64,
        compression_type: str = "layer",
        max_gen_toks: int = 256,
        max_length: int | None = None,
        batch_size: Any = None,
        max_batch_size: Any = None,
        device: str | None = None,
        dtype: str = "auto",
        **engine: Any,
    ):
        super().__init__()
        unknown = sorted(engine.keys() - LLMConfig.__dataclass_fields__.keys())
        if unknown:
            raise InvalidInputError(f"unknown model argument {unknown[0]!r}; engine options are fields of LLMConfig")
        choice = MethodChoice.parse(method)
        self._whole = SequenceCompressionParams()
        self._batch = BatchCompressionParams(compression_type=compression_type)
        self._compressed = SequenceCompressionParams(
            compression_ratio=ratio,  # type: ignore[arg-type]
            quality=quality,
            compression_method=choice.method,
            method_params=choice.options,
            protected_first_tokens=protected_first,
            protected_last_tokens=protected_last,
        )
        self.max_gen_toks = max_gen_toks
        self.llm = LLM(
            LLMConfig(
                model=pretrained,
                max_model_len=max_length or "auto",
                device=(device or "auto").partition(":")[0],
                dtype=dtype,
                **{"show_progress_bar": False, **engine},
            )
        )
        self.tokenizer, self.max_length = self.llm.tokenizer, self.llm.max_model_len
        self.pretrained = pretrained

    # ---- what the harness asks of a tokenizer ------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return self.llm.spec.eos_token_ids[0]

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.pretrained.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        special = not string.startswith(self.tokenizer.bos_token or "\0")
        return self.tokenizer(string, add_special_tokens=special if add_special_tokens is None else add_special_tokens)[
            "input_ids"
        ]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            **NO_THINKING,
        )

    # ---- the three kinds of requests ---------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        return self._score([(context, continuation) for _, context, continuation in requests], self._compressed)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts. Nothing is a context here, so that nothing is compressed."""
        result = []
        for request in requests:
            (text,) = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 2,  # one token before them, and one that may follow
                context_len=1,
            )
            scores = self._score([make_disjoint_window(window) for window in windows], self._whole)
            result.append(sum(value for value, _ in scores))
        return result

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        sequences = []
        for request in requests:
            text, options = request.args
            sampling = self._sampling(options)
            room = self.max_length - sampling.max_new_tokens
            if room < 1:
                raise InvalidInputError(
                    f"max_gen_toks={sampling.max_new_tokens} leaves no room in max_length={self.max_length}"
                )
            sequences.append(
                Sequence(
                    prompt_token_ids=self.tok_encode(text)[-room:] or [self.prefix_token_id],
                    sampling_params=sampling,
                    compression_params=self._compressed,
                    batch_compression_params=self._batch,
                )
            )
        self._run(sequences)
        return [sequence.text for sequence in sequences]

    def _sampling(self, options: dict[str, Any]) -> SamplingParams:
        until = options.get("until") or []
        greedy = not options.get("do_sample", options.get("temperature", 0) > 0)
        return SamplingParams(
            temperature=0 if greedy else options.get("temperature", 1.0),
            top_p=options.get("top_p", 1.0),
            max_new_tokens=options.get("max_gen_toks", self.max_gen_toks),
            stop=[text for text in ([until] if isinstance(until, str) else until) if text],
        )

    def _score(
        self, pairs: SequenceOf[tuple[list[int], list[int]]], params: SequenceCompressionParams
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation after its context, and whether it is what greedy decoding would say."""
        sequences = []
        for context, continuation in pairs:
            room = self.max_length - 1 - len(continuation)
            if room < 1:
                raise InvalidInputError(
                    f"a continuation of {len(continuation)} tokens leaves no room in max_length={self.max_length}"
                )
            kept = context[-room:]
            sequences.append(
                Sequence(
                    prompt_token_ids=[*kept, *continuation],
                    sampling_params=SamplingParams(temperature=0, max_new_tokens=1, prompt_logprobs=1),
                    compression_params=_until(params, len(kept)),
                    batch_compression_params=self._batch,
                    prompt_logprobs_from=len(kept),
                )
            )
        self._run(sequences)
        result = []
        for sequence, (_, continuation) in zip(sequences, pairs, strict=True):
            assert sequence.prompt_logprobs is not None
            rows = [row or {} for row in sequence.prompt_logprobs[len(sequence.prompt_logprobs) - len(continuation) :]]
            chosen = [row[token] for row, token in zip(rows, continuation, strict=True)]
            result.append(
                (sum(chosen), all(value >= max(row.values()) for row, value in zip(rows, chosen, strict=True)))
            )
        return result

    def _run(self, sequences: list[Sequence]) -> None:
        for begin in range(0, len(sequences), CALL):
            part = sequences[begin : begin + CALL]
            self.llm.generate_from_sequences(part)
            check_finished(part)


def _until(params: SequenceCompressionParams, context_end: int) -> SequenceCompressionParams:
    """The compression of a prompt whose first `context_end` tokens are its context."""
    return params if params.keeps_everything else replace(params, context_end=context_end)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
