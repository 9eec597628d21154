"""The FLASH_ATTENTION backend: FlashAttention-2 over packed sequences and over ragged caches.

FlashAttention-2 knows sequences whose KV heads are equally long. A ragged cache is therefore presented pair by pair:
every (sequence, KV head) is a sequence of its own with one KV head and the query heads of its group, its kept tokens
gathered from their pages.

The kernel is that of the package flash-attn where it is installed, else the one inside torch. Both align the causal
mask with the last key, so that the new tokens of a pair, behind its prefix, need no mask of their own.

Shape suffixes: T tokens of the batch, B sequences, H query heads, K KV heads, D head dimension, G segments of a
sequence, P pairs of a sequence and a KV head, N gathered rows, Q heads of a group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from compactor_vllm.attention.prefill_arguments import check_heads, check_prefill_arguments, check_segments
from compactor_vllm.attention.ragged_prefix import RaggedPrefix
from compactor_vllm.errors import InvalidInputError, MissingDependencyError
from compactor_vllm.kv_cache.layer_cache import LayerCache

__all__ = ["VarlenAttention", "decode_attention", "implementation", "prefill_attention"]

VarlenAttention = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int, float, bool], tuple[Tensor, Tensor]]
"""(q, k, v, cu_q, cu_k, longest q, longest k, scale, causal) -> (out, natural log-sum-exp [heads, rows of q])."""


def prefill_attention(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    cu_seqlens_B1: Tensor,
    max_seqlen: int,
    scale: float,
    *,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    prefix: RaggedPrefix | None = None,
    cu_seqlens_q_B1: Tensor | None = None,
    varlen: VarlenAttention | None = None,
) -> Tensor:
    """Causal grouped-query attention of a batch of sequences, each also over the segments before it.

    Arguments and result are those of `sparse_varlen_kernel.prefill_attention`, for bfloat16 and float16. With a prefix
    the host reads the lengths, so that the call synchronises.

    Args:
        varlen: the attention to use instead of FlashAttention-2.

    Raises:
        InvalidInputError: an argument is wrong; the message names it.
        MissingDependencyError: FlashAttention-2 cannot run here.
    """
    check_prefill_arguments(
        q_THD, k_TKD, v_TKD, cu_seqlens_B1, max_seqlen, scale, out, lse, prefix, cu_seqlens_q_B1
    )  # fmt: skip
    varlen = _flash_attention(q_THD) if varlen is None else varlen
    out = torch.empty_like(q_THD) if out is None else out
    cu_q = cu_seqlens_B1 if cu_seqlens_q_B1 is None else cu_seqlens_q_B1
    if cu_q.shape[0] < 2 or not max_seqlen or not q_THD.shape[0]:
        return out
    if prefix is not None:
        _prefill_pairs(q_THD, k_TKD, v_TKD, cu_q, cu_seqlens_B1, scale, out, lse, prefix, varlen)
        return out
    # Where rows are the last ones of their sequence, keys are bounded by all rows there are.
    longest_k = max_seqlen if cu_seqlens_q_B1 is None else k_TKD.shape[0]
    # One query a sequence lets FlashAttention-2 fold the group into rows, and its lse comes out in another order.
    rows, rows_lse = varlen(q_THD, k_TKD, v_TKD, cu_q, cu_seqlens_B1, max(2, max_seqlen), longest_k, scale, True)
    row = torch.arange(q_THD.shape[0], device=q_THD.device)
    covered = (row >= cu_q[0]) & (row < cu_q[-1])
    out.copy_(torch.where(covered[:, None, None], rows, out))
    if lse is not None:
        lse.copy_(torch.where(covered[:, None], rows_lse.T, lse))
    return out


def decode_attention(
    q_BHD: Tensor,
    cache: LayerCache,
    segments_BG: Tensor,
    scale: float,
    *,
    out: Tensor | None = None,
    varlen: VarlenAttention | None = None,
) -> Tensor:
    """One query token per sequence against all kept tokens of its segments, gathered on each call.

    Arguments and result are those of `sparse_decode_kernel.decode_attention`, for bfloat16 and float16. The host reads
    the lengths, so that a CUDA graph cannot capture the call.

    Args:
        varlen: the attention to use instead of FlashAttention-2.

    Raises:
        InvalidInputError: an argument is wrong; the message names it.
        MissingDependencyError: FlashAttention-2 cannot run here.
    """
    K = cache.head_begin_SK.shape[1]
    check_heads("q_BHD", q_BHD, K, scale)
    check_segments("segments_BG", segments_BG, q_BHD.shape[0], cache, q_BHD, K)
    B, H, D = q_BHD.shape
    if out is not None and (out.shape != q_BHD.shape or out.dtype != q_BHD.dtype or out.device != q_BHD.device):
        raise InvalidInputError(f"out must be {q_BHD.dtype} {[B, H, D]} on {q_BHD.device} like q_BHD")
    varlen = _flash_attention(q_BHD) if varlen is None else varlen
    out = torch.empty_like(q_BHD) if out is None else out
    pairs = _gather_pairs(cache, segments_BG)
    if not pairs.longest:
        return out.zero_()
    q_PQD = q_BHD.reshape(B * K, H // K, D)
    cu_q = torch.arange(B * K + 1, dtype=torch.int32, device=q_BHD.device)
    k_N1D, v_N1D = (
        pages_PRD[pairs.page_N, pairs.row_N][:, None] for pages_PRD in (cache.k_pages_PRD, cache.v_pages_PRD)
    )
    rows, _ = varlen(q_PQD, k_N1D, v_N1D, cu_q, _borders(pairs.lens_P), 1, pairs.longest, scale, False)
    rows = torch.where((pairs.lens_P > 0)[:, None, None], rows, torch.zeros_like(rows))
    return out.copy_(rows.view(B, H, D))


def implementation() -> str:
    """Which FlashAttention-2 runs here, for reports."""
    return _implementation()[0]


@dataclass(frozen=True)
class _Pairs:
    """The kept tokens of every pair, in the order of their segments.

    Attributes:
        lens_P: int64, tokens of each pair.
        longest: the most tokens of a pair.
        page_N, row_N: int64, where each token lies; pair after pair.
    """

    lens_P: Tensor
    longest: int
    page_N: Tensor
    row_N: Tensor


def _gather_pairs(cache: LayerCache, segments_BG: Tensor) -> _Pairs:
    """Finds the tokens of every (sequence, KV head); reads their number on the host."""
    (B, G), K = segments_BG.shape, cache.seg_lens_SK.shape[1]
    slots_BG = segments_BG.clamp(min=0).long()
    lens_BGK = torch.where(segments_BG[:, :, None] >= 0, cache.seg_lens_SK[slots_BG], 0)
    # A run is what one pair keeps in one segment.
    lens_run = lens_BGK.transpose(1, 2).reshape(B * K * G).long()
    begin_run = cache.head_begin_SK[slots_BG].transpose(1, 2).reshape(B * K * G).long()
    lens_P = lens_run.view(B * K, G).sum(1)
    total, longest = torch.stack([lens_P.sum(), lens_P.max()]).tolist() if B * K else (0, 0)
    run_N, rank_N = _rows_of(lens_run, total)
    page_N = cache.page_table[begin_run[run_N] + rank_N // cache.page_size].long()
    return _Pairs(lens_P, longest, page_N, rank_N % cache.page_size)


def _rows_of(lens: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """For rows that lie group after group: the group of each and its place in it, int64 [total]."""
    group = torch.repeat_interleave(torch.arange(lens.shape[0], device=lens.device), lens, output_size=total)
    return group, torch.arange(total, device=lens.device) - (lens.cumsum(0) - lens)[group]


def _borders(lens: Tensor) -> Tensor:
    """int32 cumulative lengths that begin with 0."""
    return torch.nn.functional.pad(lens.cumsum(0), (1, 0)).int()


def _prefill_pairs(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    scale: float,
    out: Tensor,
    lse: Tensor | None,
    prefix: RaggedPrefix,
    varlen: VarlenAttention,
) -> None:
    """Attention with a prefix: each pair is one sequence, its gathered prefix followed by its own tokens."""
    (T, H, D), K = q_THD.shape, k_TKD.shape[1]
    pairs = _gather_pairs(prefix.cache, prefix.segments_BG)
    q_lens_P, new_lens_P = (cu.diff().long().repeat_interleave(K) for cu in (cu_q, cu_k))
    lens_P = pairs.lens_P + new_lens_P
    sums = [q_lens_P.sum(), q_lens_P.max(), new_lens_P.sum(), lens_P.max()]
    num_queries, longest_q, num_new, longest_k = torch.stack(sums).tolist()
    if not num_queries:
        return
    pair, place = _rows_of(new_lens_P, num_new)
    new_token, new_head = cu_k.long()[pair // K] + place, pair % K
    new_row = _borders(lens_P).long()[pair] + pairs.lens_P[pair] + place
    is_new = torch.zeros(num_new + pairs.page_N.shape[0], dtype=torch.bool, device=q_THD.device)
    is_new[new_row] = True
    gathered = []
    for packed_TKD, pages_PRD in ((k_TKD, prefix.cache.k_pages_PRD), (v_TKD, prefix.cache.v_pages_PRD)):
        rows_ND = packed_TKD.new_empty(is_new.shape[0], D)
        rows_ND[is_new] = packed_TKD[new_token, new_head]
        rows_ND[~is_new] = pages_PRD[pairs.page_N, pairs.row_N]
        gathered.append(rows_ND[:, None])
    pair, place = _rows_of(q_lens_P, num_queries)
    token, head = cu_q.long()[pair // K] + place, pair % K
    q_NQD = q_THD.unflatten(1, (K, H // K))[token, head]
    k_N1D, v_N1D = gathered
    cu_pairs_q, cu_pairs_k = _borders(q_lens_P), _borders(lens_P)
    rows, rows_lse = varlen(q_NQD, k_N1D, v_N1D, cu_pairs_q, cu_pairs_k, max(2, longest_q), longest_k, scale, True)
    out.unflatten(1, (K, H // K))[token, head] = rows
    if lse is not None:
        lse.view(T, K, H // K)[token, head] = rows_lse.T


def _flash_attention(q: Tensor) -> VarlenAttention:
    if q.device.type != "cuda":
        raise MissingDependencyError(
            "attention_backend=FLASH_ATTENTION needs an NVIDIA GPU: FlashAttention-2 has no CPU version; "
            "use AUTO or TORCH on a CPU"
        )
    if torch.cuda.get_device_capability(q.device) < (8, 0):
        raise MissingDependencyError("attention_backend=FLASH_ATTENTION needs a GPU of compute capability 8.0 or newer")
    if q.dtype == torch.float32:
        raise InvalidInputError("attention_backend=FLASH_ATTENTION computes in bfloat16 or float16, not in float32")
    return _implementation()[1]


@lru_cache(maxsize=1)
def _implementation() -> tuple[str, VarlenAttention]:
    try:
        import flash_attn

        package_function = flash_attn.flash_attn_varlen_func
    except (ImportError, AttributeError):
        if not torch.backends.cuda.is_flash_attention_available():
            raise MissingDependencyError(
                "attention_backend=FLASH_ATTENTION needs FlashAttention-2, which this torch was built without: "
                "pip install flash-attn"
            ) from None
        return f"torch {torch.__version__}", _torch_varlen

    def package_varlen(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, scale: float, causal: bool
    ) -> tuple[Tensor, Tensor]:
        out, lse, _ = package_function(
            q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale=scale, causal=causal, return_attn_probs=True
        )
        return out, lse

    return f"flash-attn {flash_attn.__version__}", package_varlen


def _torch_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, cu_q, cu_k, max_q, max_k, 0.0, causal, False, scale=scale
    )
    return out, lse
