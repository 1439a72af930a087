"""What the next call will need is staged while the present one computes, and is the next call's without another look.

Large data is staged by a process of its own: in this one, a function that computes in Python would hold it up, since it
lets others have the interpreter only now and then. The process ends when its worker does.
"""

from __future__ import annotations

import os
import pickle
import socket
import sys
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from . import access

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .reference import Reference
    from .staging import Staged

# Smaller data is here before the other process has heard of it.
_OWN_PROCESS_BYTES = 4 << 20
# Staged and never called for (the call went to another worker, say): so many may hold their place in the cache.
_MOST_KEPT = 16
_START = "import os, sys; os.fork() and os._exit(0); from flowfn_runtime.data.ahead import main; main(int(sys.argv[1]))"

_lock = threading.Lock()
_kept: OrderedDict[str, _Ahead] = OrderedDict()
_helper_lock = threading.Lock()
_helper: socket.socket | None = None


class _Ahead:
    """Data that is being staged, or is."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.staged: Staged | None = None


def stage(references: Sequence[Reference]) -> None:
    """Stage what `references` stand for, until `take` asks for it. Errors are for whoever takes it to find."""
    for reference in references:
        name = _name(reference)
        with _lock:
            if name in _kept:
                continue
            ahead = _kept[name] = _Ahead()
            over = _kept.popitem(last=False)[1] if len(_kept) > _MOST_KEPT else None
        if over is not None and over.staged is not None:
            over.staged.close()
        try:
            ahead.staged = _by_helper(reference) if _is_large(reference) else _here(reference)
        except Exception:
            pass
        finally:
            ahead.done.set()


def take(reference: Reference) -> Staged | None:
    """What was staged ahead for a reference like this one; waits for it if that is under way. None: nothing was."""
    if not _kept:
        return None
    with _lock:
        ahead = _kept.pop(_name(reference), None)
    if ahead is None:
        return None
    ahead.done.wait()
    return ahead.staged


def forget() -> None:
    """Let go of all that was staged ahead, and of the process that does it."""
    global _helper
    with _lock:
        kept = list(_kept.values())
        _kept.clear()
    for ahead in kept:
        if ahead.staged is not None:
            ahead.staged.close()
    with _helper_lock:
        if _helper is not None:
            _helper.close()
        _helper = None


def _name(reference: Reference) -> str:
    return repr((type(reference), sorted(reference._state().items(), key=lambda item: item[0])))


def _is_large(reference: Reference) -> bool:
    pin = getattr(reference, "_pin", None)
    size = pin.size_bytes if pin is not None else None
    return access.local_path(reference.url) is None and (size is None or size >= _OWN_PROCESS_BYTES)


def _here(reference: Reference) -> Staged | None:
    stage: Any = getattr(reference, "_stage", None)  # an Output has nothing to be staged
    staged: Staged | None = stage() if stage is not None else None
    return staged


# -- the other process -------------------------------------------------------------------------------------------------


def _by_helper(reference: Reference) -> Staged | None:
    global _helper
    with _helper_lock:
        for _ in range(2):  # one that has ended is replaced once
            if _helper is None:
                _helper = _start()
            try:
                _helper.send(pickle.dumps((type(reference), reference._state())))
                answer, fds, _, _ = socket.recv_fds(_helper, 1 << 16, 1)
            except OSError:
                answer, fds = b"", []
            if answer:
                break
            _helper.close()
            _helper = None
    if len(fds) != 1:
        return None
    from .staging import Staged

    fd = fds[0]
    return Staged(answer.decode("utf-8", "surrogateescape"), lambda: os.close(fd))


def _start() -> socket.socket:
    import subprocess

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        package = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
        subprocess.run(
            [sys.executable, "-c", _START, str(theirs.fileno())],
            env={**os.environ, "PYTHONPATH": path},
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is the worker's to handle
            check=True,
        )
    return ours


def main(number: int) -> None:
    """The other process: stage what comes, and send back its path and what holds it in the cache."""
    from .reference import _rebuild

    with socket.socket(fileno=number) as worker:
        while message := worker.recv(1 << 20):
            path, fds = b"-", []
            try:
                reference: Any = _rebuild(*pickle.loads(message))
                staged = reference._stage()
                path = os.fsencode(staged.path)
                if staged.lease_fd is not None:
                    fds = [staged.lease_fd]
            except Exception:
                pass  # whoever needs it will meet the error, too
            try:
                socket.send_fds(worker, [path], fds)
            except OSError:
                return
            finally:
                if fds:
                    staged.close()
