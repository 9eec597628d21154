"""The consumer warpgroups of the Hopper prefill kernel: products, softmax and the store of finished rows.

Shape suffixes: H query heads, D head dimension; M query rows of a warpgroup (64), N keys of a tile (128).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from compactor_vllm.attention.hopper_ring import FIELDS, KEYS, MAX_SEGMENTS, ROWS, get_word, next_stage, warps_barrier

LN_2 = gl.constexpr(0.6931471805599453)


def _transpose_asm() -> str:
    """PTX that transposes the 4 x 4 words of each quad, for two rows: operands 8 to 15 in, 0 to 7 out."""
    lines = [
        "{ .reg .pred odd, high; .reg .b32 s, a<4>;",
        "mov.u32 s, %laneid; and.b32 s, s, 1; setp.ne.b32 odd, s, 0;",
        "mov.u32 s, %laneid; and.b32 s, s, 2; setp.ne.b32 high, s, 0;",
    ]
    exchange = (
        "selp.b32 s, {x}, {y}, {p}; shfl.sync.bfly.b32 s, s, {d}, 31, -1; "
        "selp.b32 {u}, s, {x}, {p}; selp.b32 {v}, {y}, s, {p};"
    )
    for row in range(2):
        x = [f"${8 + row + 2 * i}" for i in range(4)]
        y = [f"${row + 2 * i}" for i in range(4)]
        for i in (0, 2):
            lines.append(exchange.format(x=x[i], y=x[i + 1], p="odd", d=1, u=f"a{i}", v=f"a{i + 1}"))
        for i in (0, 1):
            lines.append(exchange.format(x=f"a{i}", y=f"a{i + 2}", p="high", d=2, u=y[i], v=y[i + 2]))
    return " ".join([*lines, "}"])


TRANSPOSE_QUADS = gl.constexpr(_transpose_asm())
TRANSPOSE_OPERANDS = gl.constexpr(",".join(["=&r"] * 8 + ["r"] * 8))


@gluon.constexpr_function
def _store_layout(D):
    """Rows and columns of an accumulator as before, but 8 contiguous columns a thread."""
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], *([0, c] for c in (32, 64, 128) if c < D), [8, 0]],
        lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, D],
    )


@gluon.jit
def _wait_turn(WARPGROUP: gl.constexpr):
    """Waits until the other warpgroup has issued its products (all 256 consumer threads count)."""
    if WARPGROUP == 0:
        gl.inline_asm_elementwise("bar.sync 8, 256; mov.b32 $0, $1;", "=r,r", [0], gl.int32, False, 1)
    else:
        gl.inline_asm_elementwise("bar.sync 9, 256; mov.b32 $0, $1;", "=r,r", [0], gl.int32, False, 1)


@gluon.jit
def _pass_turn(WARPGROUP: gl.constexpr):
    if WARPGROUP == 0:
        gl.inline_asm_elementwise("bar.arrive 9, 256; mov.b32 $0, $1;", "=r,r", [0], gl.int32, False, 1)
    else:
        gl.inline_asm_elementwise("bar.arrive 8, 256; mov.b32 $0, $1;", "=r,r", [0], gl.int32, False, 1)


@gluon.jit
def _row_sums(p):
    """Row sums of [M, N] weights as [M, 4]: one partial sum for each of the four threads that share a row."""
    p_quads = p.reshape([ROWS, KEYS // 8, 4, 2])
    return gl.sum(gl.sum(p_quads, axis=3), axis=1)


@gluon.jit
def _products(q, k_tile, v_tile, p16, o, WARPGROUP: gl.constexpr, TURNS: gl.constexpr):
    """Issues S = Q K^T and O += P V, returns when S is there."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    zero = gl.zeros([ROWS, KEYS], gl.float32, s_layout)
    if TURNS:
        _wait_turn(WARPGROUP)
    s = warpgroup_mma(q, k_tile.permute((1, 0)), zero, use_acc=False, is_async=True)
    o = warpgroup_mma(p16, v_tile, o, is_async=True)
    if TURNS:
        _pass_turn(WARPGROUP)
    s = warpgroup_mma_wait(1, deps=[s])
    return s, o


@gluon.jit
def _first_weights(s, scale, WARPGROUP: gl.constexpr):
    """Softmax weights of an item's first tile: key n of the tile is seen by query row m >= n."""
    row = gl.arange(0, ROWS, gl.SliceLayout(1, s.type.layout))
    # Opaque, or the comparisons would be kept from one item to the next, in registers that the main loop needs.
    row = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [row], gl.int32, False, 1)
    row = WARPGROUP * ROWS + (row & (ROWS - 1))
    key = gl.arange(0, KEYS, gl.SliceLayout(0, s.type.layout))
    s = gl.where(key[None, :] <= row[:, None], s, float("-inf"))
    m = gl.max(s, axis=1)
    p = gl.exp2(s * scale - (m * scale)[:, None])
    return p, m, _row_sums(p)


@gluon.constexpr_function
def _vote_text(warpgroup, dtype):
    """PTX: whether any of the warpgroup's row sums is not below the limit, into a predicate declared outside."""
    limit = "0f46800000" if str(dtype) == "fp16" else "0f5F800000"
    return (
        f"{{ .reg .pred bad; setp.geu.f32 bad, $2, {limit}; setp.geu.or.f32 bad, $3, {limit}, bad; "
        f"bar.red.or.pred large{warpgroup}, {10 + warpgroup}, 128, bad; mov.b32 $0, $2; mov.b32 $1, $3; }}"
    )


@gluon.jit
def _declare_vote(WARPGROUP: gl.constexpr):
    if WARPGROUP == 0:
        gl.inline_asm_elementwise(".reg .pred large0; mov.b32 $0, $1;", "=r,r", [0], gl.int32, False, 1)
    else:
        gl.inline_asm_elementwise(".reg .pred large1; mov.b32 $0, $1;", "=r,r", [0], gl.int32, False, 1)


@gluon.jit
def _any_too_large(sums, WARPGROUP: gl.constexpr, DTYPE: gl.constexpr):
    """The sums, and whether any row sum of the warpgroup is too large for DTYPE weights (or is NaN)."""
    sums = gl.inline_asm_elementwise(_vote_text(WARPGROUP, DTYPE), "=f,=f,f,f", [sums], gl.float32, False, 2)
    if WARPGROUP == 0:
        large = gl.inline_asm_elementwise("selp.b32 $0, 1, $1, large0;", "=r,r", [0], gl.int32, False, 1)
    else:
        large = gl.inline_asm_elementwise("selp.b32 $0, 1, $1, large1;", "=r,r", [0], gl.int32, False, 1)
    return sums, large


@gluon.jit
def _rebase(q, k_tile, o, l, r, scale, valid, MASKED: gl.constexpr):
    """Moves the reference of the weights up to the rows' maximum and computes this tile's weights again."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    zero = gl.zeros([ROWS, KEYS], gl.float32, s_layout)
    s = warpgroup_mma(q, k_tile.permute((1, 0)), zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    if MASKED:
        key = gl.arange(0, KEYS, gl.SliceLayout(0, s_layout))
        s = gl.where((key < valid)[None, :], s, float("-inf"))
    r_new = gl.maximum(r, gl.max(s, axis=1) * scale)
    shrink = gl.exp2(r - r_new)
    p = gl.exp2(s * scale - r_new[:, None])
    o = o * gl.convert_layout(shrink, gl.SliceLayout(1, o.type.layout))[:, None]
    l = l * gl.convert_layout(shrink, gl.SliceLayout(1, l.type.layout))[:, None]
    return p, _row_sums(p), o, l, r_new


@gluon.jit
def _lazy_step(q, kv, bars, stage, phase, p16, o, l, r, scale, valid, DTYPE: gl.constexpr,
               MASKED: gl.constexpr, WARPGROUP: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr):  # fmt: skip
    k_ring, v_ring = kv
    full, empty = bars
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    s, o = _products(q, k_ring.index(stage), v_ring.index(stage), p16, o, WARPGROUP, TURNS)
    if MASKED:
        key = gl.arange(0, KEYS, gl.SliceLayout(0, s_layout))
        s = gl.where((key < valid)[None, :], s, float("-inf"))
    p = gl.exp2(s * scale - r[:, None])
    sums = _row_sums(p)
    sums, large = _any_too_large(sums, WARPGROUP, DTYPE)
    here = stage
    stage, phase = next_stage(stage, phase, STAGES)
    mbarrier.wait(full.index(stage), phase)
    o = warpgroup_mma_wait(0, deps=[o])
    if large != 0:
        p, sums, o, l, r = _rebase(q, k_ring.index(here), o, l, r, scale, valid, MASKED)
    mbarrier.arrive(empty.index(here), count=1)
    p16 = gl.convert_layout(p.to(DTYPE), gl.DotOperandLayout(0, s_layout, 2))
    return stage, phase, p16, o, l + sums, r


@gluon.jit
def _weights(s, m, l, scale):
    """Softmax weights of a further tile, and the factor of everything before it."""
    m_new = gl.maximum(m, gl.max(s, axis=1))
    shrink = gl.exp2((m - m_new) * scale)
    p = gl.exp2(s * scale - (m_new * scale)[:, None])
    l = l * gl.convert_layout(shrink, gl.SliceLayout(1, l.type.layout))[:, None] + _row_sums(p)
    return p, m_new, l, shrink


@gluon.jit
def _pin(x):
    """Has the compiler compute float32 `x`, and all that it depends on, here and not later, where it is used."""
    return gl.inline_asm_elementwise("// pinned $0", "=f,0", [x], gl.float32, False, 1)


@gluon.jit
def _finish_step(o, p, shrink, release, DTYPE: gl.constexpr, p_layout: gl.constexpr):
    """Ends the step: waits for O += P V, frees the stage, rescales O and makes P the next step's operand."""
    o = warpgroup_mma_wait(0, deps=[o])
    mbarrier.arrive(release, count=1)
    p16 = gl.convert_layout(p.to(DTYPE), p_layout)
    o = o * gl.convert_layout(shrink, gl.SliceLayout(1, o.type.layout))[:, None]
    return o, p16


@gluon.jit
def _clear_rows(v_tile, first, D: gl.constexpr):
    """Zeros rows `first` and later of a value tile: their weights are 0, and 0 * NaN would not be."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [gl.num_warps(), 1], [1, 0])
    row = gl.arange(0, 16, gl.SliceLayout(1, layout))
    for i in gl.static_range(KEYS // 16):
        if first < 16 * (i + 1):
            part = v_tile.slice(16 * i, 16, 0)
            value = part.load(layout)
            part.store(gl.where((row < first - 16 * i)[:, None], value, 0.0).to(value.dtype))
    fence_async_shared()
    warps_barrier()


@gluon.jit
def _widen_columns(x, D: gl.constexpr):
    """The same [M, D] values with 16 contiguous bytes a thread, for wide stores of a 16-bit accumulator.

    Thread t of a quad holds word t (2 columns) of each of four blocks of 8 columns; after the exchange it holds the
    four words of block t, and reshaping gives every column its right name again.
    """
    x = gl.inline_asm_elementwise(TRANSPOSE_QUADS, TRANSPOSE_OPERANDS, [x], x.dtype, False, 16)
    x = x.reshape([ROWS, D // 32, 4, 4, 2]).permute([0, 1, 3, 2, 4]).reshape([ROWS, D])
    return gl.convert_layout(x, _store_layout(D), assert_trivial=True)


@gluon.jit
def _store(
    result, o, m, l, row, row_end, head, WARPGROUP: gl.constexpr, D: gl.constexpr, HAS_LSE: gl.constexpr, LAZY: gl.constexpr
):  # fmt: skip
    """Writes the rows of a finished item that belong to it."""
    out, lse, scale, out_stride, num_heads = result
    row += WARPGROUP * ROWS
    total = gl.convert_layout(gl.sum(l, axis=1), m.type.layout)
    if HAS_LSE:
        t = row + gl.arange(0, ROWS, m.type.layout)
        place = t.to(gl.int64) * num_heads + head
        r = m if LAZY else m * scale
        gl.store(lse + place, (r + gl.log2(total)) * LN_2, mask=t < row_end)
    o = o * gl.convert_layout(1.0 / total, gl.SliceLayout(1, o.type.layout))[:, None]
    o16 = _widen_columns(o.to(out.dtype.element_ty), D)
    t = row + gl.arange(0, ROWS, gl.SliceLayout(1, o16.type.layout))
    d = gl.arange(0, D, gl.SliceLayout(0, o16.type.layout))
    place = t.to(gl.int64)[:, None] * out_stride + (head * D + d)[None, :]
    gl.store(out + place, o16, mask=(t < row_end)[:, None])


@gluon.jit
def consumer(
    q_mem, rings, queue, result,
    WARPGROUP: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, HAS_PREFIX: gl.constexpr, HAS_LSE: gl.constexpr,
    TURNS: gl.constexpr, LAZY: gl.constexpr, Q_REGS: gl.constexpr,
):  # fmt: skip
    q_smem, q_full, q_empty = q_mem
    _out, _lse, scale, _out_stride, _num_heads = result
    k_ring, v_ring, full, empty = rings
    records, lens, _begins, item_full, item_empty = queue
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, s_layout, 2)
    DTYPE: gl.constexpr = k_ring.dtype
    _declare_vote(WARPGROUP)
    if TURNS and WARPGROUP == 1:
        _pass_turn(WARPGROUP)
    mbarrier.wait(item_full.index(0), 0)
    row = get_word(records.index(0))
    row_end = get_word(records.index(2))
    mbarrier.wait(q_full.index(WARPGROUP), 0)
    if Q_REGS:
        q = q_smem.index(WARPGROUP).load(p_layout)
        mbarrier.arrive(q_empty.index(WARPGROUP), count=1)
    else:
        q = q_smem.index(WARPGROUP)
    mbarrier.wait(full.index(0), 0)
    zero = gl.zeros([ROWS, KEYS], gl.float32, s_layout)
    s = warpgroup_mma(q, k_ring.index(0).permute((1, 0)), zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(empty.index(0), count=1)
    p, m, l = _first_weights(s, scale, WARPGROUP)
    if LAZY:
        m = m * scale
    stage = 1
    phase = 0
    count = 0
    mbarrier.wait(full.index(stage), phase)
    if row_end - row < KEYS:
        _clear_rows(v_ring.index(stage), row_end - row, D)
    p16 = gl.convert_layout(p.to(DTYPE), p_layout)
    o = gl.zeros([ROWS, D], gl.float32, o_layout)
    while row >= 0:
        slot = count & 1
        tiles = get_word(records.index(slot * FIELDS + 1))
        head = get_word(records.index(slot * FIELDS + 3))
        if HAS_PREFIX:
            g = slot * MAX_SEGMENTS
            for _ in range(get_word(records.index(slot * FIELDS + 4))):
                valid = get_word(lens.index(g)) % KEYS
                g += 1
                while valid == 0:
                    valid = get_word(lens.index(g)) % KEYS
                    g += 1
                if LAZY:
                    stage, phase, p16, o, l, m = _lazy_step(q, (k_ring, v_ring), (full, empty), stage, phase, p16, o, l, m, scale, valid, DTYPE, True, WARPGROUP, STAGES, TURNS)
                else:
                    s, o = _products(q, k_ring.index(stage), v_ring.index(stage), p16, o, WARPGROUP, TURNS)
                    key = gl.arange(0, KEYS, gl.SliceLayout(0, s_layout))
                    s = gl.where((key < valid)[None, :], s, float("-inf"))
                    p, m, l, shrink = _weights(s, m, l, scale)
                    release = empty.index(stage)
                    stage, phase = next_stage(stage, phase, STAGES)
                    mbarrier.wait(full.index(stage), phase)
                    o, p16 = _finish_step(o, p, shrink, release, DTYPE, p_layout)
                _clear_rows(v_ring.index(stage), valid, D)
        for _ in range(tiles):
            if LAZY:
                stage, phase, p16, o, l, m = _lazy_step(q, (k_ring, v_ring), (full, empty), stage, phase, p16, o, l, m, scale, 128, DTYPE, False, WARPGROUP, STAGES, TURNS)
            else:
                s, o = _products(q, k_ring.index(stage), v_ring.index(stage), p16, o, WARPGROUP, TURNS)
                p, m, l, shrink = _weights(s, m, l, scale)
                release = empty.index(stage)
                stage, phase = next_stage(stage, phase, STAGES)
                mbarrier.wait(full.index(stage), phase)
                o, p16 = _finish_step(o, p, shrink, release, DTYPE, p_layout)

        # The last values of this item together with the first keys of the next; after the last item those keys, and
        # all that follows from them, are left-overs that nobody looks at.
        if not Q_REGS:
            mbarrier.arrive(q_empty.index(WARPGROUP), count=1)
        mbarrier.arrive(item_empty.index(slot), count=1)
        count += 1
        slot = count & 1
        mbarrier.wait(item_full.index(slot), (count >> 1) & 1)
        next_row = get_word(records.index(slot * FIELDS))
        next_end = get_word(records.index(slot * FIELDS + 2))
        mbarrier.wait(q_full.index(WARPGROUP), count & 1)
        if Q_REGS:
            q = q_smem.index(WARPGROUP).load(p_layout)
            mbarrier.arrive(q_empty.index(WARPGROUP), count=1)
        s, o = _products(q, k_ring.index(stage), v_ring.index(stage), p16, o, WARPGROUP, TURNS)
        p, next_m, next_l = _first_weights(s, scale, WARPGROUP)
        if LAZY:
            next_m = next_m * scale
        next_l = _pin(next_l)
        release = empty.index(stage)
        stage, phase = next_stage(stage, phase, STAGES)
        mbarrier.wait(full.index(stage), phase)
        o = warpgroup_mma_wait(0, deps=[o])
        mbarrier.arrive(release, count=1)
        p16 = gl.convert_layout(p.to(DTYPE), p_layout)
        _store(result, o, m, l, row, row_end, head, WARPGROUP, D, HAS_LSE, LAZY)
        if next_end - next_row < KEYS:
            _clear_rows(v_ring.index(stage), next_end - next_row, D)
        o = gl.zeros([ROWS, D], gl.float32, o_layout)
        m = next_m
        l = next_l
        row = next_row
        row_end = next_end
    if TURNS and WARPGROUP == 0:
        _wait_turn(WARPGROUP)
