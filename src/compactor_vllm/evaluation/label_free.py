"""Measures that need no right answers: how far a compressed cache moves the model's own predictions.

A target text follows context and question: its tokens are predicted one after the other with the full cache and with a
compressed one, all from one prefill in which they are the end of the prompt (teacher forcing).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from statistics import fmean
from typing import TYPE_CHECKING, Any

from compactor_vllm.compression.calibration import probe_window
from compactor_vllm.config import SamplingParams
from compactor_vllm.core.probe import window_nll
from compactor_vllm.errors import InvalidInputError
from compactor_vllm.evaluation.run_config import FULL_CACHE, Cell, MethodChoice, RunConfig
from compactor_vllm.evaluation.run_directory import Record
from compactor_vllm.evaluation.runner import Pair, batch_params, check_finished, costs, prompts_of
from compactor_vllm.evaluation.tasks.haystack import Prose
from compactor_vllm.evaluation.tasks.sample import Sample, sample_rng
from compactor_vllm.utils.sequence import Sequence

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

TOP_TOKENS = 32
"""Likeliest tokens of each position that distributions are compared on; all others count as one."""

FULL_CELL = Cell(choice=MethodChoice(label=FULL_CACHE, method=FULL_CACHE), retention=1.0)

CONTINUATION_TASK = "continuation"

Distribution = Mapping[int, float]
"""Token id -> natural log-probability, most likely first."""


def continuation_sample(
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    target: int = 64,
    seed: int = 0,
    index: int = 0,
    text: SequenceOf[str] | None = None,
) -> Sample:
    """A text of `length` tokens whose last `target` tokens are to be predicted, without chat template.

    Args:
        text: sentences of the user's text, of which sample i begins at another sentence; None makes prose up.

    Raises:
        InvalidInputError: the text is too short.
    """
    rng = sample_rng(CONTINUATION_TASK, seed, index)
    if not 0 < target < length:
        raise InvalidInputError(f"length {length} must be more than the {target} tokens to predict")
    if text is not None:
        begin = rng.randrange(len(text))
        text = [*text[begin:], *text[:begin]]
    prose, count = Prose(rng, text), length
    while len(ids := tokenizer(" ".join(prose.words(count)), add_special_tokens=False)["input_ids"]) < length:
        count *= 2
    context, rest = (str(tokenizer.decode(part)) for part in (ids[: length - target], ids[length - target : length]))
    return Sample(CONTINUATION_TASK, context, "", "", [rest], max_new_tokens=1, chat=False)


class LabelFree:
    """Negative log-likelihood, agreement and divergence of each target.

    The target is the sample's first reference. Records: "nll" and "nll_full", the mean negative log-likelihood of the
    target's tokens with this cache and with the full one; "nll_ratio" = nll_full / nll, g(r) of the Compactor paper
    (arXiv 2507.08143); "top1", the fraction of positions whose likeliest token is the same; "kl", the mean of
    KL(full || compressed) in nats, see `divergence`; "attention_error" and "attention_errors", see `attention_errors`;
    costs.

    Args:
        context_nll: also measure NLL(context) of a window of each context, as `compression.calibration` has it.
    """

    def __init__(self, llm: Any, config: RunConfig, *, context_nll: bool = False):
        self._llm, self._config, self._probes = llm, config, context_nll
        self._context_nll: dict[int, Record] = {}
        self._known: dict[tuple[int, str, float], tuple[list[Distribution], Any]] = {}
        self._targets: dict[int, list[int]] = {}

    def prepare(self, samples: SequenceOf[Sample]) -> None:
        """Forgets the samples of the batch before, and looks at the contexts of these."""
        self._targets = {id(sample): self._target(sample) for sample in samples}
        self._known = {}
        self._context_nll = self._probe(samples) if self._probes else {}

    def measure(self, pairs: SequenceOf[Pair]) -> list[Record]:
        # The full cache comes before the others of its sample, so that one prefill makes all of them.
        wanted = {_key(*pair): pair for sample, cell in pairs for pair in ((sample, FULL_CELL), (sample, cell))}
        missing = {key: pair for key, pair in wanted.items() if key not in self._known}
        self._known |= dict(zip(missing, self._predict(list(missing.values())), strict=True))
        records = []
        for sample, cell in pairs:
            full_rows, full = self._known[_key(sample, FULL_CELL)]
            rows, sequence = self._known[_key(sample, cell)]
            errors = attention_errors(full.attention_LTHD, sequence.attention_LTHD)
            own = {"attention_error": fmean(errors), "attention_errors": [round(e, 6) for e in errors]}
            own |= self._context_nll.get(id(sample), {})
            records.append(compare(full_rows, rows, self._targets[id(sample)]) | own | costs(sequence))
        return records

    def _probe(self, samples: SequenceOf[Sample]) -> dict[int, Record]:
        prompts = prompts_of(self._llm.tokenizer, samples, self._config.query_aware)
        ends = {key: prompt.context_end for key, prompt in prompts.items()}
        windows = [prompts[key].token_ids[slice(*probe_window(end))] for key, end in ends.items()]
        sampling = SamplingParams(temperature=0, max_new_tokens=1, prompt_logprobs=0)
        sequences = self._llm.generate(windows, sampling, return_sequences=True)
        check_finished(sequences)
        return {key: {"context_nll": window_nll(s)} for key, s in zip(ends, sequences, strict=True)}

    def _target(self, sample: Sample) -> list[int]:
        text = sample.answers[0] if not sample.chat else " " + ", ".join(sample.answers)
        return self._llm.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _predict(self, pairs: SequenceOf[Pair]) -> list[tuple[list[Distribution], Any]]:
        if not pairs:
            return []
        prompts = prompts_of(self._llm.tokenizer, (sample for sample, _ in pairs), self._config.query_aware)
        ordered = [prompts[id(sample)] for sample, _ in pairs]
        targets = [self._targets[id(sample)] for sample, _ in pairs]
        sequences = [
            Sequence(
                prompt_token_ids=prompt.token_ids + target,
                sampling_params=SamplingParams(temperature=0, max_new_tokens=1, prompt_logprobs=TOP_TOKENS),
                compression_params=cell.params(self._config, prompt.context_end),
                batch_compression_params=batch_params(self._config),
                prompt_logprobs_from=len(prompt.token_ids),
                attention_from=len(prompt.token_ids),
            )
            for (_, cell), prompt, target in zip(pairs, ordered, targets, strict=True)
        ]
        self._llm.generate_from_sequences(sequences)
        check_finished(sequences)
        return [(_tail(s, len(t)), s) for s, t in zip(sequences, targets, strict=True)]


def _key(sample: Sample, cell: Cell) -> tuple[int, str, float]:
    return id(sample), cell.choice.label, cell.retention


def _tail(sequence: Sequence, count: int) -> list[Distribution]:
    """The distributions before the last `count` tokens of a prompt."""
    assert sequence.prompt_logprobs is not None
    return [entry for entry in sequence.prompt_logprobs[-count:] if entry is not None]


def compare(full: SequenceOf[Distribution], own: SequenceOf[Distribution], target: SequenceOf[int]) -> Record:
    """The measures of one target from the distributions before each of its tokens.

    Every distribution has the target's token among its entries.
    """
    nll_full = -fmean(row[token] for row, token in zip(full, target, strict=True))
    nll = -fmean(row[token] for row, token in zip(own, target, strict=True))
    pairs = list(zip(full, own, strict=True))
    return {
        "nll": nll,
        "nll_full": nll_full,
        "nll_ratio": nll_full / nll if nll > 0 else 1.0,
        "top1": fmean(max(a, key=a.__getitem__) == max(b, key=b.__getitem__) for a, b in pairs),
        "kl": fmean(divergence(a, b) for a, b in pairs),
        "target_tokens": len(target),
    }


def attention_errors(full_LTHD: Tensor, own_LTHD: Tensor) -> list[float]:
    """For each layer the relative error of attention outputs: |own - full| / |full|, the mean over query heads.

    Norms are over tokens and dimensions. A layer's inputs differ, too, where the layers before it erred.
    """
    difference_LH = (own_LTHD.double() - full_LTHD.double()).pow(2).sum((1, 3)).sqrt()
    return (difference_LH / full_LTHD.double().pow(2).sum((1, 3)).sqrt()).mean(1).tolist()


def divergence(p: Distribution, q: Distribution) -> float:
    """A lower bound of KL(p || q) in nats: that of the distributions in which all tokens that only one of them lists,
    or neither, are one event.

    It is 0 for equal distributions, and grows towards the divergence with the number of listed tokens.
    """
    shared = p.keys() & q.keys()
    rest_p = max(1 - math.fsum(math.exp(p[token]) for token in shared), 0.0)
    rest_q = max(1 - math.fsum(math.exp(q[token]) for token in shared), 1e-12)
    total = math.fsum(math.exp(p[token]) * (p[token] - q[token]) for token in shared)
    if rest_p > 1e-12:
        total += rest_p * math.log(rest_p / rest_q)
    return max(total, 0.0)
