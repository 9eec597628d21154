from __future__ import annotations

import json
import pickle
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import compactor_vllm.compression as compression
from compactor_vllm.compression import (
    COMPRESSION_REGISTRY,
    BaseCompressionMethod,
    Compactor,
    CompressionMethod,
    NoCompression,
    SequenceCompressionParams,
    SnapKV,
    external,
    method_names,
    register,
    resolve_method,
)
from compactor_vllm.errors import InvalidInputError, UnknownMethodError

METHOD = """
from dataclasses import dataclass
from compactor_vllm.compression import BaseCompressionMethod, register

{decorator}
@dataclass(frozen=True, kw_only=True)
class Mine(BaseCompressionMethod):
    power: int = {power}

class Undecorated(BaseCompressionMethod):
    pass

class Other:
    pass
"""


@pytest.fixture(autouse=True)
def _registry_is_restored(monkeypatch: pytest.MonkeyPatch):
    before = dict(COMPRESSION_REGISTRY)
    monkeypatch.setattr(external, "_FILES", {})
    external.installed_methods.cache_clear()
    yield
    COMPRESSION_REGISTRY.clear()
    COMPRESSION_REGISTRY.update(before)
    external.installed_methods.cache_clear()


def write(path: Path, power: int = 2, decorator: str = "") -> str:
    path.write_text(METHOD.format(power=power, decorator=decorator))
    return f"{path}:Mine"


def test_members_index_the_registry() -> None:
    assert [COMPRESSION_REGISTRY[m] for m in CompressionMethod] == [Compactor, SnapKV, NoCompression]
    assert [cls.name for cls in COMPRESSION_REGISTRY.values()] == list(COMPRESSION_REGISTRY)


@pytest.mark.parametrize("spec", [CompressionMethod.SNAPKV, "snapkv", "SnapKV", " SNAPKV ", SnapKV, SnapKV()])
def test_every_spelling_of_a_builtin(spec: object) -> None:
    assert resolve_method(spec, {"window": 16}) == SnapKV(window=16)


def test_an_instance_keeps_its_options() -> None:
    instance = SnapKV(window=16)
    assert resolve_method(instance) is instance
    assert resolve_method(instance, {"pool": 7}) == SnapKV(window=16, pool=7)
    assert instance.pool == 5


def test_modules_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    spec = write(tmp_path / "own_module.py")
    by_file = resolve_method(spec, {"power": 3})
    by_module = resolve_method("own_module:Mine", {"power": 3})
    assert by_file.power == by_module.power == 3
    assert (by_file.name, by_module.name) == (spec, "own_module:Mine")
    assert type(by_file).__module__.startswith("compactor_vllm_method_")
    monkeypatch.delitem(sys.modules, "own_module")


def test_a_file_is_imported_once_until_it_changes(tmp_path: Path) -> None:
    spec = write(tmp_path / "mine.py", decorator='@register("mine")')
    first = resolve_method(spec)
    assert resolve_method(spec) == first and type(resolve_method("mine")) is type(first)
    write(tmp_path / "mine.py", power=44, decorator='@register("mine")')
    assert resolve_method(spec).power == resolve_method("MINE").power == 44


def test_two_files_of_one_name_are_two_modules(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one = resolve_method(write(tmp_path / "a" / "mine.py", power=1))
    two = resolve_method(write(tmp_path / "b" / "mine.py", power=2))
    assert (one.power, two.power) == (1, 2) and type(one) is not type(two)


@pytest.mark.parametrize(
    ("source", "cause", "message"),
    [
        ("def broken(:", SyntaxError, "SyntaxError"),
        ("import no_such_package_anywhere", ModuleNotFoundError, "no_such_package_anywhere"),
        ("raise RuntimeError('from the file')", RuntimeError, "from the file"),
        ("raise SystemExit(3)", SystemExit, "SystemExit"),
    ],
)
def test_errors_of_a_file_are_the_cause(tmp_path: Path, source: str, cause: type, message: str) -> None:
    path = tmp_path / "bad.py"
    path.write_text(METHOD.format(power=1, decorator='@register("halfway")') + source)
    with pytest.raises(UnknownMethodError, match=message) as caught:
        resolve_method(f"{path}:Mine")
    assert isinstance(caught.value.__cause__, cause)
    assert "halfway" not in COMPRESSION_REGISTRY
    assert not any(getattr(m, "__file__", None) == str(path) for m in list(sys.modules.values()))


def test_what_a_file_does_not_have(tmp_path: Path) -> None:
    spec = write(tmp_path / "mine.py", decorator='@register("by-name")')
    path = spec.removesuffix(":Mine")
    with pytest.raises(UnknownMethodError, match=r"no 'Nine'; its classes: Mine, Other, Undecorated$"):
        resolve_method(f"{path}:Nine")
    with pytest.raises(UnknownMethodError, match="not a subclass"):
        resolve_method(f"{path}:Other")
    with pytest.raises(UnknownMethodError, match="not a method itself"):
        resolve_method(f"{path}:BaseCompressionMethod")
    with pytest.raises(UnknownMethodError, match="no file"):
        resolve_method(f"{tmp_path / 'absent.py'}:Mine")
    with pytest.raises(UnknownMethodError, match=r"name both: .*mine\.py:ClassName"):
        resolve_method(path)
    with pytest.raises(UnknownMethodError, match="not of the form"):
        resolve_method(f"{path}:")
    with pytest.raises(UnknownMethodError, match="no_such_module"):
        resolve_method("no_such_module.x:Mine")
    with pytest.raises(InvalidInputError, match=r"no option 'power'.*not decorated with @dataclass"):
        resolve_method(f"{path}:Undecorated", {"power": 1})
    assert resolve_method("by-name") == resolve_method(spec)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(
        UnknownMethodError, match=r"'compacter'.*Did you mean 'compactor'.*compactor, expected_attention, keydiff"
    ):
        resolve_method("compacter")
    with pytest.raises(UnknownMethodError, match="a method is a name"):
        resolve_method(3)
    with pytest.raises(UnknownMethodError, match="not a subclass"):
        resolve_method(dict)


def test_options_are_checked_by_name_and_value() -> None:
    with pytest.raises(InvalidInputError, match=r"'snapkv' has no option 'windw'.*'window'.*head_floor, window, pool"):
        resolve_method("snapkv", {"windw": 3})
    with pytest.raises(InvalidInputError, match="no option 'pol'"):
        resolve_method(SnapKV(), {"pol": 3})
    with pytest.raises(InvalidInputError, match="window must be an integer >= 1, not '3'"):
        resolve_method("snapkv", {"window": "3"})
    with pytest.raises(InvalidInputError, match="window must be"):
        resolve_method(SnapKV(), {"window": 0})
    with pytest.raises(InvalidInputError, match="no option 'ratio'"):
        resolve_method("none", {"ratio": 0.5})


def test_errors_of_a_constructor_are_input_errors() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Needs(BaseCompressionMethod):
        size: int

        def __post_init__(self) -> None:
            if self.size < 0:
                raise ValueError("size is negative")

    with pytest.raises(InvalidInputError, match=r"'Needs' cannot be made: .*size"):
        resolve_method(Needs)
    with pytest.raises(InvalidInputError, match="size is negative"):
        resolve_method(Needs, {"size": -1})
    with pytest.raises(InvalidInputError, match="size is negative"):
        resolve_method(Needs(size=1), {"size": -1})


def test_a_server_accepts_registered_names_only(tmp_path: Path) -> None:
    spec = write(tmp_path / "mine.py")
    assert resolve_method("SnapKV", allow_import=False) == SnapKV()
    assert resolve_method(CompressionMethod.NONE, allow_import=False) == NoCompression()
    for refused in (spec, "os:path", SnapKV, SnapKV()):
        with pytest.raises(UnknownMethodError, match="only names of registered methods"):
            resolve_method(refused, allow_import=False)


def test_register_refuses_bad_names_and_duplicates() -> None:
    @register("own_method-2")
    @dataclass(frozen=True, kw_only=True)
    class Own(BaseCompressionMethod):
        pass

    assert Own.name == "own_method-2" and resolve_method("Own_Method-2") == Own()
    for name in ("", "Upper", "with space", "a:b", "2nd", None):
        with pytest.raises(InvalidInputError, match="a method name is"):
            register(name)
    with pytest.raises(InvalidInputError, match=r"'snapkv' is taken by compactor_vllm\.compression\.snapkv\.SnapKV"):
        register("snapkv")(Own)
    with pytest.raises(InvalidInputError, match="not a subclass"):
        register("fine")(dict)
    assert Own.name == "own_method-2" and "fine" not in COMPRESSION_REGISTRY


def test_defining_a_class_again_replaces_it() -> None:
    def define(power: int) -> None:
        @register("again")
        @dataclass(frozen=True, kw_only=True)
        class Again(BaseCompressionMethod):
            strength: int = power

    define(1)
    define(2)
    assert resolve_method("again").strength == 2


def test_entry_points_are_found_and_loaded_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    write(tmp_path / "installed_one.py", power=5)
    points = [
        EntryPoint("Packaged", "installed_one:Mine", external.ENTRY_POINT_GROUP),
        EntryPoint("broken", "no_such_module:Mine", external.ENTRY_POINT_GROUP),
        EntryPoint("wrong", "installed_one:Other", external.ENTRY_POINT_GROUP),
        EntryPoint("snapkv", "no_such_module:Mine", external.ENTRY_POINT_GROUP),
    ]
    monkeypatch.setattr(external, "entry_points", lambda group: points if group == external.ENTRY_POINT_GROUP else [])
    assert set(method_names()) == {*COMPRESSION_REGISTRY, "broken", "packaged", "wrong"}
    assert "installed_one" not in sys.modules
    method = resolve_method("packaged", allow_import=False)
    assert method.power == 5 and method.name == "packaged"
    assert COMPRESSION_REGISTRY["packaged"] is type(method)
    with pytest.raises(UnknownMethodError, match=r"'broken'.*no_such_module") as caught:
        resolve_method("broken")
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)
    with pytest.raises(UnknownMethodError, match="entry point 'wrong' is not a subclass"):
        resolve_method("wrong")
    assert resolve_method("snapkv") == SnapKV()
    monkeypatch.delitem(sys.modules, "installed_one")


def test_a_class_put_into_the_registry_by_hand_is_found() -> None:
    COMPRESSION_REGISTRY["by_hand"] = SnapKV
    assert resolve_method("By_Hand") == SnapKV()


def test_all_names_are_exported_lazily() -> None:
    assert set(compression.__all__) <= set(dir(compression))
    assert all(getattr(compression, name) is not None for name in compression.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        compression.Nothing  # noqa: B018


def test_parameters_are_made_without_importing_torch() -> None:
    code = (
        "import sys, json\n"
        "from compactor_vllm.compression.compression_params import SequenceCompressionParams\n"
        "SequenceCompressionParams(compression_ratio=0.5)\n"
        "from compactor_vllm.compression import BatchCompressionParams\n"
        "print(json.dumps([m for m in sys.modules if m in ('torch', 'numpy')]))"
    )
    source = str(Path(compression.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": source}, check=True
    )
    assert json.loads(done.stdout) == []


def test_parameters_survive_pickle():
    """Replicas and worker processes get them so."""
    given = SequenceCompressionParams(compression_ratio=0.5, method_params={"window": 8}, protected_ranges=((3, 5),))
    for params in (given, SequenceCompressionParams(protected_last_tokens=64)):
        again = pickle.loads(pickle.dumps(params))
        assert again == params
        assert again.last_tokens(question_follows=True) == params.last_tokens(question_follows=True)
    with pytest.raises(TypeError):
        pickle.loads(pickle.dumps(given)).method_params["window"] = 9
