"""The recipe of docs/adding-a-method.md, followed to the letter, and the code of both pages."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from compactor_vllm.compression import COMPRESSION_REGISTRY, Compactor, DecodeScoringContext, resolve_method
from compactor_vllm.compression.selection import select_ranks
from compactor_vllm.errors import InvalidInputError
from tests.compression import scoring_cases as ref

DOCS = Path(__file__).parents[2] / "docs"
BLOCKS = {
    page: re.findall(r"^```python\n(.*?)^```$", (DOCS / page).read_text(), re.M | re.S)
    for page in ("adding-a-method.md", "methods.md")
}


@pytest.fixture
def my_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The file of the recipe, alone in the current directory."""
    (source,) = [code for code in BLOCKS["adding-a-method.md"] if code.startswith("# my_file.py")]
    assert len(source.splitlines()) < 60
    (tmp_path / "my_file.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    before = dict(COMPRESSION_REGISTRY)
    yield "my_file.py:Mine"
    COMPRESSION_REGISTRY.clear()
    COMPRESSION_REGISTRY.update(before)


def test_the_recipe_gives_a_method(my_file: str) -> None:
    method = resolve_method(my_file, {"block": 32})
    lengths = [50, 33, 0, 1]
    q, k, v = ref.qkv(sum(lengths), 4, 2, 16)
    context = ref.context_for(lengths, 4, 2, 16)
    scores = method.post_rope_scoring(q, k, v, method.pre_rope_scoring(q, k, v, context), context)
    assert scores.shape == (84, 2) and scores.dtype == torch.float32 and scores.isfinite().all()
    begin = 0
    for length in lengths:
        alone = method.pre_rope_scoring(
            *(x[begin : begin + length] for x in (q, k, v)), ref.context_for([length], 4, 2, 16)
        )
        torch.testing.assert_close(scores[begin : begin + length], alone)
        begin += length
    assert resolve_method("distinct", {"block": 32}) == method
    with pytest.raises(InvalidInputError, match="block must be an integer >= 1, not 0"):
        resolve_method(my_file, {"block": 0})
    with pytest.raises(InvalidInputError, match=r"no option 'blck'.*'block'"):
        resolve_method(my_file, {"blck": 1})


def run(code: str) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "page"}
    exec(compile(code, "a page of docs", "exec", dont_inherit=True), names)
    return names


def runnable(page: str) -> list[str]:
    return [code for code in BLOCKS[page] if "LLM(" not in code and not code.startswith("# my_file.py")]


@pytest.mark.parametrize("page", BLOCKS)
def test_code_of_the_pages_runs(page: str, my_file: str) -> None:
    codes = runnable(page)
    assert codes
    for code in codes:
        run(code)


def test_the_deferred_example_fills_one_budget_across_layers() -> None:
    (code,) = [code for code in runnable("adding-a-method.md") if "deferred_keep" in code]
    names = run(code)
    protected = torch.arange(20) < 2
    masks = names["AcrossLayers"]().deferred_keep([torch.rand(20, 3), torch.rand(20, 3) + 5], 6, protected)
    assert [int(m.sum()) for m in masks] == [2 * 3, 2 * 6 * 3 - 2 * 3]
    assert all(m[:2].all() for m in masks)


def test_the_decoding_example_keeps_the_most_recent() -> None:
    (code,) = [code for code in runnable("adding-a-method.md") if "decode_scoring(" in code]
    names = run(code)
    method = names["MostRecent"](prune_every=8)
    assert method.decode_pruning is not None
    positions = torch.tensor([[0, 5, 7, 9], [1, 8, 10, 0]], dtype=torch.int32)
    lens = torch.tensor([4, 3])
    context = DecodeScoringContext(
        layer_idx=0,
        scale=1.0,
        lens_K=lens,
        positions_KL=positions,
        scores_KL=torch.zeros(2, 4),
        query_positions_W=torch.tensor([10]),
    )
    scores = method.decode_scoring(torch.zeros(1, 2, 4), torch.zeros(2, 4, 4), torch.zeros(2, 4, 4), context)
    kept, counts = select_ranks(scores, lens, positions, 4)
    assert kept.tolist() == [2, 3, 1, 2] and counts.tolist() == [2, 2]


def option_rows(section: str) -> set[str]:
    text = (DOCS / "methods.md").read_text().split(f"## {section}\n")[1].split("\n## ")[0]
    return set(re.findall(r"^\| `(\w+)` \| (\S+) \|", text, re.M))


@pytest.mark.parametrize("name", COMPRESSION_REGISTRY)
def test_every_option_is_documented_with_its_default(name: str) -> None:
    documented = {option: default.strip("`").strip('"') for option, default in option_rows(name.upper())}
    options = vars(resolve_method(name))
    assert documented == {option: str(value) for option, value in options.items() if option != "head_floor"}


def test_published_variants_are_valid_options() -> None:
    rows = re.findall(r"^\| (paper|v0|kvpress) \| `([^`]*)`.*\|$", (DOCS / "methods.md").read_text(), re.M)
    assert [name for name, _ in rows] == ["paper", "v0", "kvpress"]
    for _, options in rows:
        assert resolve_method("compactor", eval(f"dict({options})")) != Compactor()
