"""One node of a task of several on Ray: what the actor there does, and the program that it starts (see `rayranks`).

The program is that of a rank under any engine (`taskjob`). It ends, with all that it has started, when the actor closes
a pipe, and so also when that is killed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

from . import limits, raytask, taskdir, taskjob, tasknode
from .watch import Watch

CHUNK_BYTES = 1 << 22
LOOK_S = 10.0
_BOOT = (
    "import sys; sys.path[:] = [p for p in sys.path if p]; sys.path.insert(0, sys.argv.pop(1)); "
    "from flowfn_runtime.raynode import main; main()"
)


class Rank:
    """The node's part of the task, in the actor."""

    def __init__(self, keeper: Any, task_id: str, plan: dict[str, Any], rank: int, runtime: str) -> None:
        raytask.configure(plan)
        self._plan = plan
        self._rank = rank
        self._runtime = runtime
        self._directory = raytask.make_directory(f"{task_id}.{rank}-{os.urandom(4).hex()}")
        self._port_lock = -1
        self._process: subprocess.Popen[bytes] | None = None
        self._alive = -1
        limits.set_subreaper()
        raytask.Courier(keeper, task_id, self._directory).fetch(plan)

    def prepare(self) -> dict[str, Any]:
        """Where this node is, and a port that is free here, for the ranks to meet."""
        import ray

        port, self._port_lock = tasknode.meeting_port()
        return {"address": ray.util.get_node_ip_address(), "port": port}

    def run(self, addresses: list[str], port: int) -> None:
        """Start the program."""
        env = {
            **raytask.environment(self._plan),
            taskjob.ADDRESSES: ",".join(addresses),
            taskjob.PORT: str(port),
            taskjob.RANK: str(self._rank),
        }
        alive, self._alive = os.pipe()
        with open(self._path("out"), "wb") as out, open(self._path("err"), "wb") as err:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, self._runtime, self._directory, str(alive)],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                pass_fds=(alive,),
                start_new_session=True,
            )
        os.close(alive)
        raytask.mark_end(self._process, self._directory)

    def more(self, out: int, err: int) -> tuple[bytes, bytes, int | None]:
        """What the rank wrote since, and how it ended if it has; as soon as there is something."""
        assert self._process is not None
        deadline = time.monotonic() + LOOK_S
        with Watch(self._directory) as watch:
            while True:
                # In this order: what it wrote before its end is read after that was seen.
                status = self._process.poll()
                added = self.read(f"{self._rank}.out", out), self.read(f"{self._rank}.err", err)
                if status is not None or any(added) or not watch.wait(deadline):
                    return *added, 128 - status if status is not None and status < 0 else status

    def read(self, name: str, offset: int) -> bytes:
        try:
            with open(os.path.join(self._directory, name), "rb") as file:
                file.seek(offset)
                return file.read(CHUNK_BYTES)
        except FileNotFoundError:
            return b""

    def term(self) -> None:
        """Have it end: the command is told to, and killed after its time."""
        alive, self._alive = self._alive, -1
        if alive >= 0:
            os.close(alive)

    def close(self) -> None:
        """Have it end, and leave nothing here."""
        self.term()
        if self._process is not None:
            try:
                self._process.wait(self._plan["grace_s"] + LOOK_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        limits.kill_orphans()
        taskdir.remove_tree(self._directory)
        if self._port_lock >= 0:
            os.close(self._port_lock)

    def _path(self, stream: str) -> str:
        return os.path.join(self._directory, f"{self._rank}.{stream}")


def main() -> None:
    """Entry point of the program: the rank's directory, and a pipe that is open for as long as it is to run."""
    directory, alive = sys.argv[1], int(sys.argv[2])
    if pid := os.fork():
        # Ray kills the actor's children when it ends: this one, and who sees the pipe's end is left to end the others.
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os._exit(128 - code if code < 0 else code)
    os.set_inheritable(alive, False)

    def await_end() -> None:
        os.read(alive, 1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=await_end, daemon=True).start()
    sys.argv[1:] = ["rank", directory]
    try:
        taskjob.main()
    finally:
        limits.kill_orphans()
