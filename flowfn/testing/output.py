"""Cases: what functions print."""

from __future__ import annotations

import queue
import sys
from typing import Any

import pytest

import flowfn as flow

from .base import WAIT_S, Contract


class _Lines:
    """A standard output whose reader can wait for what comes."""

    encoding = "utf-8"

    def __init__(self) -> None:
        self.written: queue.Queue[str] = queue.Queue()

    def write(self, text: str) -> int:
        self.written.put(text)
        return len(text)

    def flush(self) -> None: ...

    def isatty(self) -> bool:
        return False

    def wait_for(self, text: str) -> str:
        """All that came until `text` was in it."""
        seen = ""
        while text not in seen:
            seen += self.written.get(timeout=WAIT_S)
        return seen


class Logs(Contract):
    def test_print_and_standard_error(self) -> None:
        def f() -> int:
            import sys

            print("to stdout")
            print("to stderr", file=sys.stderr)
            return 1

        future = self.function(f).spawn()
        assert future.result(timeout=WAIT_S) == 1
        assert "to stdout\n" in future.logs() and "to stderr\n" in future.logs()

    def test_each_call_has_its_own(self) -> None:
        def f(n: int) -> None:
            print(f"<{n}>")

        function = self.function(f)
        futures = [function.spawn(n) for n in range(20)]
        for n, future in enumerate(futures):
            future.result(timeout=WAIT_S)
            assert future.logs() == f"<{n}>\n"

    def test_c_code_and_child_processes(self) -> None:
        def f() -> None:
            import ctypes
            import os
            import subprocess

            os.write(1, b"from a descriptor\n")
            libc = ctypes.CDLL(None)
            libc.puts(b"from C")
            libc.fflush(None)
            subprocess.run(["sh", "-c", "echo from a child; echo and its errors >&2"], check=True)

        future = self.function(f).spawn()
        future.result(timeout=WAIT_S)
        for text in ("from a descriptor", "from C", "from a child", "and its errors"):
            assert f"{text}\n" in future.logs()

    def test_output_comes_while_the_call_runs(self, monkeypatch: pytest.MonkeyPatch, meeting: Any) -> None:
        meet = meeting.meet

        def f() -> str:
            print("half way")
            meet().recv(1)
            return "done"

        lines = _Lines()
        monkeypatch.setattr(sys, "stdout", lines)
        future = self.function(f).spawn()
        lines.wait_for("half way\n")
        assert not future.done()
        met = meeting.next()
        assert "half way\n" in future.logs()
        met.let_go()
        assert future.result(timeout=WAIT_S) == "done"

    def test_a_map_shows_its_output(self, capfd: pytest.CaptureFixture[str]) -> None:
        def f(n: int) -> None:
            print(f"<item {n}>")

        list(self.function(f).map(range(30)))
        shown = capfd.readouterr().out
        assert sorted(shown.split("\n")[:-1]) == sorted(f"<item {n}>" for n in range(30))

    def test_binary_and_very_long_lines(self) -> None:
        def f() -> int:
            import os

            os.write(1, bytes(range(256)))
            print("x" * 200_000)
            print("y", end="")
            return 5

        future = self.function(f).spawn()
        assert future.result(timeout=WAIT_S) == 5
        assert "x" * 200_000 in future.logs() and future.logs().endswith("y")

    def test_very_much_output_keeps_its_ends(self) -> None:
        def f() -> int:
            print("the beginning")
            for _ in range(3_000):
                print("z" * 999)
            print("the end")
            return 5

        future = self.function(f).spawn()
        assert future.result(timeout=WAIT_S) == 5
        text = future.logs()
        assert text.startswith("the beginning\n") and text.endswith("the end\n")
        assert "left out" in text and len(text) < 2_000_000

    def test_of_calls_that_fail_and_of_each_attempt(self) -> None:
        def f() -> None:
            print("one more attempt")
            raise ValueError

        future = self.function(f, retries=flow.Retries(2, initial_delay=0)).spawn()
        assert isinstance(future.exception(timeout=WAIT_S), ValueError)
        assert future.logs().count("one more attempt\n") == 3

    def test_a_function_may_do_what_it_likes_with_its_streams(self) -> None:
        def closes(how: str) -> str:
            import io
            import os
            import sys

            if how == "close":
                sys.stdout.close()
            elif how == "replace":
                sys.stdout = io.StringIO()
            elif how == "descriptors":
                os.close(1)
                os.close(2)
            elif how == "range":
                os.closerange(3, 256)
            elif how == "stdin":
                return sys.stdin.read() + os.read(0, 10).decode()
            return how

        def plain() -> int:
            return 1

        for how in ("close", "replace", "descriptors", "range"):
            function = self.function(closes, max_workers=1, env={"HOW": how})
            assert function.remote(how) == how
            assert function.options(name="again").remote("x") == "x"
        assert self.function(closes).remote("stdin") == "", "a function has no input to wait for"
        assert self.function(plain).remote() == 1
