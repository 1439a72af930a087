"""Runs one durable task: awaits its turn, makes its sandboxes, keeps its log, and writes down how it ended.

Started by the client as `python -m flowfn_runtime.supervisor <dir> <lock fd> <spec fd>` in a session of its own, it
outlives the client and belongs to nobody. It holds the task's lock, which came with it from the client, until the very
end; the kernel lets go if it is killed, and readers know then that the task has failed. Its sandboxes die with it.

The whole spec comes through a descriptor, since it holds the values of `env` and credentials that no file may hold.
"""

from __future__ import annotations

import fcntl
import marshal
import os
import signal
import sys
import time
from typing import TYPE_CHECKING, Any

from . import limits, proctree, taskdir
from .errors import FlowError
from .proctree import Wakeup

if TYPE_CHECKING:
    from .tasknode import Nodes

GRACE_S = 10.0  # between SIGTERM and SIGKILL; FLOW_GRACE_S in the environment of who submits says otherwise


class Ended(Exception):
    """How the task ended: its state, why, and the command's exit code if there is one."""

    def __init__(self, state: str, reason: str = "", exit_code: int | None = None) -> None:
        super().__init__(state, reason)
        self.state, self.reason, self.exit_code = state, reason, exit_code


class Supervisor:
    """The way of one task from its submission to its outcome."""

    def __init__(self, directory: str, lock_fd: int, spec: dict[str, Any], *, terminal: bool = False) -> None:
        self.directory = directory
        self.spec = spec
        self.terminal = terminal  # the command's standard streams are this process's own
        self._lock_fd = lock_fd
        self._wakeup = Wakeup()
        self._started_at: float | None = None
        self._attempts = 0
        self._nodes: Nodes | None = None
        self._plain = spec["box"] == "plain"  # no sandbox that would end all that was started in it
        self._contained = isinstance(spec["box"], dict)  # its processes are the container engine's
        self._error: FlowError | None = None  # what a call's result is to raise, if not what its function did

    def run(self) -> Ended:
        """Take the task to its end; returns how it ended, which is also written down. Raises nothing."""
        try:
            # In this order: whoever asks to cancel leaves word first, then looks for the process to wake.
            taskdir.write_pid(self.directory)
            if taskdir.cancel_reason(self.directory) is not None:
                self._wakeup.asked = True
            self._nodes = nodes = self._make_nodes()
            # In a thread, since it may sleep in the kernel or download for long, while this one hears of signals. A
            # signal handler that raises an exception would do with less, and leave locks of the interpreter behind.
            if not self._wakeup.wait_for(lambda: self._get_ready(nodes)):
                self._nodes = None  # the thread's; what it holds goes with this process
                raise Ended("cancelled", self._cancel_reason())
            nodes.build()
            ended = self._attempt_until_done()
            if ended.state == "completed":
                nodes.commit()
        except Ended as outcome:
            ended = outcome
        except FlowError as error:
            ended = self._raised(error)
        except BaseException as error:
            import traceback

            _say(traceback.format_exc())
            ended = Ended("failed", f"the supervisor failed: {type(error).__name__}: {error}")
        self._finish(ended)
        return ended

    # -- before it runs

    def _make_nodes(self) -> Nodes:
        from .tasknode import Nodes

        return Nodes(self.directory, self.spec, terminal=self.terminal)

    def _get_ready(self, nodes: Nodes) -> None:
        self._await_turn()
        nodes.acquire(self._report)

    def _await_turn(self) -> None:
        # Asleep in the kernel at the lock of each task before this one, nearest first: as a rule that one ends last,
        # and then the locks of all others are free. Nobody is woken in vain.
        for task_id in self.spec["after"]:
            taskdir.wait_released(taskdir.task_dir(task_id))
            taskdir.wait_released(taskdir.task_dir(task_id), "tree")  # its processes too, if it was killed
        if not self.spec["depends_on"]:
            return
        from . import taskdb

        for task_id in self.spec["depends_on"]:
            taskdir.wait_released(taskdir.task_dir(task_id))
            row = taskdb.get(task_id)
            if row.state != taskdb.COMPLETED:
                raise Ended("failed", f"it depends on {row.name} ({row.id}), which {_verb(row.state)}")

    def _report(self, reason: str) -> None:
        """Say in the register what the task waits for."""
        self._record(reason=reason)

    def _record(self, **fields: Any) -> None:
        from . import taskdb

        taskdb.update(self.spec["id"], **fields)

    # -- while it runs

    def _attempt_until_done(self) -> Ended:
        delays = list(self.spec["retry_delays_s"])
        while True:
            ended = self._attempt()
            if ended.state != "failed" or ended.exit_code is None or not delays:
                return ended
            delay = delays.pop(0)
            self._note(f"attempt {self._attempts} failed ({ended.reason}); the next one starts in {delay:g} s")
            again = time.monotonic() + delay
            while not self._wakeup.asked and time.monotonic() < again:
                self._wakeup.sleep(again)
            if self._wakeup.asked:
                return Ended("cancelled", self._cancel_reason())

    def _attempt(self) -> Ended:
        nodes = self._nodes
        assert nodes is not None
        self._attempts += 1
        self._started_at = self._started_at or time.time()
        limits.set_subreaper()
        # What the staging left running, such as the server of a lazy mount.
        others = set(limits.children_of(os.getpid()))
        if nodes.guard is not None and self._attempts > 1:
            nodes.guard.remove()
        pids = nodes.start()
        longest = self.spec["max_run_time_s"]
        try:
            # After the start: the command runs while we write this down.
            self._record(state="running", reason="", started_at=self._started_at, attempts=self._attempts)
            taskdir.mark_started(self.directory)
        except (FlowError, OSError) as error:
            _say(str(error))  # the task runs all the same
        ended = self._watch(pids, None if not longest else time.monotonic() + longest)
        if self._plain:
            limits.kill_orphans(others)
        proctree.reap_all(others)
        limit = self.spec["memory_bytes"]
        if ended.state == "failed" and limit and nodes.guard is not None and nodes.guard.out_of_memory():
            return self._raised(_out_of_memory(limit))
        return ended

    def _watch(self, pids: list[int], deadline: float | None) -> Ended:
        """Until every node has ended: one that fails, the deadline, and a request to cancel end all others."""
        running, verdict, kill_at = set(pids), None, None
        memory = _Memory(self) if self.spec["memory_bytes"] and not self._contained else None
        while running:
            for pid, code in proctree.reap().items():
                if pid in running:
                    running.discard(pid)
                    if code != 0 and verdict is None:
                        verdict = _failure(code, pids.index(pid), len(pids))
            if not running:
                break
            now = time.monotonic()
            if self._wakeup.asked and (verdict is None or verdict.state != "cancelled"):
                verdict, deadline = Ended("cancelled", self._cancel_reason()), None
            elif deadline is not None and now >= deadline:
                verdict, deadline = self._too_long(), None
            if verdict is not None:
                if kill_at is None:
                    kill_at = now + self.spec["grace_s"]
                    for pid in running:
                        proctree.signal_tree(pid, signal.SIGTERM, skip=proctree.is_namespace_init)
                        if self._plain or self._contained:
                            proctree.send(pid, signal.SIGTERM)
                elif now >= kill_at:
                    for pid in running:
                        proctree.send(pid, signal.SIGKILL)  # the sandbox's own processes die with it
                    if self._nodes is not None and self._nodes.guard is not None:
                        self._nodes.guard.kill()
            if verdict is None and memory is not None:
                verdict = memory.check(running)
                if verdict is not None:
                    continue
            times = (deadline, kill_at, None if memory is None else memory.again)
            waits = [when for when in times if when is not None and when > now]
            self._wakeup.sleep(min(waits, default=None))
        return verdict or Ended("completed", "", 0)

    # -- after it ran

    def _cancel_reason(self) -> str:
        reason = taskdir.cancel_reason(self.directory)
        return reason if reason is not None else "its supervisor got SIGTERM"

    def _too_long(self) -> Ended:
        from .errors import FunctionTimeout

        limit = self.spec["max_run_time_s"]
        if self.spec["call"]:
            return self._raised(FunctionTimeout(f"the call ran longer than timeout={limit:g} s"))
        return Ended("failed", f"it ran longer than max_run_time_hours={limit / 3600:g}")

    def _raised(self, error: FlowError) -> Ended:
        """The task fails by an error of ours; who asks for a call's result gets that very error."""
        if self.spec["call"]:
            self._error = error
        return Ended("failed", str(error))

    def _keep_result(self) -> None:
        """Give the call's outcome its name, now that it is final."""
        part = os.path.join(self.directory, "result.part")
        if self._error is not None:
            from . import callfile, exceptions

            with open(part, "wb") as file:
                callfile.write(file.fileno(), callfile.ERROR, exceptions.dumps(self._error))
        if os.path.exists(part):
            os.replace(part, os.path.join(self.directory, "result"))

    def _note(self, text: str) -> None:
        if self._nodes is not None:
            self._nodes.note(text)

    def _finish(self, ended: Ended) -> None:
        outcome = {
            "state": ended.state,
            "reason": ended.reason,
            "exit_code": ended.exit_code,
            "started_at": self._started_at,
            "ended_at": time.time(),
            "attempts": self._attempts,
        }
        if ended.state == "failed" and ended.reason and self._attempts == 0:
            self._note(ended.reason)
        try:
            if self.spec["call"]:
                self._keep_result()
        except OSError as error:
            _say(f"the result can't be written: {error}")
        try:
            taskdir.write_outcome(self.directory, outcome)
        except OSError as error:
            _say(f"the outcome can't be written: {error}")
        if self._nodes is not None:
            self._nodes.close()
        taskdir.remove_tree(os.path.join(self.directory, "scratch"))
        try:
            self._record(**outcome)
        except FlowError as error:
            _say(str(error))  # whoever reads next settles it from the outcome
        fcntl.flock(self._lock_fd, fcntl.LOCK_UN)  # by name: a process forked by the client may have the same open file
        os.close(self._lock_fd)


class _Memory:
    """Looks after the memory limit of a task: the nodes' processes together, sampled."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._limit: int = supervisor.spec["memory_bytes"]
        self._peak = 0
        self.again = 0.0  # when to look again, by the monotonic clock

    def check(self, pids: set[int]) -> Ended | None:
        """How the task ends, if it is over its limit. Its processes are killed: they would only take more."""
        started = time.monotonic()
        used = sum(limits.tree_memory(pid, limit=self._limit) for pid in pids)
        self._peak = max(self._peak, used)
        now = time.monotonic()
        self.again = now + limits.sample_interval(used, self._limit, now - started)
        if used <= self._limit:
            return None
        for pid in pids:
            proctree.send(pid, signal.SIGKILL)
        return self._supervisor._raised(_out_of_memory(self._limit, self._peak))


def _out_of_memory(limit: int, peak: int | None = None) -> FlowError:
    from .errors import OutOfMemory

    mib = 2**20
    used = "it went over its" if peak is None else f"it used {peak / mib:.0f} MiB of memory, more than its"
    error = OutOfMemory(f"{used} {limit / mib:.0f} MiB")
    error.limit_bytes, error.peak_bytes = limit, peak
    return error


def _say(text: str) -> None:
    """Into supervisor.log; not with print, which would raise on a full disk."""
    try:
        os.write(2, f"flow: {text}\n".encode(errors="replace"))
    except OSError:
        pass


def _failure(code: int, rank: int, nodes: int) -> Ended:
    # A sandbox reports the signal that killed its command as a shell does.
    code = 128 - code if code < 0 else code
    where = f"node {rank} " if nodes > 1 else ""
    if code > 128:
        try:
            return Ended("failed", f"{where}killed by {signal.Signals(code - 128).name}", code)
        except ValueError:
            pass
    return Ended("failed", f"{where}exit code {code}", code)


def _verb(state: str) -> str:
    return {"failed": "failed", "cancelled": "was cancelled"}.get(state, f"is {state}")


def _close_all_but(kept: set[int]) -> None:
    """Close what the client leaked: an inherited pipe would keep somebody waiting as long as the task runs."""
    low = 3
    for fd in sorted(kept):
        os.closerange(low, fd)
        low = fd + 1
    os.closerange(low, max(low, os.sysconf("SC_OPEN_MAX")))


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `python -m flowfn_runtime.supervisor`."""
    directory, lock_fd, spec_fd = (arguments or sys.argv[1:])[:3]
    lock, source = int(lock_fd), int(spec_fd)
    _close_all_but({lock, source})
    os.set_inheritable(lock, False)
    with os.fdopen(source, "rb") as file:
        file.seek(0)
        spec = marshal.loads(file.read())  # written by the same Python, a moment ago
    os.chdir("/")
    os.umask(0o022)
    Supervisor(directory, lock, spec).run()
    os._exit(0)  # not waiting for a thread that still waits for the task's turn


if __name__ == "__main__":
    main()
