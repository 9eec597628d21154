"""Drawing the next token of every row of a batch.

A token is drawn by inverting the cumulative distribution at one uniform number, which depends on the request's
seed and the token's index only (`uniform`). Probabilities are turned into integers first: integer sums are exact in
any order, so the token of a row depends neither on the other rows nor on how a device adds up.

Shape legend: B rows of the batch, R rows drawn in one way, V vocabulary, C candidates, D digits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from compactor_vllm.config.sampling_params import SamplingParams
from compactor_vllm.errors import InvalidInputError
from compactor_vllm.layers.penalties import Masks, Penalties, TokenCounts

WEIGHT_SUM_BITS = 62
"""The integer weights of a row add up to at most two to this power."""
NARROW_TOP_K = 1024
"""Up to this top_k the candidates of a row are extracted; above, a threshold is searched."""
CHUNK_ELEMENTS = 1 << 23
"""Elements of the vocabulary-wide temporaries; longer batches are drawn in parts."""
_UNIFORMS_PER_BLOCK = 64
_INVERSE_TEMPERATURE_LIMIT = 1e30


def uniform(seed: int, index: int, stream: int = 0) -> float:
    """The number in [0, 1) that draws token `index` of a request: word `index` of Philox4x64 with key (seed, stream).

    Args:
        seed: the request's seed, in [0, 2^64).
        index: place of the token in the output, from 0.
        stream: tells apart the completions of one request, in [0, 2^64).
    """
    return _uniform_block(seed, stream, index // _UNIFORMS_PER_BLOCK)[index % _UNIFORMS_PER_BLOCK]


@lru_cache(maxsize=4096)
def _uniform_block(seed: int, stream: int, block: int) -> tuple[float, ...]:
    # One step of the counter gives four words; making the generator costs more than drawing a block of them.
    generator = np.random.Philox(key=seed | stream << 64, counter=block * _UNIFORMS_PER_BLOCK // 4)
    return tuple((word >> 11) * 2.0**-53 for word in generator.random_raw(_UNIFORMS_PER_BLOCK).tolist())


@dataclass(frozen=True)
class Draws:
    """Rows that are drawn in one way, on the device.

    Attributes:
        table_RF: float64 [R, 6]: row, inverse temperature, top_k (all: 2^40), top_p, min_p, uniform number.
        max_top_k: the largest top_k of the rows if each has one of at most `NARROW_TOP_K`, else None.
        has_top_k, has_top_p, has_min_p: whether any row has the filter; without effect on the others.
    """

    table_RF: Tensor
    max_top_k: int | None
    has_top_k: bool
    has_top_p: bool
    has_min_p: bool

    def parts(self, vocab_size: int) -> Iterator[Tensor]:
        return iter(self.table_RF.split(max(1, CHUNK_ELEMENTS // vocab_size)))


@dataclass(frozen=True)
class SamplingBatch:
    """What `sample` needs to know about the rows of one step; build it with `SamplingBatch.build`.

    Attributes:
        num_rows: B.
        draws: the rows with a temperature, in up to three groups.
        penalties: the rows with penalties, or None.
        logprob_rows: rows that report log-probabilities, with the number of top tokens of each.
        masks: the rows with constraints, or None.
    """

    num_rows: int
    draws: tuple[Draws, ...]
    penalties: Penalties | None
    logprob_rows: tuple[tuple[int, int], ...]
    masks: Masks | None = None

    @staticmethod
    def build(
        params: Sequence[SamplingParams],
        uniforms: Sequence[float] | None = None,
        counts: Sequence[TokenCounts | None] | None = None,
        device: torch.device | str = "cpu",
    ) -> SamplingBatch:
        """Gathers the rows' parameters and copies them to `device`.

        Args:
            params: one per row.
            uniforms: one number in [0, 1) per row, see `uniform`; greedy rows ignore theirs. None if all are greedy.
            counts: per row, what its penalties and its constraint look at; None for rows without, or for all.

        Raises:
            InvalidInputError: lengths differ, a number lies outside [0, 1), or something needed is missing.
        """
        if uniforms is None:
            if not all(p.greedy for p in params):
                raise InvalidInputError("rows with a temperature need uniform numbers")
            uniforms = [0.0] * len(params)
        counts = [None] * len(params) if counts is None else counts
        if not len(params) == len(uniforms) == len(counts):
            raise InvalidInputError(f"{len(params)} params, {len(uniforms)} uniforms and {len(counts)} counts differ")
        if not all(0 <= u < 1 for u in uniforms):
            raise InvalidInputError(f"uniform numbers must lie in [0, 1), not {list(uniforms)}")
        device = torch.device(device)
        groups: dict[str, list[tuple[int, SamplingParams, float]]] = {}
        for b, p in enumerate(params):
            if not p.greedy:
                groups.setdefault(_group(p), []).append((b, p, uniforms[b]))
        return SamplingBatch(
            len(params),
            tuple(_build_draws(rows, name, device) for name, rows in sorted(groups.items())),
            Penalties.build(params, counts, device),
            tuple((b, p.logprobs) for b, p in enumerate(params) if p.logprobs is not None),
            Masks.build(counts, device),
        )


def _group(params: SamplingParams) -> str:
    if params.top_k is not None and params.top_k <= NARROW_TOP_K:
        return "narrow"
    return "plain" if params.top_k is None and params.top_p == 1 else "wide"


def _build_draws(rows: list[tuple[int, SamplingParams, float]], group: str, device: torch.device) -> Draws:
    limit = _INVERSE_TEMPERATURE_LIMIT
    table = [
        (
            b,
            # 0 < temperature, but its inverse may overflow.
            limit if p.temperature < 1 / limit else max(1 / p.temperature, 1 / limit),
            min(p.top_k or 2**40, 2**40),
            p.top_p,
            p.min_p,
            u,
        )
        for b, p, u in rows
    ]
    return Draws(
        torch.tensor(table, dtype=torch.float64).to(device, non_blocking=True),
        max(p.top_k for _, p, _ in rows if p.top_k is not None) if group == "narrow" else None,
        any(p.top_k is not None for _, p, _ in rows),
        any(p.top_p < 1 for _, p, _ in rows),
        any(p.min_p > 0 for _, p, _ in rows),
    )


@dataclass(frozen=True)
class SampleOutput:
    """Result of `sample`.

    Attributes:
        token_ids_B: int64, on the logits' device; 0 where invalid.
        invalid_B: bool: a NaN or +inf among the row's logits, or nothing but -inf. End that sequence with an error.
        logprobs: per row that asked for them (see `top_logprobs`), else None; empty when no row asked.
    """

    token_ids_B: Tensor
    invalid_B: Tensor
    logprobs: tuple[dict[int, float] | None, ...]


def sample(logits_BV: Tensor, batch: SamplingBatch) -> SampleOutput:
    """Draws one token per row.

    Order per row: penalties, constraint, then greedy: the largest logit, ties to the lower id. Else temperature,
    min_p, top_k (exactly k, ties to the lower id), top_p on what is left (renormalised; the token that crosses is
    kept), draw.
    The tokens of a row do not depend on the other rows. Waits for the device only if a row reports log-probabilities.

    Args:
        logits_BV: float32 [B, V], left unchanged.
        batch: parameters of the rows, on the same device.

    Raises:
        InvalidInputError: the number of rows differs from the batch's.
    """
    if logits_BV.ndim != 2 or logits_BV.shape[0] != batch.num_rows:
        raise InvalidInputError(f"logits of shape {tuple(logits_BV.shape)} do not fit a batch of {batch.num_rows} rows")
    raw_BV = logits_BV.float()
    x_BV = raw_BV if batch.penalties is None else batch.penalties.apply(raw_BV)
    x_BV = x_BV if batch.masks is None else batch.masks.apply(x_BV)
    token_ids_B = x_BV.argmax(dim=1)
    max_B = x_BV.gather(1, token_ids_B[:, None]).squeeze(1)
    for draws in batch.draws:
        for table_RF in draws.parts(x_BV.shape[1]):
            rows_R = table_RF[:, 0].long()
            token_ids_B.index_copy_(0, rows_R, _draw(x_BV.index_select(0, rows_R), max_B[rows_R], table_RF, draws))
    # argmax finds a NaN wherever there is one.
    invalid_B = ~max_B.isfinite()
    token_ids_B.masked_fill_(invalid_B, 0)
    return SampleOutput(token_ids_B, invalid_B, _reported_logprobs(raw_BV, token_ids_B, batch))


def _draw(x_RV: Tensor, max_R: Tensor, table_RF: Tensor, draws: Draws) -> Tensor:
    """Tokens [R] of rows with a temperature. Rows with NaN give some token of the vocabulary."""
    _, inverse_R, top_k_R, top_p_R, min_p_R, uniform_R = table_RF.unbind(1)
    vocab_size = x_RV.shape[1]
    # x - max <= 0, so that the products below are in [-inf, 0] and the largest weight is exactly 1.
    # Masks multiply: on a CPU that is several times faster than a fill.
    ratio_RV = ((x_RV - max_R[:, None]) * inverse_R.float()[:, None]).exp_()
    if draws.has_min_p:
        ratio_RV *= ratio_RV >= min_p_R.float()[:, None]
    weights_RV = (ratio_RV * 2.0 ** (WEIGHT_SUM_BITS - vocab_size.bit_length())).long()
    weights_RV = _filter(x_RV, weights_RV, top_k_R.long(), top_p_R, draws)
    cumulative_RV = weights_RV.cumsum(1)
    total_R = cumulative_RV[:, -1]
    # A number below 1 is at most 1 - 2^-53: even rounded, the product stays below the total.
    target_R = (uniform_R * total_R).long()
    return torch.searchsorted(cumulative_RV, target_R[:, None], right=True).squeeze(1).clamp_(max=vocab_size - 1)


def _filter(x_RV: Tensor, weights_RV: Tensor, top_k_R: Tensor, top_p_R: Tensor, draws: Draws) -> Tensor:
    """The weights with those outside of top_k, then of top_p, set to 0. `weights_RV` may be changed in place."""
    vocab_size = x_RV.shape[1]
    if draws.max_top_k is not None:
        keep_RV, _ = _keep_narrow(x_RV, weights_RV, top_k_R, top_p_R, None, min(draws.max_top_k, vocab_size))
        return weights_RV.mul_(keep_RV)
    if draws.has_top_p and not draws.has_top_k and x_RV.device.type == "cpu":
        # A nucleus is rarely larger, and looking at a result is free here. The search below would find the same.
        total_R = weights_RV.sum(1)
        keep_RV, reached_R = _keep_narrow(x_RV, weights_RV, top_k_R, top_p_R, total_R, min(NARROW_TOP_K, vocab_size))
        if reached_R.all():
            return weights_RV.mul_(keep_RV)
    keys_RV = _order_keys(x_RV)
    if draws.has_top_k:
        ones_RV = torch.ones_like(weights_RV)
        weights_RV.mul_(_keep_wide(keys_RV, ones_RV, top_k_R.clamp(max=vocab_size)))
    if draws.has_top_p:
        weights_RV.mul_(_keep_wide(keys_RV, weights_RV, _nucleus_target(weights_RV.sum(1), top_p_R)))
    return weights_RV


def _nucleus_target(total_R: Tensor, top_p_R: Tensor) -> Tensor:
    """Weight that the nucleus must reach, int64: at least 1, at most the total."""
    target_R = torch.minimum((top_p_R * total_R).ceil().long(), total_R)
    # The product is rounded; a row without top_p must keep everything whether its group has the filter or not.
    return torch.where(top_p_R == 1, total_R, target_R)


def _keep_narrow(
    x_RV: Tensor, weights_RV: Tensor, top_k_R: Tensor, top_p_R: Tensor, total_R: Tensor | None, candidates: int
) -> tuple[Tensor, Tensor]:
    """Mask of top_k, then top_p, from the C = `candidates` largest logits alone.

    `total_R` is the weight of all tokens in top_k; None: the candidates hold them. Returns the mask and whether the
    candidates reach top_p of the total; the mask of a row where they do not is without meaning.
    """
    values_RC, ids_RC = x_RV.topk(candidates, dim=1)
    rank_C = torch.arange(candidates, device=x_RV.device)
    weights_RC = weights_RV.gather(1, ids_RC) * (rank_C < top_k_R[:, None])
    cumulative_RC = weights_RC.cumsum(1)
    target_R = _nucleus_target(cumulative_RC[:, -1] if total_R is None else total_R, top_p_R)
    count_R = ((cumulative_RC - weights_RC) < target_R[:, None]).sum(1)
    count_R = torch.minimum(count_R, top_k_R).clamp_(1, candidates)
    threshold_R1 = values_RC.gather(1, count_R[:, None] - 1)
    ties_R1 = count_R[:, None] - (values_RC > threshold_R1).sum(1, keepdim=True)
    # topk orders equal values as it likes; the threshold and the number of its ties are well defined.
    tied_RV = x_RV == threshold_R1
    keep_RV = (x_RV > threshold_R1) | (tied_RV & (tied_RV.cumsum(1) <= ties_R1))
    return keep_RV, cumulative_RC[:, -1] >= target_R


def _order_keys(x: Tensor) -> Tensor:
    """int32 with the order of float32 `x`; -0.0 and 0.0 are equal."""
    bits = (x + 0.0).view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _keep_wide(keys_RV: Tensor, weights_RV: Tensor, target_R: Tensor) -> Tensor:
    """Mask of the shortest prefix, by descending key and then ascending id, whose weights reach `target_R`.

    A radix search: three passes over digits of the keys find the threshold exactly, without sorting.
    """
    base_R1 = torch.full_like(target_R[:, None], -(2**31))
    for shift, size in ((21, 2048), (10, 2048), (0, 1024)):
        # Bucket 0 takes every key below the range that is searched, the last bucket every key above.
        low_R1 = (base_R1 >> shift).int() - 1
        buckets_RV = ((keys_RV >> shift).clamp(low_R1, low_R1 + size + 1) - low_R1).long()
        sums_RD = weights_RV.new_zeros(len(weights_RV), size + 2).scatter_add_(1, buckets_RV, weights_RV)
        reached_RD = sums_RD.flip(1).cumsum(1).flip(1)
        bucket_R1 = ((reached_RD >= target_R[:, None]).sum(1, keepdim=True) - 1).clamp_(1, size)
        base_R1 = (low_R1 + bucket_R1) << shift
    threshold_R1 = base_R1.int()
    missing_R1 = target_R[:, None] - reached_RD.gather(1, bucket_R1 + 1)
    tied_RV = keys_RV == threshold_R1
    tied_weights_RV = weights_RV * tied_RV
    return (keys_RV > threshold_R1) | (tied_RV & (tied_weights_RV.cumsum(1) - tied_weights_RV < missing_R1))


def _reported_logprobs(
    raw_BV: Tensor, token_ids_B: Tensor, batch: SamplingBatch
) -> tuple[dict[int, float] | None, ...]:
    if not batch.logprob_rows:
        return ()
    rows = [b for b, _ in batch.logprob_rows]
    index = torch.tensor(rows, device=raw_BV.device)
    found = top_logprobs(raw_BV[index], token_ids_B[index], [n for _, n in batch.logprob_rows])
    by_row = dict(zip(rows, found, strict=True))
    return tuple(by_row.get(b) for b in range(batch.num_rows))


def top_logprobs(logits_BV: Tensor, token_ids_B: Tensor, n: int | Sequence[int]) -> list[dict[int, float]]:
    """Natural-log probabilities of the n most likely tokens and of the chosen one.

    They are those of the raw logits: softmax before temperature, penalties and filters.

    Args:
        logits_BV: float32 [B, V].
        token_ids_B: int64, the chosen tokens.
        n: how many of the most likely, for all rows or per row; 0 gives the chosen token only.

    Returns:
        Per row token id -> log-probability, most likely first (ties: lower id). A token of probability zero is left
        out unless chosen; a chosen token that is not among the n comes last.
    """
    counts = [n] * len(logits_BV) if isinstance(n, int) else list(n)
    if len(counts) != len(logits_BV):
        raise InvalidInputError(f"{len(counts)} numbers of log-probabilities for {len(logits_BV)} rows")
    rows_per_part = max(1, CHUNK_ELEMENTS // logits_BV.shape[1])
    result: list[dict[int, float]] = []
    for begin in range(0, len(counts), rows_per_part):
        end = begin + rows_per_part
        result += _top_logprobs(logits_BV[begin:end].float(), token_ids_B[begin:end], counts[begin:end])
    return result


def _top_logprobs(x_RV: Tensor, token_ids_R: Tensor, counts: list[int]) -> list[dict[int, float]]:
    vocab_size = x_RV.shape[1]
    # Keys are made unique by the id, so that the order of ties is defined.
    reverse_ids_V = torch.arange(vocab_size - 1, -1, -1, device=x_RV.device)
    keys_RV = (_order_keys(x_RV).long() << 32) + reverse_ids_V
    ids_RC = vocab_size - 1 - (keys_RV.topk(min(max(counts), vocab_size), dim=1).values & 0xFFFFFFFF)
    ids_RC = torch.cat([token_ids_R[:, None], ids_RC], dim=1)
    x64_RV = x_RV.double()
    values_RC = x64_RV.gather(1, ids_RC) - x64_RV.logsumexp(1, keepdim=True)
    result = []
    for ids, values, count in zip(ids_RC.tolist(), values_RC.tolist(), counts, strict=True):
        row = {i: v for i, v in zip(ids[1 : count + 1], values[1 : count + 1], strict=True) if v != -np.inf}
        row.setdefault(ids[0], values[0])
        result.append(row)
    return result
