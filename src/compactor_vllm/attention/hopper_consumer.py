"""The consumer warpgroups of the Hopper prefill kernel: products, softmax and the store of finished rows.

Shape suffixes: H query heads, D head dimension; M query rows of a warpgroup (64), N keys of a tile (128).

The softmax keeps no running maximum. Its weights are P = 2^(scale * S - r), where the reference r of a row is the
maximum of the item's first tile. Any reference within some 2^60 of the true maximum gives the same result, since P
(bfloat16), its sums and O (float32) have eight exponent bits, so neither a maximum nor a rescaled O is needed for the
other tiles. The row sums, which are computed anyway, tell when a tile does not fit: then the warpgroup computes the
tile's S once more and moves the reference up (`_rebase`). With float16 weights the room is 2^14.
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
S_LAYOUT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))
P_LAYOUT = gl.constexpr(gl.DotOperandLayout(0, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]), 2))


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


@gluon.constexpr_function
def sync_text(instruction, barrier, threads=256):
    return f"{instruction} {barrier}, {threads}; mov.b32 $0, $1;"


@gluon.constexpr_function
def _vote_text(warpgroup, dtype):
    """PTX: passes two row sums on and sets `large` to whether any of the warpgroup's is not below the limit."""
    limit = "0f46800000" if str(dtype) == "fp16" else "0f5F800000"
    return (
        f"{{ .reg .pred bad; setp.geu.f32 bad, $2, {limit}; setp.geu.or.f32 bad, $3, {limit}, bad; "
        f"bar.red.or.pred large{warpgroup}, {10 + warpgroup}, 128, bad; mov.b32 $0, $2; mov.b32 $1, $3; }}"
    )


@gluon.constexpr_function
def large_text(instruction, warpgroup):
    return f"{instruction} large{warpgroup};"


@gluon.jit
def run_ptx(TEXT: gl.constexpr):
    """Runs PTX once per thread; it sets $0 and may read $1 = 0."""
    return gl.inline_asm_elementwise(TEXT, "=r,r", [0], gl.int32, False, 1)


@gluon.jit
def _pin(x):
    """Has the compiler compute float32 `x`, and all that it depends on, here and not later, where it is used."""
    return gl.inline_asm_elementwise("// pinned $0", "=f,0", [x], gl.float32, False, 1)


@gluon.jit
def opaque(x):
    """Integer `x`, with the compiler none the wiser: what follows from it is computed anew."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], gl.int32, False, 1)


@gluon.jit
def _any_too_large(sums, WARPGROUP: gl.constexpr, DTYPE: gl.constexpr):
    """The sums, and whether any of the warpgroup's is too large for weights of DTYPE (or is NaN).

    A barrier with a reduction answers all 128 threads at once. Its predicate is a PTX register of the function
    (declared once, by `consumer`), because Gluon has no way from a thread's element to a scalar but a slower reduction.
    """
    sums = gl.inline_asm_elementwise(_vote_text(WARPGROUP, DTYPE), "=f,=f,f,f", [sums], gl.float32, False, 2)
    return sums, run_ptx(large_text("selp.b32 $0, 1, $1,", WARPGROUP)) != 0


@gluon.jit
def as_operand(p, DTYPE: gl.constexpr):
    """Weights as the left operand of P V."""
    return gl.convert_layout(p.to(DTYPE), P_LAYOUT)


@gluon.jit
def row_sums(p):
    """Row sums of [M, N] weights as [M, 4]: one partial sum for each of the four threads that share a row."""
    p_quads = p.reshape([ROWS, KEYS // 8, 4, 2])
    return gl.sum(gl.sum(p_quads, axis=3), axis=1)


@gluon.jit
def issue_scores(q, k_tile):
    """Issues S = Q K^T."""
    zero = gl.zeros([ROWS, KEYS], gl.float32, S_LAYOUT)
    return warpgroup_mma(q, k_tile.permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def _products(q, kv, stage, p16, o, WARPGROUP: gl.constexpr, TURNS: gl.constexpr):
    """Issues S = Q K^T and O += P V, in turn with the other warpgroup, and returns when S is there."""
    k_ring, v_ring = kv
    if TURNS:
        run_ptx(sync_text("bar.sync", 8 + WARPGROUP))
    s = issue_scores(q, k_ring.index(stage))
    o = warpgroup_mma(p16, v_ring.index(stage), o, is_async=True)
    if TURNS:
        run_ptx(sync_text("bar.arrive", 9 - WARPGROUP))
    s = warpgroup_mma_wait(1, deps=[s])
    return s, o


@gluon.jit
def hide_keys(s, first):
    """Hides the keys from number `first` of the tile on."""
    key = gl.arange(0, KEYS, gl.SliceLayout(0, S_LAYOUT))
    return gl.where((key < first)[None, :], s, float("-inf"))


@gluon.jit
def _first_weights(s, scale, WARPGROUP: gl.constexpr):
    """Weights, reference and row sums of an item's first tile, whose key n is seen by query rows m >= n."""
    # Opaque, or the comparisons would be kept from one item to the next, in registers that the main loop needs.
    row = opaque(gl.arange(0, ROWS, gl.SliceLayout(1, S_LAYOUT)))
    row = WARPGROUP * ROWS + (row & (ROWS - 1))
    key = gl.arange(0, KEYS, gl.SliceLayout(0, S_LAYOUT))
    s = gl.where(key[None, :] <= row[:, None], s, float("-inf"))
    r = gl.max(s, axis=1) * scale
    p = gl.exp2(s * scale - r[:, None])
    return p, r, row_sums(p)


@gluon.jit
def _rebase(q, k_tile, o, l, r, scale, visible, MASKED: gl.constexpr):
    """Moves the reference up to the maximum so far and computes this tile's weights again."""
    s = warpgroup_mma_wait(0, deps=[issue_scores(q, k_tile)])
    if MASKED:
        s = hide_keys(s, opaque(visible))
    r_new = gl.maximum(r, gl.max(s, axis=1) * scale)
    shrink = gl.exp2(r - r_new)
    p = gl.exp2(s * scale - r_new[:, None])
    o = o * gl.convert_layout(shrink, gl.SliceLayout(1, o.type.layout))[:, None]
    l = l * gl.convert_layout(shrink, gl.SliceLayout(1, l.type.layout))[:, None]
    return p, row_sums(p), o, l, r_new


@gluon.jit
def ring_step(
    q, kv, bars, position, p16, o, l, r, scale, visible,
    MASKED: gl.constexpr, WARPGROUP: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    """Adds the values of the tile before to O and computes the weights of this tile."""
    k_ring, _v_ring = kv
    full, empty = bars
    stage, phase = position
    s, o = _products(q, kv, stage, p16, o, WARPGROUP, TURNS)
    if MASKED:  # noqa: SIM102 - decided when the kernel is compiled
        if visible < KEYS:
            s = hide_keys(s, visible)
    p = gl.exp2(s * scale - r[:, None])
    sums, large = _any_too_large(row_sums(p), WARPGROUP, k_ring.dtype)
    # Waiting for the next stage already here keeps the compiler from waiting for O before the weights are computed.
    ahead, phase = next_stage(stage, phase, STAGES)
    mbarrier.wait(full.index(ahead), phase)
    o = warpgroup_mma_wait(0, deps=[o])
    if large:
        p, sums, o, l, r = _rebase(q, k_ring.index(stage), o, l, r, scale, visible, MASKED)
    mbarrier.arrive(empty.index(stage), count=1)
    return (ahead, phase), as_operand(p, k_ring.dtype), o, l + sums, r


@gluon.jit
def clear_rows(v_tile, first, D: gl.constexpr):
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
def _store(result, o, l, r, row, row_end, head, WARPGROUP: gl.constexpr, D: gl.constexpr, HAS_LSE: gl.constexpr):
    """Writes the rows of a finished item that belong to it."""
    out, lse, num_heads = result
    row += WARPGROUP * ROWS
    total = gl.convert_layout(gl.sum(l, axis=1), r.type.layout)
    if HAS_LSE:
        t = row + gl.arange(0, ROWS, r.type.layout)
        gl.store(lse + t * num_heads + head, (r + gl.log2(total)) * LN_2, mask=t < row_end)
    o = o * gl.convert_layout(1.0 / total, gl.SliceLayout(1, o.type.layout))[:, None]
    o16 = _widen_columns(o.to(out.dtype.element_ty), D)
    t = row + gl.arange(0, ROWS, gl.SliceLayout(1, o16.type.layout))
    d = gl.arange(0, D, gl.SliceLayout(0, o16.type.layout))
    place = (t * num_heads + head).to(gl.int64) * D
    gl.store(out + place[:, None] + d[None, :], o16, mask=(t < row_end)[:, None])


@gluon.jit
def _take_q(q_mem, count, WARPGROUP: gl.constexpr, Q_REGS: gl.constexpr):
    """Waits for the queries of item number `count`; with Q_REGS they move to registers and free their place."""
    q_smem, q_full, q_empty = q_mem
    mbarrier.wait(q_full.index(WARPGROUP), count & 1)
    q = q_smem.index(WARPGROUP)
    if Q_REGS:
        q = q.load(P_LAYOUT)
        fence_async_shared()
        mbarrier.arrive(q_empty.index(WARPGROUP), count=1)
    return q


@gluon.jit
def consumer(
    q_mem, kv, bars, queue, scale, result,
    WARPGROUP: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, HAS_PREFIX: gl.constexpr, HAS_LSE: gl.constexpr,
    Q_REGS: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    """One warpgroup's part of every item that the producer publishes."""
    _q_smem, _q_full, q_empty = q_mem
    k_ring, v_ring = kv
    full, empty = bars
    records, lens, _begins, item_full, item_empty = queue
    DTYPE: gl.constexpr = k_ring.dtype
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    run_ptx(large_text("mov.b32 $0, $1; .reg .pred", WARPGROUP))
    if TURNS and WARPGROUP == 1:
        run_ptx(sync_text("bar.arrive", 8))

    # The first tile of the first item has no product to share its step with.
    count = 0
    mbarrier.wait(item_full.index(0), 0)
    row = get_word(records.index(0))
    row_end = get_word(records.index(2))
    q = _take_q(q_mem, count, WARPGROUP, Q_REGS)
    mbarrier.wait(full.index(0), 0)
    s = warpgroup_mma_wait(0, deps=[issue_scores(q, k_ring.index(0))])
    mbarrier.arrive(empty.index(0), count=1)
    p, r, l = _first_weights(s, scale, WARPGROUP)
    position = next_stage(0, 0, STAGES)
    mbarrier.wait(full.index(position[0]), position[1])
    if row_end - row < KEYS:
        clear_rows(v_ring.index(position[0]), row_end - row, D)
    o = gl.zeros([ROWS, D], gl.float32, o_layout)
    p16 = as_operand(p, DTYPE)
    while row >= 0:
        slot = count & 1
        tiles = get_word(records.index(slot * FIELDS + 1))
        head = get_word(records.index(slot * FIELDS + 3))
        if HAS_PREFIX:
            segment = slot * MAX_SEGMENTS
            partial = get_word(records.index(slot * FIELDS + 4))
            tiles += partial
        for i in range(tiles):
            visible = KEYS
            if HAS_PREFIX:  # noqa: SIM102 - decided when the kernel is compiled
                if i < partial:
                    visible = get_word(lens.index(segment)) % KEYS
                    segment += 1
                    while visible == 0:
                        visible = get_word(lens.index(segment)) % KEYS
                        segment += 1
            position, p16, o, l, r = ring_step(
                q, kv, bars, position, p16, o, l, r, scale, visible, HAS_PREFIX, WARPGROUP, STAGES, TURNS
            )
            if HAS_PREFIX:  # noqa: SIM102 - decided when the kernel is compiled
                if visible < KEYS:
                    clear_rows(v_ring.index(position[0]), visible, D)

        # The last values of this item together with the first keys of the next. After the last item those keys, and
        # all that follows from them, are left-overs that nobody looks at.
        if not Q_REGS:
            mbarrier.arrive(q_empty.index(WARPGROUP), count=1)
        mbarrier.arrive(item_empty.index(slot), count=1)
        count += 1
        slot = count & 1
        mbarrier.wait(item_full.index(slot), (count >> 1) & 1)
        next_row = get_word(records.index(slot * FIELDS))
        next_end = get_word(records.index(slot * FIELDS + 2))
        q = _take_q(q_mem, count, WARPGROUP, Q_REGS)
        s, o = _products(q, kv, position[0], p16, o, WARPGROUP, TURNS)
        p, next_r, next_l = _first_weights(s, scale, WARPGROUP)
        next_l = _pin(next_l)
        release = empty.index(position[0])
        position = next_stage(position[0], position[1], STAGES)
        mbarrier.wait(full.index(position[0]), position[1])
        o = warpgroup_mma_wait(0, deps=[o])
        mbarrier.arrive(release, count=1)
        p16 = as_operand(p, DTYPE)
        _store(result, o, l, r, row, row_end, head, WARPGROUP, D, HAS_LSE)
        if next_end - next_row < KEYS:
            clear_rows(v_ring.index(position[0]), next_end - next_row, D)
        o = gl.zeros([ROWS, D], gl.float32, o_layout)
        r = next_r
        l = next_l
        row = next_row
        row_end = next_end
    if TURNS and WARPGROUP == 0:
        run_ptx(sync_text("bar.sync", 8))
