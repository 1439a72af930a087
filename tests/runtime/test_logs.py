"""Output of calls as people see it: on a terminal, in a pipe, in a notebook's stream."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest

import flowfn as flow

WAIT_S = 60.0


def on_a_terminal(code: str, tmp_path: Path) -> str:
    """What a script shows on a terminal."""
    (tmp_path / "script.py").write_text(textwrap.dedent(code))
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "script.py"], stdin=slave, stdout=slave, stderr=slave, cwd=tmp_path, start_new_session=True
    )
    os.close(slave)
    seen = bytearray()

    def read() -> None:
        try:
            while data := os.read(master, 65536):
                seen.extend(data)
        except OSError:
            pass

    reader = threading.Thread(target=read)
    reader.start()
    assert process.wait(WAIT_S) == 0, seen.decode()
    reader.join(WAIT_S)
    os.close(master)
    return seen.decode().replace("\r\n", "\n")


def in_a_pipe(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=WAIT_S)


CODE = """
    import flowfn as flow, sys

    @flow.function(max_workers=2)
    def f(n):
        print("line", n)
        print("error", n, file=sys.stderr)
        return n

    print("result", f.remote(1))
    print("results", list(f.map([2, 3])))
"""


def test_a_terminal_says_whose_line_it_is(tmp_path: Path) -> None:
    shown = on_a_terminal(CODE, tmp_path)
    plain = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", shown)
    assert len(re.findall(r"^\[f#\d+ local pid \d+\] (line|error) [123]$", plain, re.M)) == 6, plain
    assert "result 1\n" in plain and "results [2, 3]\n" in plain


def test_a_pipe_has_the_output_and_nothing_else() -> None:
    ran = in_a_pipe(CODE)
    lines = ran.stdout.splitlines()
    assert lines[:2] == ["line 1", "result 1"] and sorted(lines[2:]) == ["line 2", "line 3", "results [2, 3]"]
    assert sorted(ran.stderr.splitlines()) == ["error 1", "error 2", "error 3"]


def test_a_long_map_has_a_bar_on_a_terminal_only(tmp_path: Path) -> None:
    code = """
        import flowfn as flow, time

        @flow.function(max_workers=1)
        def sweep(n):
            time.sleep(0.15)
            return n

        print(sum(sweep.map(range(8))))
    """
    shown = on_a_terminal(code, tmp_path)
    assert "sweep" in shown and "8/8" in shown and "28\n" in shown
    ran = in_a_pipe(code)
    assert ran.stdout == "28\n" and ran.stderr == ""


def test_without_a_standard_output() -> None:
    ran = in_a_pipe(
        """
        import sys
        sys.stdout.close(); sys.stdout = None
        import flowfn as flow
        future = flow.function(lambda: print("kept")).spawn()
        future.result()
        print(future.logs(), end="", file=sys.stderr)
        """
    )
    assert ran.stderr == "kept\n" and ran.returncode == 0


def test_into_any_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """A notebook's, a test runner's: something with a `write`."""
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    flow.function(lambda: print("into a stream")).remote()
    assert stream.getvalue() == "into a stream\n"


def test_characters_survive_however_they_are_cut() -> None:
    def prints() -> None:
        import os

        data = ("☃" * 50_000 + "\n").encode()
        for start in range(0, len(data), 10_001):
            os.write(1, data[start : start + 10_001])

    future = flow.function(prints).spawn()
    future.result(WAIT_S)
    assert future.logs() == "☃" * 50_000 + "\n"


def test_standard_error_and_output_are_in_the_order_of_their_writes_each() -> None:
    def prints() -> None:
        for n in range(200):
            print("out", n)
            print("err", n, file=sys.stderr)

    future = flow.function(prints).spawn()
    future.result(WAIT_S)
    lines = future.logs().splitlines()
    for name in ("out", "err"):
        assert [line for line in lines if line.startswith(name)] == [f"{name} {n}" for n in range(200)]


def test_a_flood_does_not_block_the_function() -> None:
    def floods() -> int:
        import os

        for _ in range(400):
            os.write(1, b"x" * 65536)
        return 5

    assert flow.function(floods).remote() == 5


def test_loggers_and_warnings_of_the_function() -> None:
    def logs() -> None:
        import logging
        import warnings

        logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
        logging.info("from a logger")
        warnings.simplefilter("always")
        warnings.warn("from a warning", stacklevel=1)

    future = flow.function(logs).spawn()
    future.result(WAIT_S)
    assert "from a logger\n" in future.logs() and "from a warning" in future.logs()


def test_threads_that_print_after_the_call_is_over() -> None:
    """Their output is shown, and is nobody's."""

    def starts() -> int:
        import threading
        import time

        def later() -> None:
            time.sleep(0.2)
            print("too late")

        threading.Thread(target=later, daemon=True).start()
        return 1

    def waits() -> str:
        import time

        time.sleep(0.5)
        return "next"

    options: dict[str, Any] = {"max_workers": 1, "env": {"S": "late"}}
    future = flow.function(**options)(starts).spawn()
    assert future.result(WAIT_S) == 1
    assert flow.function(**options)(waits).remote() == "next"
    assert "too late" not in future.logs()


def test_tracebacks_of_the_worker_itself_are_not_the_users() -> None:
    """An error of the function is raised, and printed nowhere."""

    def fails() -> None:
        raise ValueError("raised")

    future = flow.function(fails).spawn()
    assert isinstance(future.exception(WAIT_S), ValueError) and future.logs() == ""


def test_sys_stdout_of_one_call_is_not_that_of_the_next() -> None:
    def replaces() -> None:
        import io

        sys.stdout = io.StringIO()
        print("swallowed")

    options: dict[str, Any] = {"max_workers": 1, "env": {"S": "replaced"}}
    flow.function(**options)(replaces).remote()
    future = flow.function(**options)(lambda: print("heard")).spawn()
    future.result(WAIT_S)
    assert future.logs() == "heard\n"


def test_closed_descriptors_of_one_call_are_back_for_the_next() -> None:
    def closes() -> None:
        os.close(1)

    options: dict[str, Any] = {"max_workers": 1, "env": {"S": "closed"}}
    flow.function(**options)(closes).remote()
    future = flow.function(**options)(lambda: print("heard")).spawn()
    future.result(WAIT_S)
    assert future.logs() == "heard\n"
