"""Writes a volume of a bucket back: when a call that has it mounted ends, and when its last user on this host is gone.

A process of its own, started with the first user: it sleeps in the kernel until it has the volume's lock to itself,
which is when nobody else has it any more, however that ended. Until then, users ask for it by a socket (volume_commit).
"""

from __future__ import annotations

import fcntl
import os
import socket
import sys
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .volumes import Volume

_START = (
    "import os, sys; os.fork() and os._exit(0); from flowfn_runtime.data.volume_keeper import main; main(sys.argv[1:])"
)


def start(volume: Volume) -> None:
    """See to it that a keeper waits for the end of the volume's use. The caller holds the volume's lock."""
    import json
    import subprocess

    from .. import settings
    from . import volume_commit

    folder = os.path.dirname(volume.path)
    url = settings.volumes() or ""
    env = {**os.environ, "FLOW_VOLUMES": url}
    if options := settings.storage(url):
        env["FLOW_STORAGE"] = json.dumps({url: dict(options)})
    turn = os.open(os.path.join(folder, "keeper.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    log = os.open(os.path.join(folder, "keeper.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        # A keeper gives its turn up only while it has the volume to itself, so one that has it now will wait for us.
        fcntl.flock(turn, fcntl.LOCK_EX | fcntl.LOCK_NB)
        listener = volume_commit.listen(folder)
        package = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
        with listener:
            subprocess.run(
                [sys.executable, "-c", _START, volume.id, volume.project, str(turn), str(listener.fileno())],
                env={**env, "PYTHONPATH": path},
                pass_fds=(turn, listener.fileno()),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                check=True,
                cwd="/",
            )
    except BlockingIOError:
        pass
    finally:
        os.close(turn)
        os.close(log)


def main(argv: list[str]) -> None:
    """Wait, write back, end."""
    from .. import settings
    from ..errors import FlowError, VolumeInUse
    from . import volume_commit, volume_db, volume_locks, volume_sync, volumes
    from .volume_bucket import Bucket

    volume_id, project, turn = argv[0], argv[1], int(argv[2])
    listener = socket.socket(fileno=int(argv[3]))
    volume = volumes.get(volume_id, project)
    url = settings.volumes()
    assert url
    bucket = Bucket(url)
    asked = (listener, lambda: volume_sync.commit(volume, bucket, in_use=True))
    threading.Thread(target=volume_commit.serve, args=asked, daemon=True).start()
    while True:
        volume_db.release(volume_locks.acquire(volume, exclusive=True, wait=True))  # sleeps while anybody uses it
        # Who comes now waits for its turn, and then fetches what others wrote meanwhile.
        with volume_locks.turn(volume):
            try:
                lock = volume_locks.acquire(volume, exclusive=True, wait=False)
            except VolumeInUse:
                continue
            try:
                volumes.commit(volume_id, project)
            except FlowError as error:
                # It stays here, and the next user's attach tries again, or says what stands against it.
                print(error, file=sys.stderr)
            finally:
                fcntl.flock(turn, fcntl.LOCK_UN)
                volume_db.release(lock)
            return
