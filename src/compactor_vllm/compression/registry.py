"""The registry of compression methods, and how whatever names one becomes an instance."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from types import MappingProxyType
from typing import Any, TypeVar

from compactor_vllm.compression.common import BaseCompressionMethod
from compactor_vllm.compression.compactor import Compactor
from compactor_vllm.compression.compression_params import CompressionMethod, MethodSpec
from compactor_vllm.compression.expected_attention import ExpectedAttention
from compactor_vllm.compression.external import installed_methods, load_attribute, load_entry_point
from compactor_vllm.compression.keydiff import KeyDiff
from compactor_vllm.compression.knorm import Knorm
from compactor_vllm.compression.lagkv import LagKV
from compactor_vllm.compression.none import NoCompression
from compactor_vllm.compression.random_scores import RandomScores
from compactor_vllm.compression.snapkv import SnapKV
from compactor_vllm.compression.streaming_llm import StreamingLLM
from compactor_vllm.errors import InvalidInputError, UnknownMethodError

COMPRESSION_REGISTRY: dict[str, type[BaseCompressionMethod]] = {
    CompressionMethod.COMPACTOR.value: Compactor,
    CompressionMethod.SNAPKV.value: SnapKV,
    CompressionMethod.NONE.value: NoCompression,
    **{cls.name: cls for cls in (ExpectedAttention, KeyDiff, Knorm, LagKV, RandomScores, StreamingLLM)},
}
"""Classes by lower-case name; members of `CompressionMethod` are strings and index it."""

_NO_OPTIONS: Mapping[str, Any] = MappingProxyType({})
_Method = TypeVar("_Method", bound=type[BaseCompressionMethod])


def register(name: str) -> Callable[[_Method], _Method]:
    """Class decorator: makes a method known by `name` (lower-case letters, digits, "_", "-") and sets `cls.name`.

    Defining the same class of the same module once more (a notebook cell, an edited file) replaces it.

    Raises:
        InvalidInputError: the name is malformed or taken, or the class is no `BaseCompressionMethod`.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_-]*", name):
        raise InvalidInputError(
            f'a method name is a letter followed by letters, digits, "_", "-", lower case, not {name!r}'
        )

    def add(cls: _Method) -> _Method:
        _check_class(cls, f"@register({name!r})", InvalidInputError)
        known = COMPRESSION_REGISTRY.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise InvalidInputError(f"method name {name!r} is taken by {known.__module__}.{known.__qualname__}")
        cls.name = name
        COMPRESSION_REGISTRY[name] = cls
        return cls

    return add


def method_names() -> list[str]:
    """Names of all methods that can be asked for by name, those of installed packages included, sorted."""
    return sorted({*COMPRESSION_REGISTRY, *installed_methods()})


def resolve_method(
    spec: MethodSpec, method_params: Mapping[str, Any] = _NO_OPTIONS, *, allow_import: bool = True
) -> BaseCompressionMethod:
    """The configured method that `spec` and its options stand for.

    Args:
        spec: a `CompressionMethod`; a registered name in any case; "package.module:Class" or "file.py:Class"; a class;
            or an instance, whose options `method_params` then override.
        method_params: options, by field name.
        allow_import: False accepts only registered names and `CompressionMethod` (a server must not import what a
            request names).

    Raises:
        UnknownMethodError: there is no such method, or it cannot be loaded (the cause is chained).
        InvalidInputError: an option is unknown or has a wrong value.
    """
    if isinstance(spec, str):
        return _configure(_class_of_text(spec, allow_import), method_params)
    if not allow_import:
        raise UnknownMethodError(f"only names of registered methods are accepted here, not {spec!r}. {_choices()}")
    if isinstance(spec, BaseCompressionMethod):
        _check_options(type(spec), method_params)
        return _build(type(spec), lambda: replace(spec, **method_params)) if method_params else spec
    if isinstance(spec, type):
        _check_class(spec, repr(spec.__name__))
        return _configure(spec, method_params)
    raise UnknownMethodError(
        f"a method is a name, a CompressionMethod, 'module:Class', 'file.py:Class', or an instance, not {spec!r}. "
        + _choices()
    )


def _class_of_text(spec: str, allow_import: bool) -> type[BaseCompressionMethod]:
    name = (spec.value if isinstance(spec, CompressionMethod) else spec).strip()
    if name.lower() in COMPRESSION_REGISTRY:
        return COMPRESSION_REGISTRY[name.lower()]
    if ":" in name:
        if not allow_import:
            raise UnknownMethodError(f"only names of registered methods are accepted here, not {name!r}. {_choices()}")
        return _imported(name)
    point = installed_methods().get(name.lower())
    if point is None:
        close = difflib.get_close_matches(name.lower(), method_names(), n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        if name.endswith(".py"):
            hint = f" To load a class from a file, name both: {name}:ClassName."
        raise UnknownMethodError(f"unknown compression method {name!r}.{hint} {_choices()}")
    cls = load_entry_point(point)
    _check_class(cls, f"entry point {point.name!r}")
    COMPRESSION_REGISTRY[name.lower()] = cls
    if "name" not in vars(cls):
        cls.name = name.lower()
    return cls


def _imported(spec: str) -> type[BaseCompressionMethod]:
    """A class from a module or file. Names that a failing import registered are taken back."""
    before = dict(COMPRESSION_REGISTRY)
    try:
        cls = load_attribute(spec)
        _check_class(cls, repr(spec))
    except UnknownMethodError as error:
        if error.__cause__ is not None:
            COMPRESSION_REGISTRY.clear()
            COMPRESSION_REGISTRY.update(before)
        raise
    if "name" not in vars(cls):
        cls.name = spec
    return cls


def _configure(cls: type[BaseCompressionMethod], options: Mapping[str, Any]) -> BaseCompressionMethod:
    _check_options(cls, options)
    return _build(cls, lambda: cls(**options))


def _build(cls: type[BaseCompressionMethod], make: Callable[[], BaseCompressionMethod]) -> BaseCompressionMethod:
    try:
        return make()
    except InvalidInputError:
        raise
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"method {_label(cls)} cannot be made: {error}") from error


def _check_options(cls: type[BaseCompressionMethod], options: Mapping[str, Any]) -> None:
    known = [field.name for field in fields(cls) if field.init]
    for option in options:
        if option in known:
            continue
        close = difflib.get_close_matches(str(option), known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        if "__dataclass_fields__" not in vars(cls):
            hint += " (The class is not decorated with @dataclass(frozen=True, kw_only=True).)"
        raise InvalidInputError(
            f"method {_label(cls)} has no option {option!r}.{hint} Its options: {', '.join(known) or 'none'}"
        )


def _check_class(cls: Any, what: str, error: type[InvalidInputError] = UnknownMethodError) -> None:
    if not isinstance(cls, type) or not issubclass(cls, BaseCompressionMethod):
        raise error(f"{what} is not a subclass of compactor_vllm.compression.BaseCompressionMethod")
    if inspect.isabstract(cls) or cls is BaseCompressionMethod:
        raise error(f"{what} is not a method itself; name a subclass that scores")


def _label(cls: type[BaseCompressionMethod]) -> str:
    return repr(cls.name or cls.__name__)


def _choices() -> str:
    return f"Known methods: {', '.join(method_names())}"
