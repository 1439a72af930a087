"""Cases: exceptions, and what can't be pickled."""

from __future__ import annotations

import sys
import traceback
from typing import Any

import pytest

import flowfn as flow

from .base import WAIT_S, Contract, from_main


class Exceptions(Contract):
    def test_type_and_arguments(self) -> None:
        def fails() -> None:
            raise ValueError("seven", 7)

        with pytest.raises(ValueError) as caught:
            self.function(fails).remote()
        assert type(caught.value) is ValueError and caught.value.args == ("seven", 7)

    def test_attributes_of_classes_of_its_own(self) -> None:
        class QuotaError(RuntimeError):
            def __init__(self, message: str) -> None:
                super().__init__(message)
                self.left = 0

        def fails() -> None:
            error = QuotaError("used up")
            error.left = 3
            raise error

        with pytest.raises(QuotaError, match="used up") as caught:
            self.function(fails).remote()
        assert caught.value.left == 3

    def test_odd_constructors(self) -> None:
        class Odd(Exception):
            def __init__(self, *, code: int, where: str) -> None:
                super().__init__(f"{code} at {where}")
                self.code = code

        class Swapped(Exception):
            def __init__(self, first: str, second: str) -> None:
                super().__init__(second)
                self.first = first

        def fails(kind: Any, *args: Any, **kwargs: Any) -> None:
            raise kind(*args, **kwargs)

        function = self.function(fails)
        with pytest.raises(Odd, match="404 at here") as odd:
            function.remote(Odd, code=404, where="here")
        assert odd.value.code == 404
        with pytest.raises(Swapped, match=r"^b$") as swapped:
            function.remote(Swapped, "a", "b")
        assert swapped.value.first == "a"

    def test_exceptions_of_the_standard_library(self) -> None:
        def fails(which: str) -> None:
            import json

            if which == "os":
                open("/no/such/file")
            elif which == "unicode":
                b"\xff".decode()
            elif which == "json":
                json.loads("{")
            elif which == "key":
                dict[str, int]()["missing"]
            elif which == "import":
                import no_such_module_at_all  # type: ignore[import-not-found]  # noqa: F401
            elif which == "stop":
                raise StopIteration(5)

        function = self.function(fails)
        with pytest.raises(FileNotFoundError) as os_error:
            function.remote("os")
        assert os_error.value.filename == "/no/such/file" and os_error.value.errno == 2
        with pytest.raises(UnicodeDecodeError) as unicode_error:
            function.remote("unicode")
        assert unicode_error.value.object == b"\xff" and unicode_error.value.start == 0
        with pytest.raises(ValueError) as json_error:
            function.remote("json")
        assert type(json_error.value).__name__ == "JSONDecodeError" and json_error.value.pos == 1  # type: ignore[attr-defined]
        with pytest.raises(KeyError) as key_error:
            function.remote("key")
        assert key_error.value.args == ("missing",)
        with pytest.raises(ModuleNotFoundError) as import_error:
            function.remote("import")
        assert import_error.value.name == "no_such_module_at_all"
        with pytest.raises(StopIteration) as stop:
            function.remote("stop")
        assert stop.value.value == 5

    def test_cause_and_context(self) -> None:
        def fails(how: str) -> None:
            try:
                raise KeyError("inner")
            except KeyError as error:
                if how == "cause":
                    raise ValueError("outer") from error
                if how == "none":
                    raise ValueError("outer") from None
                raise ValueError("outer")  # noqa: B904

        function = self.function(fails)
        with pytest.raises(ValueError) as caused:
            function.remote("cause")
        assert type(caused.value.__cause__) is KeyError and caused.value.__cause__.args == ("inner",)
        with pytest.raises(ValueError) as hidden:
            function.remote("none")
        assert hidden.value.__cause__ is None and hidden.value.__suppress_context__
        with pytest.raises(ValueError) as during:
            function.remote("context")
        assert type(during.value.__context__) is KeyError and not during.value.__suppress_context__

    def test_notes(self) -> None:
        def fails() -> None:
            error = ValueError("with notes")
            error.__notes__ = ["first", "second"]
            raise error

        with pytest.raises(ValueError) as caught:
            self.function(fails).remote()
        assert caught.value.__notes__[:2] == ["first", "second"]

    @pytest.mark.skipif(sys.version_info < (3, 11), reason="exception groups came with Python 3.11")
    def test_exception_groups(self) -> None:
        def fails() -> None:
            import builtins

            group: Any = vars(builtins)["ExceptionGroup"]
            try:
                raise OSError(5, "inner")
            except OSError as error:
                raise group("all", [ValueError(1), group("some", [error, TypeError("x")])])  # noqa: B904

        with pytest.raises(Exception) as caught:
            self.function(fails).remote()
        group: Any = caught.value
        assert type(group).__name__ == "ExceptionGroup" and group.message == "all"
        first, inner = group.exceptions
        assert first.args == (1,) and [type(e) for e in inner.exceptions] == [OSError, TypeError]
        assert inner.exceptions[0].errno == 5
        assert group.split(TypeError)[0] is not None

    def test_the_remote_traceback_is_there(self) -> None:
        def fails() -> None:
            def deeper() -> None:
                raise ValueError("look at me")

            deeper()

        with pytest.raises(ValueError) as caught:
            self.function(fails).remote()
        frames = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
        assert frames[-2:] == ["fails", "deeper"]
        assert 'raise ValueError("look at me")' in "".join(traceback.format_exception(caught.value))

    def test_what_can_not_be_pickled_is_left_behind(self) -> None:
        def fails() -> None:
            import threading

            error = ValueError("locked")
            error.code = 3  # type: ignore[attr-defined]
            error.lock = threading.Lock()  # type: ignore[attr-defined]
            raise error

        with pytest.raises(ValueError, match="locked") as caught:
            self.function(fails).remote()
        assert caught.value.code == 3 and not hasattr(caught.value, "lock")  # type: ignore[attr-defined]
        assert any("lock" in note for note in caught.value.__notes__)

    def test_what_can_not_be_rebuilt_is_a_remote_error(self) -> None:
        def fails(how: str) -> None:
            import threading

            class Stubborn(Exception):
                def __reduce__(self) -> Any:
                    raise RuntimeError("no")

                def __str__(self) -> str:
                    return f"stubborn as {self.args[0]}"

            class Mute(Exception):
                def __str__(self) -> str:
                    raise RuntimeError("no text either")

            raise {
                "locked": Exception(threading.Lock()),
                "stubborn": Stubborn(threading.Lock()),
                "mute": Mute(threading.Lock()),
            }[how]

        function = self.function(fails)
        with pytest.raises(flow.RemoteError, match="lock") as locked:
            function.remote("locked")
        assert locked.value.type_name == "builtins.Exception"
        with pytest.raises(flow.RemoteError, match="stubborn as") as stubborn:
            function.remote("stubborn")
        assert stubborn.value.type_name.endswith("Stubborn")
        assert "fails" in "".join(traceback.format_exception(stubborn.value))
        with pytest.raises(flow.RemoteError):
            function.remote("mute")

    @pytest.mark.parametrize("how", ["SystemExit", "KeyboardInterrupt", "GeneratorExit", "BaseException"])
    def test_what_is_not_an_exception_of_the_usual_kind(self, how: str) -> None:
        """`sys.exit()` in a function ends neither the worker nor this process."""

        def fails(how: str) -> None:
            import builtins

            raise getattr(builtins, how)(3)

        function = self.function(fails, max_workers=1)
        expected = BaseException if how == "BaseException" else flow.RemoteError
        with pytest.raises(expected) as caught:
            function.remote(how)
        assert how in repr(caught.value)
        future = function.spawn(how)
        assert how in repr(future.exception(timeout=WAIT_S))

    def test_of_classes_of_main(self) -> None:
        here = from_main(
            "class Mine(Exception):\n"
            "    def __init__(self, a, b): super().__init__(a); self.b = b\n"
            "def run(): raise Mine(1, b=[2])\n"
        )
        with pytest.raises(here["Mine"]) as caught:
            self.function(here["run"]).remote()
        assert caught.value.args == (1,) and caught.value.b == [2]

    def test_the_worker_goes_on(self) -> None:
        def pid_or_fail(fail: bool) -> int:
            import os

            if fail:
                raise ValueError
            return os.getpid()

        function = self.function(pid_or_fail, max_workers=1)
        before = function.remote(False)
        for _ in range(3):
            with pytest.raises(ValueError):
                function.remote(True)
        assert function.remote(False) == before

    def test_of_a_future(self) -> None:
        def fails() -> None:
            raise ValueError("later")

        future = self.function(fails).spawn()
        error = future.exception(timeout=WAIT_S)
        assert type(error) is ValueError and future.status == "failed"
        with pytest.raises(ValueError, match="later"):
            future.result()

    def test_very_long_messages(self) -> None:
        def fails() -> None:
            raise ValueError("x" * 3_000_000)

        with pytest.raises(ValueError) as caught:
            self.function(fails).remote()
        assert len(caught.value.args[0]) == 3_000_000

    def test_recursion_without_end(self) -> None:
        def deeper(n: int) -> int:
            return deeper(n + 1) + 1

        function = self.function(deeper, max_workers=1)
        with pytest.raises(RecursionError):
            function.remote(0)


class Serialization(Contract):
    """What can't be pickled is an error at once, which names the culprit."""

    def test_an_argument_that_can_not_be_pickled(self) -> None:
        import threading

        def f(x: Any, y: Any = None) -> None: ...

        class Holder:
            def __init__(self) -> None:
                self.inner = {"lock": threading.Lock()}

        function = self.function(f)
        with pytest.raises(flow.SerializationError, match=r"argument y\.inner\['lock'\]") as caught:
            function.remote(1, y=Holder())
        assert isinstance(caught.value, TypeError)
        with pytest.raises(flow.SerializationError, match=r"argument x\[2\]"):
            function.spawn([0, 1, threading.Lock()])

    def test_a_result_that_can_not_be_pickled(self) -> None:
        def f() -> Any:
            import threading

            return {"a": [threading.Lock()]}

        function = self.function(f, retries=3)
        with pytest.raises(flow.SerializationError, match=r"the result\['a'\]\[0\]"):
            function.remote()

    def test_a_function_that_can_not_be_pickled(self) -> None:
        import threading

        lock = threading.Lock()

        def f() -> bool:
            return lock.locked()

        with pytest.raises(flow.SerializationError, match="'lock'"):
            self.function(f).remote()

    def test_an_argument_that_can_not_be_rebuilt(self) -> None:
        def f(x: Any) -> None: ...

        function = self.function(f, max_workers=1)
        with pytest.raises(flow.SerializationError, match="boom"):
            function.remote(from_main(_EXPLODING)["Bomb"]())
        assert function.remote(1) is None

    def test_a_result_that_can_not_be_rebuilt(self) -> None:
        here = from_main(_EXPLODING + "def f(where):\n    b = Bomb(); b.where = where\n    return b\n")
        function = self.function(here["f"], max_workers=1)
        with pytest.raises(flow.SerializationError, match="boom"):
            function.remote("client")
        future = function.spawn("client")
        assert isinstance(future.exception(timeout=WAIT_S), flow.SerializationError)


_EXPLODING = (
    "class Bomb:\n"
    "    def __reduce__(self):\n"
    "        return _explode, ('boom',)\n"
    "def _explode(text): raise ValueError(text)\n"
)
