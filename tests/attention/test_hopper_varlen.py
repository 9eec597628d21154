"""The Hopper prefill kernel: what its machine code shows, without a GPU; on one, compared with float64."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from compactor_vllm.attention.hopper_head_order import order_heads
from compactor_vllm.attention.reference import RaggedPrefix
from tests.attention.ragged_cases import RaggedCase, make_case, relative_error, segments_table
from tests.conftest import poisoned

SHARED_LIMIT = 227 * 1024
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 6e-4}

needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)


def facts_of(*cases: str) -> list[dict]:
    """Compiles in another process: this one may run Triton's interpreter, which Gluon does not have."""
    command = [sys.executable, "-m", "compactor_vllm.attention.hopper_compile", *cases]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(["src", environment.get("PYTHONPATH", "")])
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check_facts(facts: dict, *, loads: int, registers: int = 240) -> None:
    """`loads`: places in the producer that load a tile."""
    head_dim = int(facts["case"].split(":")[0])
    k_steps, boxes = head_dim // 16, head_dim // 64
    assert facts["shared_bytes"] <= SHARED_LIMIT
    assert facts["local_accesses"] == 0
    # Two consumers: the first S; S and O of a step; its second S, rarely; S and O of the step between two items (for
    # shared segments, pieces end by themselves).
    last = 8 if "shared" in facts["case"] else k_steps + 8
    assert facts["hgmma"] == 2 * (k_steps + (k_steps + 8) + k_steps + last)
    assert facts["tma_loads"] == boxes * loads
    granted = [role[0] for role in facts["role_registers"]]
    assert granted.count(registers) == 2
    assert all(used <= allowed for allowed, used in facts["role_registers"])
    # The main loop's softmax, 64 exponentials a thread, lies between the wait for S and the wait for O.
    assert sum(exps >= 64 for exps in facts["exps_under_product"]) >= 2


def test_machine_code_of_the_plain_kernel() -> None:
    (facts,) = facts_of("128:bf16:lse")
    check_facts(facts, loads=10)


def test_machine_code_with_a_prefix() -> None:
    (facts,) = facts_of("128:bf16:prefix:lse")
    check_facts(facts, loads=23)


def test_machine_code_for_shared_segments() -> None:
    (facts,) = facts_of("128:bf16:shared")
    check_facts(facts, loads=2, registers=232)


def test_machine_code_of_chunk_scores() -> None:
    (facts,) = facts_of("128:bf16:chunk")
    assert facts["shared_bytes"] <= SHARED_LIMIT
    assert facts["local_accesses"] == 0
    assert facts["hgmma"] == 2 * 128 // 16


@pytest.mark.slow
def test_machine_code_of_the_other_configurations() -> None:
    plain = facts_of("128:bf16", "128:fp16:lse", "64:bf16", "64:fp16:lse")
    for facts in plain:
        check_facts(facts, loads=10)
    for facts in facts_of("128:fp16:prefix", "64:bf16:prefix:lse"):
        check_facts(facts, loads=23)
    for facts in facts_of("64:bf16:shared", "128:fp16:shared"):
        check_facts(facts, loads=2, registers=232)


@pytest.mark.parametrize("kv_heads", [1, 3, 8])
def test_longest_heads_come_first(device: torch.device, kv_heads: int) -> None:
    lens = torch.randint(0, 5, (6, kv_heads), dtype=torch.int32, device=device)
    segments = segments_table([[0, 3], [], [5, 1, 2]], device)
    order = order_heads(segments, lens)
    for b, row in enumerate(segments.tolist()):
        total = sum((lens[s] for s in row if s >= 0), torch.zeros_like(lens[0]))
        wanted = sorted(range(kv_heads), key=lambda k, total=total: (-int(total[k]), k))
        assert order[b].tolist() == wanted


def reference(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, seqlens: list[int], scale: float, before: list | None = None
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp in float64; `before[b][k]` are keys and values before sequence b."""
    T, H, _ = q_THD.shape
    group = H // k_TKD.shape[1]
    out = torch.zeros(q_THD.shape, dtype=torch.float64, device=q_THD.device)
    lse = torch.zeros((T, H), dtype=torch.float64, device=q_THD.device)
    begin = 0
    for b, n in enumerate(seqlens):
        rows = slice(begin, begin + n)
        hidden = torch.ones(n, n, dtype=torch.bool, device=q_THD.device).triu(1)
        for h in range(H):
            q, k, v = q_THD[rows, h].double(), k_TKD[rows, h // group].double(), v_TKD[rows, h // group].double()
            logits = (q @ k.T * scale).masked_fill(hidden, float("-inf"))
            if before is not None:
                k_before, v_before = before[b][h // group]
                logits = torch.cat([q @ k_before.double().T * scale, logits], 1)
                v = torch.cat([v_before.double(), v])
            lse[rows, h] = logits.logsumexp(1)
            out[rows, h] = logits.softmax(1) @ v
        begin += n
    return out, lse


def random_qkv(tokens: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(torch.randn(tokens, h, head_dim, device="cuda").to(dtype) for h in (heads, kv_heads, kv_heads))


def run(q: Tensor, k: Tensor, v: Tensor, seqlens: list[int], prefix: RaggedPrefix | None = None) -> tuple[Tensor, ...]:
    """Output and LSE, written twice into poisoned buffers with one plan: both runs must agree bit for bit."""
    from compactor_vllm.attention.hopper_varlen_kernel import plan_prefill, prefill_attention_hopper

    prefix_tokens = 0 if prefix is None else prefix.max_len
    plan = plan_prefill(seqlens, q.shape[1], k.shape[1], q.shape[2], q.device, prefix_tokens=prefix_tokens)
    results = []
    for _ in range(2):
        out = poisoned(*q.shape, dtype=q.dtype, device="cuda")
        lse = poisoned(*q.shape[:2], device="cuda")
        prefill_attention_hopper(q, k, v, plan, q.shape[2] ** -0.5, out=out, lse=lse, prefix=prefix)
        results.append((out, lse))
    assert plan.counter.item() == 0
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)
    return results[0]


def compare(out: Tensor, lse: Tensor, wanted: tuple[Tensor, Tensor]) -> None:
    assert relative_error(out, wanted[0]) < TOLERANCE[out.dtype]
    assert (lse.double() - wanted[1]).abs().max() <= 1e-6 * wanted[1].abs().max() + 1e-5


SEQLENS = [
    [1],
    [64],
    [127],
    [128],
    [129],
    [3000],
    [1, 127, 128, 129, 255, 256, 257, 640, 33],
    [64 * (i % 7) + i + 1 for i in range(64)],
]


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("seqlens", SEQLENS, ids=lambda s: f"{len(s)}x{max(s)}")
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (8, 2), (9, 3)])
@pytest.mark.parametrize("head_dim, dtype", [(128, torch.bfloat16), (64, torch.float16)])
def test_sequences(seqlens: list[int], heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    q, k, v = random_qkv(sum(seqlens), heads, kv_heads, head_dim, dtype)
    compare(*run(q, k, v, seqlens), reference(q, k, v, seqlens, head_dim**-0.5))


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [3.0, 10.0, 100.0])
def test_scores_that_outgrow_the_first_tile(factor: float, dtype: torch.dtype) -> None:
    """Early keys with far larger scores than those of the diagonal tile make the kernel move its reference."""
    seqlens = [1500, 300]
    q, k, v = random_qkv(sum(seqlens), 8, 2, 128, dtype)
    k[:700] *= factor
    k[700:1100] *= factor / 4
    compare(*run(q, k, v, seqlens), reference(q, k, v, seqlens, 128**-0.5))


PREFIXES = {
    "none": [[[0, 0]], [[0, 0]]],
    "1": [[[1, 1]], [[1, 1]]],
    "127": [[[127, 127]], [[127, 127]]],
    "128": [[[128, 128]], [[128, 128]]],
    "129": [[[129, 129]], [[129, 129]]],
    "ragged": [[[0, 1000]], [[127, 128]]],
    "several segments": [[[0, 1], [5, 300], [256, 0]], [[129, 255], [1, 0], [130, 640]]],
}


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("lens", PREFIXES.values(), ids=PREFIXES)
@pytest.mark.parametrize("seqlens", [[200, 77], [1, 300]], ids=str)
@pytest.mark.parametrize("head_dim, factor", [(128, 1.0), (128, 30.0), (64, 1.0)])
def test_ragged_prefix(lens: list[list[list[int]]], seqlens: list[int], head_dim: int, factor: float) -> None:
    """`lens[b][g][k]`: tokens of segment g of sequence b. Unused rows of pages are NaN."""
    flat = [segment for sequence in lens for segment in sequence]
    case = make_case(flat, head_dim=head_dim, page_size=128, dtype=torch.bfloat16, device=torch.device("cuda"))
    scale_keys(case, factor)
    count = len(lens[0])
    rows = [list(range(b * count, (b + 1) * count)) for b in range(len(lens))]
    longest = max(sum(segment[k] for segment in sequence) for sequence in lens for k in range(2))
    prefix = RaggedPrefix(
        cache=case.cache, segments_BG=segments_table(rows, torch.device("cuda")), max_len=max(1, longest)
    )
    q, k, v = random_qkv(sum(seqlens), 6, 2, head_dim, torch.bfloat16)
    before = [[case.tokens(row, head) for head in range(2)] for row in rows]
    compare(*run(q, k, v, seqlens, prefix), reference(q, k, v, seqlens, head_dim**-0.5, before))


def scale_keys(case: RaggedCase, factor: float) -> None:
    case.cache.k_pages_PRD.mul_(factor)
    for rows in case.keys.values():
        rows.mul_(factor)


@pytest.mark.gpu
@needs_hopper
def test_a_neighbour_full_of_nan_does_no_harm() -> None:
    seqlens = [200, 300, 77]
    q, k, v = random_qkv(sum(seqlens), 8, 2, 128, torch.bfloat16)
    wanted, _ = reference(q, k, v, seqlens, 128**-0.5)
    for x in (q, k, v):
        x[200:500] = float("nan")
    out, _ = run_ignoring_nan(q, k, v, seqlens)
    for rows in (slice(0, 200), slice(500, 577)):
        assert relative_error(out[rows], wanted[rows]) < TOLERANCE[torch.bfloat16]


def run_ignoring_nan(q: Tensor, k: Tensor, v: Tensor, seqlens: list[int]) -> tuple[Tensor, Tensor]:
    from compactor_vllm.attention.hopper_varlen_kernel import plan_prefill, prefill_attention_hopper

    plan = plan_prefill(seqlens, q.shape[1], k.shape[1], q.shape[2], q.device)
    lse = torch.empty(q.shape[:2], device="cuda")
    return prefill_attention_hopper(q, k, v, plan, q.shape[2] ** -0.5, lse=lse), lse


@pytest.mark.gpu
@needs_hopper
def test_ranges_one_after_another_in_place_of_the_queries() -> None:
    from compactor_vllm.attention.hopper_varlen_kernel import plan_prefill, prefill_attention_hopper

    seqlens = [900, 300]
    q, k, v = random_qkv(sum(seqlens), 8, 2, 128, torch.bfloat16)
    wanted, _ = reference(q, k, v, seqlens, 128**-0.5)
    for ranges in ([(0, 384), (0, 0)], [(384, 900), (0, 100)], [(0, 0), (128, 300)]):
        plan = plan_prefill(seqlens, 8, 2, 128, q.device, query_ranges=ranges)
        prefill_attention_hopper(q, k, v, plan, 128**-0.5, out=q)
    done = torch.ones(1200, dtype=torch.bool)
    done[1000:1028] = False
    assert relative_error(q[done], wanted[done]) < TOLERANCE[torch.bfloat16]


@pytest.mark.gpu
@needs_hopper
def test_replays_of_a_graph() -> None:
    from compactor_vllm.attention.hopper_varlen_kernel import plan_prefill, prefill_attention_hopper

    q, k, v = random_qkv(2000, 32, 8, 128, torch.bfloat16)
    plan = plan_prefill([2000], 32, 8, 128, q.device)
    wanted = prefill_attention_hopper(q, k, v, plan, 0.1).clone()
    out = torch.empty_like(q)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        prefill_attention_hopper(q, k, v, plan, 0.1, out=out)
    for _ in range(3):
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, wanted)


@pytest.mark.gpu
@needs_hopper
def test_what_does_not_fit_is_refused() -> None:
    from compactor_vllm.attention.hopper_varlen_kernel import plan_prefill, prefill_attention_hopper, unsupported
    from compactor_vllm.errors import InvalidInputError

    q, k, v = random_qkv(100, 8, 2, 128, torch.bfloat16)
    plan = plan_prefill([100], 8, 2, 128, q.device)
    assert unsupported(q.device, torch.float32, 128) is not None
    assert unsupported(q.device, torch.bfloat16, 96) is not None
    with pytest.raises(InvalidInputError, match="scale"):
        prefill_attention_hopper(q, k, v, plan, 0.0)
    with pytest.raises(InvalidInputError, match="k_TKD must be"):
        prefill_attention_hopper(q, k[:, :1], v, plan, 0.1)
    with pytest.raises(InvalidInputError, match="contiguous"):
        prefill_attention_hopper(q, k, v.transpose(0, 1).contiguous().transpose(0, 1), plan, 0.1)
    with pytest.raises(InvalidInputError, match="not a multiple of 2"):
        plan_prefill([100], 7, 2, 128, q.device)
