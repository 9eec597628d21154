"""From the merged projection to rotated queries, keys and values, in plain PyTorch.

Contracts of the fused kernels, too. Shape suffixes: T tokens, B sequences, H query heads, K KV heads, D head
dimension, X = (H + 2 K) D columns of the projection, P rows of the tables of angles, F = D / 2 frequencies.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from compactor_vllm.kv_cache.layer_cache import LayerCache
from compactor_vllm.kv_cache.reference import append
from compactor_vllm.layers.rotary import apply_rotary_


def split_qkv(
    qkv_TX: Tensor,
    q_out_THD: Tensor,
    k_out_TKD: Tensor,
    v_out_TKD: Tensor,
    *,
    q_norm_D: Tensor | None,
    k_norm_D: Tensor | None,
    eps: float,
    cos_PF: Tensor,
    sin_PF: Tensor,
    positions_T: Tensor | None,
    q_raw_THD: Tensor | None = None,
    k_raw_TKD: Tensor | None = None,
) -> None:
    """Splits a projection into heads, normalises queries and keys, and rotates them.

    Args:
        qkv_TX: [T, X], a row holds H query heads, then K key heads, then K value heads.
        q_out_THD, k_out_TKD, v_out_TKD: contiguous, where queries, keys (both rotated) and values go.
        q_norm_D, k_norm_D: weights of the RMS norms over a head; None where the model has none.
        eps: of the norms.
        cos_PF, sin_PF: float32 tables of angles.
        positions_T: int64 [T], the row of the tables of each token; None: row t belongs to token t.
        q_raw_THD, k_raw_TKD: where given, receive queries and keys before the rotation.
    """
    q_THD, k_TKD, v_TKD = _heads(qkv_TX, q_out_THD.shape[1], k_out_TKD.shape[1], q_norm_D, k_norm_D, eps)
    cos_TF, sin_TF = (cos_PF, sin_PF) if positions_T is None else (cos_PF[positions_T], sin_PF[positions_T])
    for source, raw, out in ((q_THD, q_raw_THD, q_out_THD), (k_TKD, k_raw_TKD, k_out_TKD)):
        if raw is not None:
            raw.copy_(source)
        apply_rotary_(out.copy_(source), cos_TF, sin_TF)
    v_out_TKD.copy_(v_TKD)


def split_qkv_append(
    qkv_BX: Tensor,
    q_out_BHD: Tensor,
    cache: LayerCache,
    positions_B: Tensor,
    slots_B: Tensor,
    *,
    q_norm_D: Tensor | None,
    k_norm_D: Tensor | None,
    eps: float,
    cos_PF: Tensor,
    sin_PF: Tensor,
    angles_by_row: bool = False,
    settled: bool = False,
) -> None:
    """One token of every sequence: queries go to `q_out_BHD`, rotated keys and values into the cache.

    Args:
        qkv_BX, q_norm_D, k_norm_D, eps, cos_PF, sin_PF: as in `split_qkv`.
        cache, positions_B, slots_B: as in `kv_cache.reference.append`; nothing is cached for a slot of -1.
        angles_by_row: row b of the tables belongs to sequence b, instead of row `positions_B[b]`.
        settled: for kernels that may read ahead; nothing waits here.
    """
    (B, _, D), K = q_out_BHD.shape, cache.seg_lens_SK.shape[1]
    k_BKD, v_BKD = qkv_BX.new_empty(B, K, D), qkv_BX.new_empty(B, K, D)
    split_qkv(
        qkv_BX,
        q_out_BHD,
        k_BKD,
        v_BKD,
        q_norm_D=q_norm_D,
        k_norm_D=k_norm_D,
        eps=eps,
        cos_PF=cos_PF,
        sin_PF=sin_PF,
        positions_T=None if angles_by_row else positions_B,
    )
    append(cache, k_BKD, v_BKD, positions_B, slots_B)


def _heads(
    qkv_TX: Tensor, heads: int, kv_heads: int, q_norm_D: Tensor | None, k_norm_D: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    qkv_TXD = qkv_TX.unflatten(1, (heads + 2 * kv_heads, -1))
    q_THD, k_TKD, v_TKD = qkv_TXD.split([heads, kv_heads, kv_heads], dim=1)
    if q_norm_D is not None:
        q_THD = F.rms_norm(q_THD, q_norm_D.shape, q_norm_D, eps)
    if k_norm_D is not None:
        k_TKD = F.rms_norm(k_TKD, k_norm_D.shape, k_norm_D, eps)
    return q_THD, k_TKD, v_TKD
