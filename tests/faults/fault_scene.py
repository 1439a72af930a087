"""A place where real programs use flowfn, are ended in every way, and what they leave behind is counted.

Every process of a scene has a mark in its environment, which whatever it starts inherits, however it is daemonised.
Waiting is for events (a line of output, the end of a process), with one generous bound for a program that hangs.
"""

from __future__ import annotations

import fcntl
import os
import queue
import select
import signal
import subprocess
import sys
import textwrap
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

BOUND_S = float(os.environ.get("FLOW_TEST_BOUND_S", "60"))  # nothing here takes nearly as long, unless it hangs
STRESS = int(os.environ.get("FLOW_STRESS", "1"))  # how many times longer the random tests go on


class Result(NamedTuple):
    """What a program said, and how it ended."""

    code: int
    out: str
    err: str


class Program:
    """A running program of a scene."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.pid = process.pid
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._out: list[str] = []
        self._err: list[str] = []
        self._threads = []
        for file, keep in ((process.stdout, self._out), (process.stderr, self._err)):
            if file is not None:
                thread = threading.Thread(target=self._read, args=(file, keep), daemon=True)
                thread.start()
                self._threads.append(thread)

    def _read(self, file: object, keep: list[str]) -> None:
        for line in file:  # type: ignore[attr-defined]
            keep.append(line)
            if keep is self._out:
                self._lines.put(line.rstrip("\n"))
        if keep is self._out:
            self._lines.put(None)
        file.close()  # type: ignore[attr-defined]

    def expect(self, prefix: str) -> str:
        """Wait for a line that starts with `prefix`; what comes after the prefix."""
        deadline = time.monotonic() + BOUND_S
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"no line {prefix!r} in {BOUND_S} s\n{self.said()}{stacks(self.pid)}") from None
            if line is None:
                self.process.wait(BOUND_S)
                raise AssertionError(f"ended without a line {prefix!r}\n{self.said()}")
            if line.startswith(prefix):
                return line[len(prefix) :].strip()

    def tell(self, line: str) -> None:
        """Send a line to the program's standard input."""
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to the program, and to nothing else."""
        os.kill(self.pid, number)

    def end(self) -> Result:
        """Wait until it has ended."""
        try:
            code = self.process.wait(BOUND_S * STRESS)
        except subprocess.TimeoutExpired:
            where = stacks(self.pid)
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"still running after {BOUND_S * STRESS:g} s\n{self.said()}{where}") from None
        self.close()
        for thread in self._threads:
            thread.join(BOUND_S)
            assert not thread.is_alive(), f"something that it left behind still holds its output\n{self.said()}"
        return Result(code, "".join(self._out), "".join(self._err))

    def close(self) -> None:
        """Let go of its standard input."""
        if self.process.stdin is not None:
            try:
                self.process.stdin.close()
            except BrokenPipeError:
                pass

    def said(self) -> str:
        """What it printed, for messages."""
        return f"--- stdout\n{''.join(self._out)[-4000:]}\n--- stderr\n{''.join(self._err)[-4000:]}\n"


class Scene:
    """A FLOW_HOME, FLOW_CACHE and TMPDIR of its own, and all processes that were started with them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.home, self.cache, self.tmp = root / "home", root / "cache", root / "tmp"
        for path in (self.home, self.cache, self.tmp):
            path.mkdir(mode=0o700)
        self.mark = f"FLOW_TEST_SCENE={uuid.uuid4().hex}"
        self._shm_before = _shm()
        self._scripts = 0
        self.programs: list[Program] = []

    def environ(self, extra: Mapping[str, str] = {}) -> dict[str, str]:
        env = {name: value for name, value in os.environ.items() if not name.startswith(("FLOW_", "COV_"))}
        name, _, value = self.mark.partition("=")
        return {
            **env,
            name: value,
            "FLOW_HOME": str(self.home),
            "FLOW_CACHE": str(self.cache),
            "TMPDIR": str(self.tmp),
            "PYTHONUNBUFFERED": "1",
            "PYTHONFAULTHANDLER": "",
            **extra,
        }

    def script(self, body: str) -> Path:
        """A program of that text."""
        self._scripts += 1
        path = self.root / f"script{self._scripts}.py"
        path.write_text(textwrap.dedent(body))
        return path

    def start(
        self,
        body: str,
        *args: object,
        env: Mapping[str, str] = {},
        python: str = sys.executable,
        options: Sequence[str] = ("-W", "error"),
        new_session: bool = False,
    ) -> Program:
        """Start a program; its standard input and output are pipes."""
        process = subprocess.Popen(
            [python, *options, str(self.script(body)), *map(str, args)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self.environ(env),
            text=True,
            errors="replace",
            cwd=self.root,
            start_new_session=new_session,
        )
        program = Program(process)
        self.programs.append(program)
        return program

    def run(self, body: str, *args: object, code: int | None = 0, **options: object) -> Result:
        """Run a program to its end; `code` is the status that it has to end with (None: any)."""
        program = self.start(body, *args, **options)  # type: ignore[arg-type]
        result = program.end()
        assert code is None or result.code == code, f"ended with {result.code}, not {code}\n{program.said()}"
        return result

    # what is left

    def processes(self) -> dict[int, str]:
        """The processes of the scene that have not ended, with what they are."""
        mark = self.mark.encode()
        found = {}
        for name in os.listdir("/proc"):
            if name.isdigit():
                try:
                    if mark in Path(f"/proc/{name}/environ").read_bytes().split(b"\0"):
                        found[int(name)] = Path(f"/proc/{name}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                except OSError:
                    pass
        return found

    def await_no_process(self) -> None:
        """Wait for the end of every process of the scene. Fails if one goes on."""
        deadline = time.monotonic() + BOUND_S
        while left := self.processes():
            for pid in left:
                try:
                    pidfd = os.pidfd_open(pid)
                except ProcessLookupError:
                    continue
                try:
                    poll = select.poll()
                    poll.register(pidfd, select.POLLIN)
                    ended = poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
                finally:
                    os.close(pidfd)
                assert ended, f"left behind: {left}\n{''.join(map(stacks, left))}"

    def check_nothing_left(self) -> None:
        """No process, shared memory, held lock or temporary file."""
        self.await_no_process()
        assert _shm() - self._shm_before == set()
        assert [str(path) for path in self.tmp.rglob("*")] == []
        assert self.held_locks() == []
        unfinished = [path for path in self.cache.rglob("*") if path.name.endswith((".part", ".tmp", ".partial"))]
        assert unfinished == []

    def held_locks(self) -> list[str]:
        """The files of home and cache that somebody has locked."""
        held = []
        for base in (self.home, self.cache):
            for path in base.rglob("*"):
                if path.is_file():
                    with open(path, "rb") as file:
                        try:
                            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        except BlockingIOError:
                            held.append(str(path))
        return held

    def close(self) -> None:
        """End what a failed test left."""
        for program in self.programs:
            if program.process.poll() is None:
                program.process.kill()
                program.process.wait()
            program.close()
        for pid in self.processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass


def _shm() -> set[str]:
    """Named shared memory that could be flowfn's or multiprocessing's."""
    try:
        return {name for name in os.listdir("/dev/shm") if name.startswith(("flow", "psm_", "pym-"))}
    except OSError:
        return set()


def stacks(pid: int) -> str:
    """Where the threads of a process are, if py-spy is there to say so."""
    tool = Path(sys.executable).with_name("py-spy")
    if not tool.exists():
        return ""
    shown = subprocess.run([str(tool), "dump", "--pid", str(pid)], capture_output=True, text=True, timeout=30)
    return f"--- stacks of {pid}\n{shown.stdout or shown.stderr}\n"


def memfds(pid: int) -> int:
    """How many pieces of anonymous shared memory a process has open."""
    count = 0
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            count += os.readlink(entry).startswith("/memfd:")
        except OSError:
            pass
    return count
