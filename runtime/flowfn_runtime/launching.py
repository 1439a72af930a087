"""From a fresh host process to one inside a filesystem of its own, which has the mounts."""

from __future__ import annotations

import base64
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from typing import Any

from . import exceptions
from .host import CLIENT_FD, tell

TIDY_S = 1.5  # how long a staging that nobody waits for any more may take to tidy up


def launch(request: dict[str, Any], control: socket.socket, inherited: list[int]) -> None:
    """Become a host inside a filesystem of its own: stage the mounts, then start anew in a sandbox that has them.

    What the staging holds (cached data, volumes) stays held by the descriptors that the sandbox inherits.
    """

    def progress(state: Any) -> None:
        tell(
            control, {"progress": {"url": state.url, "done_bytes": state.done_bytes, "total_bytes": state.total_bytes}}
        )

    started = time.perf_counter()
    _end_with_client(control)
    try:
        from . import sandbox
        from .data import mounts, spec, store
        from .settings import UPLOAD_LOCAL

        os.environ.update(request["environ"])
        wanted = [spec.Mount.from_dict(mount) for mount in request["mounts"]]
        sandbox.check()
        staged = mounts.stage(wanted, env=request["env"], project=request["project"], progress=progress)
        os.environ.update(sandbox.environment(os.environ))
        os.environ["FLOW_MOUNTS"] = json.dumps({mount.source: mount.target for mount in wanted})
        os.environ.update(staged.environ())
        os.environ[UPLOAD_LOCAL] = "1"  # the client does not see this filesystem's files
        # References are staged into the cache from inside, and results too big for the wire go into the store.
        binds = [sandbox.Bind(path, path, False) for path in store.shared_dirs()] + list(staged.binds)
        argv = [sys.executable, "-c", request["boot"]]
        # The thread of the client that started this process may end before it does: dying is seen to by the host.
        command = sandbox.command(argv, binds, cwd=request["cwd"], die_with_parent=False)
        for fd in (*inherited, *staged.lease_fds):
            os.set_inheritable(fd, True)
        seconds = time.perf_counter() - started
        tell(control, {"launched": True, "seconds": seconds, "fetched_bytes": staged.fetched_bytes})
        os.execvp(command[0], command)
    except BaseException as error:
        payload = exceptions.dumps(error)
        tell(control, {"error": base64.b64encode(b"".join([payload.data, *payload.buffers])).decode()})
        os._exit(1)


def _end_with_client(control: socket.socket) -> None:
    """While data is staged, which can take long: stop when the client is gone.

    A thread waits for that, and interrupts this one, which tidies up. The program that is run in the end has neither.
    """

    def interrupt(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once: what tidies up is not interrupted again
        raise SystemExit(1)

    def watch() -> None:
        poll = select.poll()
        poll.register(control, select.POLLRDHUP)
        try:
            poll.register(CLIENT_FD, select.POLLIN)
        except OSError:
            pass  # no process descriptors here
        poll.poll()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(TIDY_S)
        os._exit(1)

    signal.signal(signal.SIGTERM, interrupt)
    threading.Thread(target=watch, name="flowfn-client", daemon=True).start()
