"""Classes of methods from outside of the registry: modules, files, installed packages."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

import cloudpickle

from compactor_vllm.errors import UnknownMethodError

ENTRY_POINT_GROUP = "compactor_vllm.compression_methods"

_FILES: dict[Path, tuple[tuple[int, int], ModuleType]] = {}


@lru_cache(maxsize=1)
def installed_methods() -> dict[str, EntryPoint]:
    """Entry points of installed packages by lower-case name; nothing of them is imported."""
    return {point.name.lower(): point for point in entry_points(group=ENTRY_POINT_GROUP)}


def load_entry_point(point: EntryPoint) -> Any:
    """What the entry point names. UnknownMethodError, with the cause, if its package fails to import."""
    try:
        return point.load()
    except Exception as error:
        message = f"method {point.name!r} ({point.value}) of an installed package cannot be loaded: {_text(error)}"
        raise UnknownMethodError(message) from error


def load_attribute(spec: str) -> Any:
    """What "package.module:Class" or "path/to/file.py:Class" names.

    A file is imported under a private name of its own and again only when it has changed.

    Raises:
        UnknownMethodError: nothing is there, or importing it fails (the cause is chained).
    """
    place, _, attribute = spec.rpartition(":")
    if not place or not attribute.isidentifier():
        raise UnknownMethodError(f'{spec!r} is not of the form "package.module:Class" or "file.py:Class"')
    module = _load_file(Path(place), spec) if place.endswith(".py") else _load_module(place, spec)
    if not hasattr(module, attribute):
        own = (v for v in vars(module).values() if isinstance(v, type) and v.__module__ == module.__name__)
        classes = ", ".join(sorted(cls.__name__ for cls in own)) or "none"
        raise UnknownMethodError(f"{place!r} has no {attribute!r}; its classes: {classes}")
    return getattr(module, attribute)


def _load_module(name: str, spec: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise UnknownMethodError(f"cannot import method {spec!r}: {_text(error)}") from error


def _load_file(path: Path, spec: str) -> ModuleType:
    path = path.expanduser().resolve()
    if not path.is_file():
        raise UnknownMethodError(f"cannot load method {spec!r}: there is no file {str(path)!r}")
    status = path.stat()
    stamp = (status.st_mtime_ns, status.st_size)
    if path in _FILES and _FILES[path][0] == stamp:
        return _FILES[path][1]
    name = "compactor_vllm_method_" + hashlib.sha256(str(path).encode()).hexdigest()[:16]
    module_spec = importlib.util.spec_from_file_location(name, path)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    previous = sys.modules.get(name)
    sys.modules[name] = module
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        if previous is not None:
            sys.modules[name] = previous
        raise UnknownMethodError(f"cannot load method {spec!r}: {_text(error)}") from error
    cloudpickle.register_pickle_by_value(module)  # ranks of an engine cannot import it by its name
    _FILES[path] = (stamp, module)
    return module


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
