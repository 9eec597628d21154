"""What the two roles of the Hopper prefill kernel share: tile sizes, the ring of stages, words of the item queue."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# Query rows of a consumer warpgroup, and keys of a tile.
ROWS = gl.constexpr(64)
KEYS = gl.constexpr(128)
MAX_SEGMENTS = gl.constexpr(8)
# Words of an item in the queue: first row, tiles without a mask, end of the rows to write, head, masked prefix tiles.
FIELDS = gl.constexpr(5)

# Synchronises the warps of one role; triton 3.6 calls it thread_barrier.
warps_barrier = getattr(gl, "barrier", None) or gl.thread_barrier


@gluon.jit
def next_stage(stage, phase, STAGES: gl.constexpr):
    stage += 1
    wrapped = stage == STAGES
    return gl.where(wrapped, 0, stage), gl.where(wrapped, phase ^ 1, phase)


@gluon.jit
def put_word(entry, value):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    entry.store(gl.full([1], value, gl.int32, layout))


@gluon.jit
def get_word(entry):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    return gl.max(entry.load(layout), axis=0)
