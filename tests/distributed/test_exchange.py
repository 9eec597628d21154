"""What ranks exchange: selection and statistics give what one rank computes, bit for bit; layers add up."""

from __future__ import annotations

from threading import Lock

import pytest
import torch
import torch.nn.functional as F

from compactor_vllm.compression import select_kernel
from compactor_vllm.compression.reference import ordered_sum, zscore
from compactor_vllm.compression.selection import select_ranks, select_tokens
from compactor_vllm.distributed.group import Group, KVHeads, check_ranks
from compactor_vllm.errors import ConfigError
from compactor_vllm.layers.embed_head import VocabEmbedding
from compactor_vllm.layers.mlp import GatedMLP
from compactor_vllm.layers.moe import SparseMoE
from tests.distributed.thread_group import run_ranks


@pytest.mark.parametrize(
    ("ranks", "heads", "kv_heads", "valid"),
    [(3, 9, 3, True), (9, 9, 3, True), (2, 9, 3, False), (4, 8, 2, True), (8, 8, 2, True), (6, 12, 4, False)],
)
def test_numbers_of_ranks_that_work(ranks, heads, kv_heads, valid):
    if valid:
        check_ranks(ranks, heads, kv_heads)
        return
    with pytest.raises(ConfigError, match=r"possible: 1, ") as error:
        check_ranks(ranks, heads, kv_heads)
    possible = [int(n) for n in str(error.value).rpartition(": ")[2].split(", ")]
    for n in possible:
        check_ranks(n, heads, kv_heads)
    assert ranks not in possible and heads in possible


@pytest.mark.parametrize(("size", "total"), [(2, 4), (4, 4), (4, 2), (8, 2), (3, 3)])
def test_kv_heads_cover_all_heads_and_count_each_once(size, total):
    def rank(group: Group):
        heads = KVHeads.split(total, group)
        values = torch.arange(total)[heads.slice].repeat(5, 1)
        assert torch.equal(heads.gather(values), torch.arange(total).repeat(5, 1))
        count = torch.tensor([heads.count])
        assert heads.all_reduce_(count).item() == total
        queries = torch.arange(3 * 2).view(3, 2, 1) * 100 + group.rank  # two query heads on each rank
        together = heads.replicate(queries, tokens_at_once=2)
        first = group.rank // heads.replicas * heads.replicas
        expected = torch.cat([queries - group.rank + r for r in range(first, first + heads.replicas)], dim=1)
        assert torch.equal(together, expected)
        return heads.counted

    assert sum(run_ranks(size, rank)) == min(size, total)


def scores_with_ties(tokens: int, heads: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-3, 4, (tokens, heads), generator=generator) / 7  # seven values: nearly all are ties
    scores[::11] = float("nan")
    scores[1::13] *= 0.0  # both zeros
    return scores.float()


class OneAtATime:
    """A kernel that threads launch one after the other, as the interpreter wants it."""

    lock = Lock()

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            with self.lock:
                self.kernel[grid](*arguments, **options)

        return launch


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("options", [{}, {"per_head": True}, {"floor": 3}], ids=["layer", "head", "floor"])
@pytest.mark.parametrize(("size", "total"), [(2, 4), (4, 4), (4, 2), (3, 3)])
def test_ranks_select_what_one_rank_selects(size, total, options, kernels, monkeypatch):
    select = select_tokens
    if kernels == "triton":
        select = select_kernel.select_tokens
        for name in ("_histogram_kernel", "_tally_kernel", "_floor_cut_kernel", "_write_kernel"):
            monkeypatch.setattr(select_kernel, name, OneAtATime(getattr(select_kernel, name)))
    seed = int(torch.randint(1 << 30, ()))
    print(f"seed {seed}")
    lengths, keeps = [90, 7, 64], [20, 7, 9]
    scores_TK = scores_with_ties(sum(lengths), total, seed)
    borders = torch.tensor([0, 90, 97, 161], dtype=torch.int32)
    protected_T = torch.zeros(sum(lengths), dtype=torch.bool)
    protected_T[[0, 1, 89, 97, 160]] = True
    floor = options.get("floor")
    arguments = {
        "per_head": options.get("per_head", False),
        "floor_B": None if floor is None else torch.full((3,), floor, dtype=torch.int32),
    }
    keep_B, pairs = torch.tensor(keeps), sum(keeps) * total
    kept, counts_BK = select_tokens(scores_TK, borders, keep_B, protected_T, pairs, **arguments)
    cells = kept.split(counts_BK.flatten().tolist())  # by sequence, then head

    def rank(group: Group):
        heads = KVHeads.split(total, group)
        mine = select(
            scores_TK[:, heads.slice].contiguous(), borders, keep_B, protected_T, pairs, **arguments, heads=heads
        )
        return heads, mine

    for heads, (own, own_counts_BK) in run_ranks(size, rank):
        assert torch.equal(own_counts_BK, counts_BK[:, heads.slice])
        expected = [cells[b * total + k] for b in range(3) for k in range(total)[heads.slice]]
        assert torch.equal(own, torch.cat(expected))


@pytest.mark.parametrize(("size", "total"), [(2, 4), (4, 2), (3, 3)])
def test_ranks_compact_what_one_rank_compacts(size, total):
    generator = torch.Generator().manual_seed(5)
    lens_K = torch.randint(3, 40, (total,), generator=generator)
    scores_KL = scores_with_ties(40, total, 3).t().contiguous()
    positions_KL = torch.stack([torch.randperm(90, generator=generator)[:40].sort().values for _ in range(total)])
    pairs = int(lens_K.sum()) // 2
    rank_N, counts_K = select_ranks(scores_KL, lens_K, positions_KL, pairs)
    cells = rank_N.split(counts_K.tolist())

    def rank(group: Group):
        heads = KVHeads.split(total, group)
        longest = int(lens_K[heads.slice].max())
        scores, positions = scores_KL[heads.slice, :longest], positions_KL[heads.slice, :longest]
        return heads, select_ranks(scores, lens_K[heads.slice], positions, pairs, heads=heads)

    for heads, (own, own_counts_K) in run_ranks(size, rank):
        assert torch.equal(own_counts_K, counts_K[heads.slice])
        assert torch.equal(own, torch.cat(cells[heads.slice]))


@pytest.mark.parametrize("domain", ["sequence", "head", "chunk", "none"])
@pytest.mark.parametrize(("size", "total"), [(2, 4), (4, 4), (4, 2), (3, 3)])
def test_ranks_standardise_as_one_rank_does(size, total, domain):
    x_NK = torch.randn(301, total) * torch.logspace(-3, 3, total)
    counted_N = torch.rand(301) > 0.3
    whole_NK = zscore(x_NK, domain, 64, counted_N)

    def rank(group: Group):
        heads = KVHeads.split(total, group)
        return torch.equal(zscore(x_NK[:, heads.slice], domain, 64, counted_N, heads), whole_NK[:, heads.slice])

    assert all(run_ranks(size, rank))


def test_ordered_sums_depend_on_nothing_but_the_order():
    x = torch.randn(1001, 3, dtype=torch.float64)
    total = ordered_sum(x, 0)
    torch.testing.assert_close(total, x.sum(0), rtol=1e-12, atol=1e-12)
    for k in range(3):
        assert torch.equal(ordered_sum(x[:, k].contiguous(), 0), total[k])
        assert torch.equal(ordered_sum(x.t().contiguous(), 1)[k], total[k])


def fill(module: torch.nn.Module, path: str, stored: dict[str, torch.Tensor]) -> None:
    for slot in module.weight_slots(path):
        whole = stored[slot.name]
        assert tuple(whole.shape) == slot.shape
        slot.target.copy_(whole if slot.span is None else whole.narrow(slot.dim, slot.span.begin, slot.span.size))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_layers_of_several_ranks_add_up(size):
    """Sizes that the ranks do not divide, too: the vocabulary, and the features of an MLP and of experts."""
    torch.manual_seed(size)
    hidden, inner, vocab, experts = 12, 10, 11, 4
    stored = {
        "mlp.gate_proj.weight": torch.randn(inner, hidden),
        "mlp.up_proj.weight": torch.randn(inner, hidden),
        "mlp.down_proj.weight": torch.randn(hidden, inner),
        **{f"mlp.{part}_proj.bias": torch.randn(n) for part, n in (("gate", inner), ("up", inner), ("down", hidden))},
        "embed.weight": torch.randn(vocab, hidden),
        "gate.weight": torch.randn(experts, hidden),
    }
    for e in range(experts):
        stored[f"experts.{e}.gate_proj.weight"] = torch.randn(inner, hidden)
        stored[f"experts.{e}.up_proj.weight"] = torch.randn(inner, hidden)
        stored[f"experts.{e}.down_proj.weight"] = torch.randn(hidden, inner)
    x, ids, residual = torch.randn(7, hidden), torch.tensor([0, 10, 4, 5, 6, 3]), torch.randn(7, hidden)

    def rank(group: Group):
        mlp = GatedMLP(hidden, inner, bias=True, group=group)
        fill(mlp.gate_up_proj, "mlp.gate_up_proj", stored)
        fill(mlp.down_proj, "mlp.down_proj", stored)
        table = VocabEmbedding(vocab, hidden, group)
        fill(table, "embed", stored)
        moe = SparseMoE(hidden, inner, experts, 2, norm_topk_prob=True, group=group)
        fill(moe.gate, "gate", stored)
        fill(moe.experts, "experts", stored)
        return mlp.add_to_(residual.clone(), x), table(ids), table.logits(x), moe(x)

    [alone] = run_ranks(1, rank)
    gate, up = (F.linear(x, stored[f"mlp.{p}_proj.weight"], stored[f"mlp.{p}_proj.bias"]) for p in ("gate", "up"))
    down = F.linear(F.silu(gate) * up, stored["mlp.down_proj.weight"], stored["mlp.down_proj.bias"])
    torch.testing.assert_close(alone[0], residual + down)
    for results in run_ranks(size, rank):
        torch.testing.assert_close(results[0], alone[0])
        assert torch.equal(results[1], stored["embed.weight"][ids])
        torch.testing.assert_close(results[2], x @ stored["embed.weight"].t())
        torch.testing.assert_close(results[3], alone[3])
