"""The README and docs/: code runs, commands and links exist, quoted messages are those of the source."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer.main

from compactor_vllm.cli.main import app
from tests.test_promises import QUICKSTART, SMALL

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
TESTED_ELSEWHERE = {"adding-a-method.md", "methods.md"}
"""Pages whose code tests/compression/test_docs.py runs."""

SKIP_MARK = "<!-- not run:"
"""A comment on the line before a block, with the reason."""


class Block(NamedTuple):
    page: Path
    line: int
    language: str
    code: str
    before: str


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    found = []
    for match in re.finditer(r"^```(\w*)[^\n]*\n(.*?)^```$", text, re.M | re.S):
        line = text.count("\n", 0, match.start()) + 1
        before = text[: match.start()].rstrip().rsplit("\n", 1)[-1]
        found.append(Block(page, line, match[1], match[2], before))
    return found


BLOCKS = [block for page in PAGES for block in blocks(page)]


def label(block: Block) -> str:
    return f"{block.page.name}:{block.line}"


def is_run(block: Block) -> bool:
    tested_elsewhere = block.page.name in TESTED_ELSEWHERE or block.code == QUICKSTART
    return block.language == "python" and not tested_elsewhere and SKIP_MARK not in block.before


@pytest.mark.parametrize("block", [block for block in BLOCKS if is_run(block)], ids=label)
def test_code_runs(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from compactor_vllm.models import MODEL_REGISTRY

    monkeypatch.chdir(tmp_path)
    before = dict(MODEL_REGISTRY)
    code = block.code
    for original, small in SMALL:
        code = code.replace(original, small)
    names: dict[str, Any] = {"__name__": "page"}
    try:
        exec(compile("\n" * block.line + code, str(block.page), "exec", dont_inherit=True), names)
    finally:
        if "llm" in names:
            names["llm"].close()
        MODEL_REGISTRY.clear()
        MODEL_REGISTRY.update(before)


def commands() -> list[tuple[str, str]]:
    lines = [
        (label(block), line.removeprefix("$ ").split("  #")[0])
        for block in BLOCKS
        if block.language in ("console", "bash")
        for line in block.code.splitlines()
        if line.startswith("$ ")
    ]
    return [(place, command) for place, command in lines if command.split()[0] in ("make", "compactor-vllm")]


@pytest.mark.parametrize(("place", "command"), commands())
def test_commands_exist(place: str, command: str) -> None:
    program, goal, *arguments = shlex.split(command)
    if program == "make":
        assert re.search(rf"^{goal}:", (ROOT / "Makefile").read_text(), re.M), place
        return
    known = typer.main.get_command(app).commands[goal]  # type: ignore[attr-defined]
    if arguments != ["--help"]:
        known.make_context(goal, list(arguments))  # raises for an option or a value that is not there


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", page.read_text(), flags=re.S)):
        if not re.match(r"\w+:", target):
            assert (page.parent / target.split("#")[0]).exists(), f"{page.name}: {target}"


def test_structure_names_every_file() -> None:
    text = (ROOT / "docs" / "structure.md").read_text()
    package = ROOT / "src" / "compactor_vllm"
    files = {file.name: file for file in package.rglob("*.py") if file.name != "__init__.py"}
    missing = [f"| `{name}` | {summary(file)} |" for name, file in sorted(files.items()) if f"`{name}`" not in text]
    assert not missing, "lines that docs/structure.md lacks:\n" + "\n".join(missing)
    folders = {f"`{folder.name}/`" for folder in package.iterdir() if (folder / "__init__.py").is_file()}
    assert {folder for folder in folders if folder not in text} == set()
    assert set(re.findall(r"^\| `([\w/]+\.py)` \|", text, re.M)) <= set(files), "a file that is gone"


def summary(file: Path) -> str:
    """The first sentence or paragraph of a module's docstring."""
    paragraph = (ast.get_docstring(ast.parse(file.read_text())) or "").split("\n\n")[0]
    return " ".join(paragraph.split()).rstrip(".")


def test_messages_that_troubleshooting_quotes_are_real() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    source = "".join(path.read_text() for path in [*(ROOT / "src").rglob("*.py"), ROOT / "Makefile"])
    quoted = re.findall(r'"([^"]+)"', " ".join(re.findall(r"^\*\*(\".+?)\*\*", text, re.M)))
    assert len(quoted) > 5
    for message in quoted:
        for part in message.split("..."):
            assert part.strip(" .") in source, message


def test_the_readme_leads_with_the_two_commands() -> None:
    first = next(block for block in BLOCKS if block.page.name == "README.md")
    assert [line.split("#")[0].strip() for line in first.code.splitlines()] == ["$ make run", "$ make test"]


def test_numbers_that_are_not_ours_are_labelled() -> None:
    """The table of promised figures never stands without a row for what was measured."""
    lines = (ROOT / "README.md").read_text().splitlines()
    promised = [i for i, line in enumerate(lines) if re.match(r"\| (Llama|Qwen)\S+: promised", line)]
    assert len(promised) == 2 and all(": measured |" in lines[i + 1] for i in promised)
    assert any("has not reproduced them yet" in line for line in lines[: promised[0]])


@pytest.mark.slow
def test_the_pages_build_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install -e '.[dev]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "SequenceCompressionParams" in (tmp_path / "api" / "index.html").read_text()
