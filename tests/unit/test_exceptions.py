"""Exceptions taken apart and put together again, in one process; tests/contract sends them to another."""

from __future__ import annotations

import sys
import threading
import traceback
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowfn_runtime import exceptions
from flowfn_runtime.errors import DataNotFound, FlowError, OutOfMemory, RemoteError, WorkerLost


def there_and_back(error: BaseException) -> BaseException:
    payload = exceptions.dumps(error)
    return exceptions.loads(bytes(payload.data), payload.buffers)


def raised(error: BaseException) -> BaseException:
    """The error with a traceback."""
    try:
        raise error
    except BaseException as caught:
        return caught


VALUES = st.none() | st.integers() | st.text() | st.binary() | st.lists(st.integers())


@given(st.sampled_from([ValueError, KeyError, RuntimeError, OSError, AssertionError]), st.lists(VALUES, max_size=4))
def test_arguments(kind: type[BaseException], args: list[Any]) -> None:
    error = kind(*args)
    back = there_and_back(error)
    assert type(back) is type(error) and back.args == error.args and str(back) == str(error)


@given(st.dictionaries(st.text("abc_", min_size=1), VALUES))
def test_attributes(attributes: dict[str, Any]) -> None:
    error = ValueError("x")
    error.__dict__.update(attributes)
    assert there_and_back(error).__dict__ == attributes


class Odd(Exception):
    """As people write them: the constructor wants what `args` does not hold."""

    def __init__(self, *, response: str, code: int) -> None:
        super().__init__(f"{code}: {response}")
        self.response = response
        self.code = code


class Slots(Exception):
    __slots__ = ("code",)

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code

    def __reduce__(self) -> Any:
        return Slots, (self.args[0], self.code)


class Stated(Exception):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.count = 0

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state)
        self.restored = True


class OddOs(OSError):
    def __init__(self, path: str) -> None:
        super().__init__(2, "no such thing", path)
        self.path = path


class New(Exception):
    def __new__(cls, *args: Any) -> New:
        if not args:
            raise TypeError("New needs arguments")
        return super().__new__(cls, *args)


def test_constructors_of_all_sorts() -> None:
    odd = there_and_back(Odd(response="gone", code=410))
    assert type(odd) is Odd and odd.args == ("410: gone",) and (odd.response, odd.code) == ("gone", 410)
    slots = there_and_back(Slots("m", 5))
    assert type(slots) is Slots and slots.code == 5
    os_error = there_and_back(OddOs("/x"))
    assert type(os_error) is OddOs and (os_error.errno, os_error.filename, os_error.path) == (2, "/x", "/x")
    new = there_and_back(New(1, 2))
    assert type(new) is New and new.args == (1, 2)
    assert type(there_and_back(Stated("x"))) is Stated


def test_what_c_keeps_of_an_exception() -> None:
    with pytest.raises(ModuleNotFoundError) as missing:
        import no_such_module_here  # type: ignore[import-not-found]  # noqa: F401
    back = there_and_back(missing.value)
    assert isinstance(back, ModuleNotFoundError) and back.name == "no_such_module_here"
    with pytest.raises(UnicodeEncodeError) as encode:
        "é".encode("ascii")
    back = there_and_back(encode.value)
    assert isinstance(back, UnicodeEncodeError) and (back.start, back.reason) == (0, encode.value.reason)
    stop = there_and_back(StopIteration(7))
    assert isinstance(stop, StopIteration) and stop.value == 7
    syntax = there_and_back(SyntaxError("bad", ("f.py", 3, 4, "x = =")))
    assert isinstance(syntax, SyntaxError) and (syntax.filename, syntax.lineno, syntax.text) == ("f.py", 3, "x = =")


def test_flowfn_errors_keep_what_they_know() -> None:
    memory = OutOfMemory("over", hint="use less")
    memory.limit_bytes, memory.peak_bytes, memory.exitcode = 5, 6, -9
    back = there_and_back(memory)
    assert isinstance(back, OutOfMemory) and (back.limit_bytes, back.peak_bytes, back.exitcode) == (5, 6, -9)
    assert str(back) == "over\n  hint: use less"
    data = there_and_back(DataNotFound("gone", url="s3://b/k"))
    assert isinstance(data, DataNotFound) and isinstance(data, FileNotFoundError) and data.url == "s3://b/k"


def test_the_names_of_the_classes_for_retries() -> None:
    assert exceptions.type_names(KeyError()) == [
        "builtins.KeyError",
        "builtins.LookupError",
        "builtins.Exception",
        "builtins.BaseException",
    ]
    assert "flowfn_runtime.errors.WorkerLost" in exceptions.type_names(OutOfMemory())


# what hangs on an exception


def test_causes_contexts_and_their_suppression() -> None:
    def fail() -> None:
        try:
            try:
                raise KeyError("first")
            except KeyError:
                raise ValueError("second")  # noqa: B904
        except ValueError as error:
            raise RuntimeError("third") from error

    with pytest.raises(RuntimeError) as caught:
        fail()
    back = there_and_back(caught.value)
    assert isinstance(back.__cause__, ValueError) and isinstance(back.__cause__.__context__, KeyError)
    assert back.__context__ is back.__cause__ and back.__suppress_context__
    assert not back.__cause__.__suppress_context__


def test_a_chain_that_bites_its_tail() -> None:
    one, other = ValueError("one"), KeyError("other")
    one.__context__, other.__cause__ = other, one
    back = there_and_back(one)
    assert isinstance(back.__context__, KeyError) and back.__context__.__cause__ is back


def test_a_very_long_chain_is_cut() -> None:
    error = first = ValueError(0)
    for number in range(1, 500):
        new = ValueError(number)
        error.__context__ = new
        error = new
    length = 0
    back: BaseException | None = there_and_back(first)
    while back is not None:
        length += 1
        back = back.__context__
    assert 10 <= length < 500


def test_the_traceback_is_a_real_one() -> None:
    def inner() -> None:
        raise ValueError("here")

    def outer() -> None:
        inner()

    with pytest.raises(ValueError) as caught:
        outer()
    back = there_and_back(caught.value)
    frames = traceback.extract_tb(back.__traceback__)
    assert [frame.name for frame in frames][-2:] == ["outer", "inner"]
    assert frames[-1].line == 'raise ValueError("here")'
    skipped = exceptions.loads(exceptions.dumps(caught.value, skip_frames=1).data)
    assert len(traceback.extract_tb(skipped.__traceback__)) == len(frames) - 1
    with pytest.raises(ValueError) as again:
        raise back
    assert [frame.name for frame in traceback.extract_tb(again.value.__traceback__)][-2:] == ["outer", "inner"]


def test_notes() -> None:
    error = ValueError("x")
    error.__notes__ = ["one", "two"]
    assert there_and_back(error).__notes__ == ["one", "two"]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exception groups came with Python 3.11")
def test_groups() -> None:
    group: Any = vars(sys.modules["builtins"])["ExceptionGroup"]
    base: Any = vars(sys.modules["builtins"])["BaseExceptionGroup"]

    class Mine(group):  # type: ignore[misc]
        def derive(self, excs: Any) -> Any:
            return Mine(self.message, excs)

    error = group("outer", [raised(ValueError(1)), Mine("inner", [Odd(response="r", code=2), OSError(5, "io")])])
    error.__notes__ = ["a note"]
    back: Any = there_and_back(raised(error))
    assert type(back) is group and back.message == "outer" and back.__notes__ == ["a note"]
    first, inner = back.exceptions
    assert first.args == (1,) and first.__traceback__ is not None
    assert type(inner).__name__ == "Mine" and inner.exceptions[0].code == 2 and inner.exceptions[1].errno == 5
    stop: Any = there_and_back(base("stop", [KeyboardInterrupt(), ValueError()]))
    assert isinstance(stop, BaseException) and len(stop.exceptions) == 2  # type: ignore[attr-defined]
    locked: Any = there_and_back(group("locked", [ValueError(threading.Lock())]))
    assert type(locked) is group and isinstance(locked.exceptions[0], RemoteError)


# what can't be had


def test_attributes_that_can_not_be_pickled_are_noted() -> None:
    error = ValueError("x")
    error.kept, error.lock = 1, threading.Lock()  # type: ignore[attr-defined]
    back: Any = there_and_back(error)
    assert back.kept == 1 and not hasattr(back, "lock") and "lock" in back.__notes__[0]


class Unruly(Exception):
    def __reduce__(self) -> Any:
        return Unruly, ()  # loses its arguments

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)


class Never(Exception):
    def __reduce_ex__(self, _: Any) -> Any:
        raise RuntimeError("no")


class NoText(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


class Liar(Exception):
    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return KeyError


def test_what_pickle_would_change_is_kept() -> None:
    back = there_and_back(Unruly("a", 1))
    assert type(back) is Unruly and back.args == ("a", 1)
    back = there_and_back(Never("b"))
    assert type(back) is Never and back.args == ("b",)


def test_what_can_not_be_rebuilt() -> None:
    back = there_and_back(raised(ValueError("has", threading.Lock())))
    assert isinstance(back, RemoteError) and back.type_name == "builtins.ValueError" and "lock" in str(back)
    assert "raised" in "".join(traceback.format_exception(back))
    for hopeless in (NoText(threading.Lock()), Liar(threading.Lock()), Never(threading.Lock())):
        assert isinstance(there_and_back(hopeless), FlowError)
    assert isinstance(there_and_back(NoText("text")), NoText)


def test_a_class_that_is_not_here() -> None:
    namespace: dict[str, Any] = {"__name__": "module_of_the_other_side"}
    module = type(sys)("module_of_the_other_side")
    exec("class Theirs(Exception): pass", module.__dict__)
    del namespace
    sys.modules["module_of_the_other_side"] = module
    try:
        payload = exceptions.dumps(module.Theirs("message"))
    finally:
        del sys.modules["module_of_the_other_side"]
    back = exceptions.loads(payload.data)
    assert isinstance(back, RemoteError) and back.type_name == "module_of_the_other_side.Theirs"
    assert "message" in str(back)


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit()])
def test_what_would_end_the_client_is_only_told(error: BaseException) -> None:
    back = there_and_back(error)
    assert isinstance(back, RemoteError) and type(error).__name__ in str(back)


def test_a_cause_that_can_not_be_rebuilt() -> None:
    error = ValueError("outer")
    error.__cause__ = KeyError(threading.Lock())
    back = there_and_back(error)
    assert type(back) is ValueError and isinstance(back.__cause__, RemoteError)


def test_of_an_exception_that_came_from_afar_already() -> None:
    """A function that calls another one passes its error on."""
    once = there_and_back(raised(Odd(response="r", code=1)))
    twice = there_and_back(raised(once))
    assert type(twice) is Odd and twice.code == 1
    lost = WorkerLost("gone")
    lost.exitcode = 5
    again = there_and_back(there_and_back(lost))
    assert isinstance(again, WorkerLost) and again.exitcode == 5
