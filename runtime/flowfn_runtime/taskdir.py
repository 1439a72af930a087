"""A task's directory, `FLOW_HOME/tasks/<id>`: what lies in it, and what its lock says.

```
lock          held by the task's supervisor as long as it lives; the kernel lets go when it dies
pid           the supervisor's process id
started       there once its command was started
tree          held by every process of the task's sandboxes
spec.json     what was submitted, without the values of env and without credentials
0.out 0.err   what node 0 wrote to stdout and stderr; 1.out, 1.err, ... of further nodes
cancel        there if someone asked to cancel; holds the reason
outcome.json  how the task ended; blank until then
call result   a call made durable: its pickle, and its outcome's
scratch/      working directories and unnamed volumes; gone when the task ends
supervisor.log  what a supervisor says that fails itself
```
"""

from __future__ import annotations

import fcntl
import os
from typing import Any

from . import paths

_OUTCOME_BYTES = 4096  # one block


def tasks_root() -> str:
    """The directory of all tasks of this home."""
    return os.path.join(paths.home(), "tasks")


def task_dir(task_id: str) -> str:
    """The directory of one task."""
    return os.path.join(tasks_root(), task_id)


def create(task_id: str) -> tuple[str, int]:
    """Make a task's directory and take its lock; return the directory and the lock's descriptor.

    The lock is held before anybody can know of the task: a task that is listed without a holder has lost it.
    """
    paths.private_dir(paths.home())
    paths.private_dir(tasks_root())
    directory = task_dir(task_id)
    os.mkdir(directory, 0o700)
    os.mkdir(os.path.join(directory, "scratch"), 0o700)
    fd = os.open(os.path.join(directory, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(fd, fcntl.LOCK_EX)
    reserve_outcome(directory)
    return directory, fd


def reserve_outcome(directory: str) -> None:
    """Take the room for the outcome now: a disk that is full by then must not hide how the task ended."""
    reserve = os.open(os.path.join(directory, "outcome.json"), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    os.write(reserve, b" " * _OUTCOME_BYTES)
    os.close(reserve)


def is_held(directory: str, name: str = "lock") -> bool:
    """True if some process holds this lock of the task."""
    try:
        # For reading: closing it must not wake those who watch the directory for a supervisor's end.
        fd = os.open(os.path.join(directory, name), os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def wait_released(directory: str, name: str = "lock") -> None:
    """Sleep in the kernel until nobody holds this lock of the task. Returns at once if it isn't there."""
    try:
        fd = os.open(os.path.join(directory, name), os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)
    finally:
        os.close(fd)


def write_pid(directory: str) -> None:
    """Say which process supervises the task: this one."""
    fd = os.open(os.path.join(directory, "pid"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    os.write(fd, str(os.getpid()).encode())
    os.close(fd)


def mark_started(directory: str) -> None:
    """Wake those who watch the directory: the register says by now that the task runs."""
    os.close(os.open(os.path.join(directory, "started"), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))


def write_private(directory: str, name: str, content: bytes) -> None:
    """Write a new file of the directory, which only this user can read."""
    fd = os.open(os.path.join(directory, name), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(content)


def write_json(directory: str, name: str, value: dict[str, Any]) -> None:
    """Write a file of the directory, whole or not at all, and on the disk when this returns."""
    import json

    path = os.path.join(directory, name)
    temporary = f"{path}.{os.getpid()}"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        try:
            os.write(fd, json.dumps(value).encode())
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_outcome(directory: str, outcome: dict[str, Any]) -> None:
    """Write how the task ended into the room kept for it."""
    import json

    raw = json.dumps(outcome).encode()
    if len(raw) > _OUTCOME_BYTES:
        outcome = outcome | {"reason": outcome["reason"][: _OUTCOME_BYTES // 8] + "..."}
        raw = json.dumps(outcome).encode()
    fd = os.open(os.path.join(directory, "outcome.json"), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.pwrite(fd, raw.ljust(_OUTCOME_BYTES), 0)
        os.fsync(fd)
    finally:
        os.close(fd)


def read_json(directory: str, name: str) -> dict[str, Any] | None:
    """A file of the directory, or None if it isn't there, or only half of it, or nothing in it yet."""
    import json

    try:
        with open(os.path.join(directory, name), "rb") as file:
            value: dict[str, Any] = json.loads(file.read())
            return value
    except (FileNotFoundError, ValueError):
        return None


def cancel_reason(directory: str) -> str | None:
    """Why the task is to be cancelled, or None if nobody asked."""
    try:
        with open(os.path.join(directory, "cancel"), encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError:
        return None


def request_cancel(directory: str, reason: str) -> None:
    """Leave word that the task is to be cancelled; whoever asked first gave the reason."""
    try:
        fd = os.open(os.path.join(directory, "cancel"), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        return
    with os.fdopen(fd, "w", encoding="utf-8") as file:
        file.write(reason)


def cancel(directory: str, reason: str) -> None:
    """Have a task ended by its supervisor, which is woken. Raises OSError if word can't be left."""
    import signal

    request_cancel(directory, reason)
    try:
        with open(os.path.join(directory, "pid")) as file:
            pid = int(file.read())
        pidfd = os.pidfd_open(pid)
    except (FileNotFoundError, ProcessLookupError, ValueError):
        return  # it hasn't come that far, and will look by itself; or it has ended
    try:
        # The lock is held now, so what the descriptor stands for is the supervisor and no later process of that number.
        if is_held(directory):
            signal.pidfd_send_signal(pidfd, signal.SIGTERM)
    except ProcessLookupError:
        pass
    finally:
        os.close(pidfd)


def remove_tree(path: str) -> None:
    """Remove a directory with everything in it, also below directories that were made unwritable."""
    if not os.path.lexists(path):
        return
    import shutil

    shutil.rmtree(path, ignore_errors=True)
    if os.path.lexists(path):
        for parent, names, _files in os.walk(path):
            os.chmod(parent, 0o700)
            for name in names:
                if not os.path.islink(inner := os.path.join(parent, name)):
                    os.chmod(inner, 0o700)
        shutil.rmtree(path, ignore_errors=True)


def boot_id() -> str:
    """Identifies this run of the host's kernel, so that what a restart of the host ended can be told."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return ""
