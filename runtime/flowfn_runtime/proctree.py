"""Starting, awaiting and ending the process trees of one supervisor.

The supervisor is made the "subreaper" of all its descendants: whatever they orphan becomes its child, so that when it
has no children left, nothing of theirs is left. It sleeps in poll(2) and is woken by signals, never by a timer of its
own but for deadlines.
"""

from __future__ import annotations

import _thread
import os
import select
import signal
import time
from collections.abc import Callable, Mapping

from . import limits


class Wakeup:
    """Signals as events: SIGCHLD and SIGTERM end a `sleep`, and SIGTERM (or SIGINT) sets `asked`."""

    def __init__(self) -> None:
        self.asked = False
        self._read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, self._on_term)
        signal.signal(signal.SIGINT, self._on_term)

    def _on_term(self, _number: int, _frame: object) -> None:
        self.asked = True

    def sleep(self, until: float | None, other: int | None = None) -> None:
        """Sleep until a signal comes, the monotonic clock says `until`, or the descriptor `other` has something."""
        poll = select.poll()
        poll.register(self._read, select.POLLIN)
        if other is not None:
            poll.register(other, select.POLLIN)
        timeout_ms = None if until is None else max(0.0, until - time.monotonic()) * 1000
        if timeout_ms is not None:
            timeout_ms = min(timeout_ms + 1, 2**31 - 1)
        if poll.poll(timeout_ms):
            try:
                os.read(self._read, 4096)
            except BlockingIOError:
                pass

    def wait_for(self, work: Callable[[], None]) -> bool:
        """Do `work` in a thread; True when it is done, False as soon as `asked` is set: it is left to itself then.

        What it raises is raised here.
        """
        raised: list[BaseException] = []
        done, finished = os.pipe2(os.O_CLOEXEC)

        def run() -> None:
            try:
                work()
            except BaseException as error:
                raised.append(error)
            finally:
                os.close(finished)  # the other end has something to say: that this one is closed

        _thread.start_new_thread(run, ())
        poll = select.poll()
        poll.register(done, select.POLLIN)
        while not self.asked:
            if poll.poll(0):
                os.close(done)
                if raised:
                    raise raised[0]
                return True
            self.sleep(None, done)
        return False


# Ends what bears a mark in its environment when its standard input ends: when it is told so, or who started it is dead.
# What such a process starts meanwhile has the mark as well.
_GUARD = r"""trap "" TERM HUP INT
read -r _
left=64
while [ $left -gt 0 ] && found=$(grep -slz "^$0\$" /proc/[0-9]*/environ); [ -n "$found" ]; do
  for path in $found; do path=${path#/proc/}; kill -9 ${path%/environ}; done
  left=$((left - 1))
done 2>/dev/null
"""


class Guard:
    """A shell's program that runs when this process wants it or ends, however it does: it reads its standard input."""

    def __init__(self, *words: str) -> None:
        read, self._write = os.pipe()
        try:
            actions = [(os.POSIX_SPAWN_DUP2, read, 0)]
            program = ["/bin/sh", "-c", *words]
            self.pid = os.posix_spawn(program[0], program, os.environ, file_actions=actions, setsid=True)
        finally:
            os.close(read)

    def close(self) -> None:
        """Have it run now; returns when it is done."""
        os.close(self._write)
        try:
            os.waitpid(self.pid, 0)
        except ChildProcessError:
            pass


def guard_marked(mark: str) -> Guard:
    """Sees to it that all processes with `mark` ("NAME=value") in their environment end with this one.

    For a supervisor whose processes are in no sandbox that would.
    """
    return Guard(_GUARD, mark)


def start(argv: list[str], env: Mapping[str, str], *, stdin: int, stdout: int, stderr: int) -> int:
    """Start a program from this thread (which must live as long as the program may); return its process id.

    Inheritable descriptors are inherited. It gets default signal handlers: Python ignores SIGPIPE, programs don't
    expect that.
    """
    actions = [(os.POSIX_SPAWN_DUP2, fd, target) for target, fd in enumerate((stdin, stdout, stderr))]
    defaults = [signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP]
    return os.posix_spawnp(argv[0], argv, env, file_actions=actions, setsigdef=defaults, setsigmask=[])


def reap() -> dict[int, int]:
    """Exit statuses (negative: the signal) of the children that have ended since, by process id; doesn't wait."""
    ended: dict[int, int] = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid == 0:
            return ended
        ended[pid] = os.waitstatus_to_exitcode(status)


def reap_all(others: set[int]) -> None:
    """Wait until no child, own or adopted, is left but `others`."""
    while left := [pid for pid in limits.children_of(os.getpid()) if pid not in others]:
        for pid in left:
            try:
                os.waitpid(pid, 0)
            except ChildProcessError:
                pass


def signal_tree(pid: int, number: int, *, skip: Callable[[int], bool]) -> None:
    """Send a signal to every process below `pid` but those that `skip` names."""
    for process in limits.descendants(pid):
        if not skip(process):
            send(process, number)


def send(pid: int, number: int) -> None:
    """Send a signal to a process that may be gone already."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def is_namespace_init(pid: int) -> bool:
    """True if the process is number 1 of a process namespace below ours: its death takes all others with it."""
    try:
        with open(f"/proc/{pid}/status") as file:
            numbers = next((line.split()[1:] for line in file if line.startswith("NSpid:")), [])
    except OSError:
        return False
    return len(numbers) > 1 and numbers[-1] == "1"
