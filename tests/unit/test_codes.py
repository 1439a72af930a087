"""Simple functions travel as their code; all others are left to cloudpickle."""

from __future__ import annotations

import functools
import math
import pickle
import subprocess
import sys
import textwrap
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flowfn_runtime import codes

FACTOR = 3
PAIR = (1, ("a", b"b", None))
LIST = [1]
NOT_IMPORTED = types.ModuleType("not_imported")


def scaled(x: int, by: float = 2.0, *, more: str = "m") -> int:
    """Multiplied."""
    return sum(FACTOR * x for _ in range(1)) + math.floor(by) + len(more) + len(PAIR)


async def awaits() -> int:
    return FACTOR


def counts(n: int) -> Iterator[int]:
    yield from range(n)


def back(function: Any) -> Any:
    data = codes.dumps(function)
    assert data is not None
    return pickle.loads(data)


def test_a_function_comes_back_whole() -> None:
    there = back(scaled)
    assert there is not scaled and there(5) == scaled(5) == 20
    assert there(5, by=7.5, more="") == scaled(5, by=7.5, more="")
    for name in ("__name__", "__qualname__", "__module__", "__doc__", "__defaults__", "__kwdefaults__"):
        assert getattr(there, name) == getattr(scaled, name)
    assert there.__annotations__ == scaled.__annotations__
    assert there.__code__.co_filename == __file__  # which tracebacks show
    assert there.__globals__["__name__"] == __name__ and there.__globals__["math"] is math
    assert "LIST" not in there.__globals__  # it names no such thing


def test_every_kind_of_function_keeps_its_kind() -> None:
    assert list(back(counts)(3)) == [0, 1, 2]
    coroutine = back(awaits)()
    with pytest.raises(StopIteration) as stopped:
        coroutine.send(None)
    assert stopped.value.value == FACTOR
    assert back(lambda x: x + 1)(1) == 2


def test_its_globals_are_its_own() -> None:
    def counting() -> int:
        global COUNT
        COUNT += 1
        return COUNT

    counting = types.FunctionType(counting.__code__, {"COUNT": 0, "__name__": "apart"})
    one, other = back(counting), back(counting)
    assert (one(), one(), other()) == (1, 2, 1)
    assert counting.__globals__["COUNT"] == 0


def not_simple() -> list[Callable[..., Any]]:
    value = 1

    def with_attribute() -> None: ...

    with_attribute.x = 1  # type: ignore[attr-defined]

    def of_a_list(x: Any = None) -> Any:
        return LIST

    def default_list(x: Any = []) -> None: ...  # noqa: B006

    def odd_annotation(x: Path) -> None: ...

    odd_annotation.__annotations__["x"] = Path  # not the text of it

    @functools.wraps(with_attribute)
    def wrapper() -> None: ...

    return [
        lambda: value,
        lambda: LIST,
        lambda: pytest.mark,  # a package
        lambda: NOT_IMPORTED,
        lambda: scaled,
        with_attribute,
        of_a_list,
        default_list,
        odd_annotation,
        wrapper,
        math.sqrt,
        functools.partial(scaled, 1),
        Path,
    ]


@pytest.mark.parametrize("number", range(len(not_simple())))
def test_what_is_not_simple_is_left_alone(number: int) -> None:
    assert codes.dumps(not_simple()[number]) is None


def test_large_values_are_left_to_go_out_of_band() -> None:
    for value in ("x" * (1 << 17), b"x" * (1 << 17)):
        assert codes.dumps(types.FunctionType((lambda: BIG).__code__, {"BIG": value})) is None  # type: ignore[name-defined] # noqa: F821


def test_a_module_to_go_by_value_is_left_to_cloudpickle() -> None:
    import cloudpickle

    assert codes.dumps(scaled) is not None
    cloudpickle.register_pickle_by_value(math)
    try:
        assert codes.dumps(scaled) is None
    finally:
        cloudpickle.unregister_pickle_by_value(math)


def test_a_script_of_simple_functions_imports_no_cloudpickle(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
            import sys

            import flowfn as flow

            FACTOR = 2

            @flow.function
            def double(x: int) -> "tuple[int, bool]":
                return FACTOR * x, "cloudpickle" in sys.modules

            if __name__ == "__main__":
                assert double.remote(4) == (8, False)
                assert "cloudpickle" not in sys.modules and "inspect" not in sys.modules
        """)
    )
    # Without `site`: some packages' .pth files import things, and here only what flowfn imports counts.
    paths = f"import sys; sys.path += {sys.path!r}; sys.argv = [{str(script)!r}]; "
    run = "import __main__; exec(compile(open(sys.argv[0]).read(), sys.argv[0], 'exec'), vars(__main__))"
    subprocess.run([sys.executable, "-S", "-c", paths + run], check=True, timeout=60)
