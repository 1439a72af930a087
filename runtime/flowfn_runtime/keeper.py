"""The process on a remote host that stands for the client: it says what the host has, and its end is the workers' end.

A client connects to a host once, and starts its workers over that connection. The keeper holds a FIFO open that every
worker's host has the other end of: when the keeper goes, however it goes, all of them see it at once. It goes when the
client does, and when the client was silent for too long, as it is when the network is cut for good.
"""

from __future__ import annotations

import fcntl
import os
import select
import time
from typing import Any

from . import limits, paths, wire
from .errors import FlowError


def keep(stream: wire.Stream, silence_s: float, client: Any) -> None:
    """Report to the client what there is, then stay until it is gone or silent."""
    directory = paths.private_dir(os.path.join(paths.cache(), "keepers"))
    _clean(directory)
    path = os.path.join(directory, f"{os.getpid()}-{os.urandom(4).hex()}")
    os.mkfifo(path, 0o600)
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        client.ready(alive=path, **facts())
        _listen(stream, silence_s, client)
    finally:
        os.unlink(path)


def facts() -> dict[str, Any]:
    """What this host has."""
    return {
        "cores": limits.cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def _tell_gpus(stream: wire.Stream, client: Any) -> None:
    import dataclasses

    from . import gpus

    try:
        there = gpus.inventory()
    except FlowError as error:
        from . import exceptions

        payload = exceptions.dumps(error)
        stream.send(wire.ERROR, body=payload.data, buffers=payload.buffers)
    else:
        listed = [dataclasses.asdict(gpu) for gpu in there.gpus]
        client.tell(gpus=listed, source=there.source, reason=there.reason)


def _listen(stream: wire.Stream, silence_s: float, client: Any) -> None:
    poll = select.poll()
    poll.register(stream.read_fd, select.POLLIN | wire.HANG_UP)
    heard = time.monotonic()
    while True:
        if stream.pending or poll.poll(max(0.0, silence_s - (time.monotonic() - heard)) * 1000):
            try:
                asked = stream.receive().meta
            except EOFError:
                return
            if asked:  # for the GPUs, which may take a while to find: not a mere sign of life
                _tell_gpus(stream, client)
            heard = time.monotonic()
        elif time.monotonic() - heard >= silence_s:
            return


def _clean(directory: str) -> None:
    """Remove what keepers that were killed have left."""
    for entry in list(os.scandir(directory)):
        try:
            fd = os.open(entry.path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(entry.path)
        except OSError:
            pass  # in use
        finally:
            os.close(fd)
