"""Who has the GPUs of this host.

A slot is one device, and one FIFO in the flowfn home that stands for it. Who holds an exclusive `flock` on the FIFO has
the device; every client and worker of this account on this host takes part, and the kernel frees the lock when the
last process that inherited it is gone, however it ended. It is a FIFO rather than a file because of those who wait:
a reader sees its writers go (POLLHUP), so waiting for any of several devices is one `poll`, without threads or timers.
"""

from __future__ import annotations

import fcntl
import os
import select
import time
from collections.abc import Sequence
from dataclasses import dataclass

from flowfn_runtime import paths
from flowfn_runtime.errors import ResourceUnavailable
from flowfn_runtime.gpu_inventory import Gpu as Gpu
from flowfn_runtime.gpu_inventory import Inventory as Inventory
from flowfn_runtime.gpu_inventory import inventory as inventory
from flowfn_runtime.gpu_request import GpuRequest, describe

_WITHIN = "FLOW_GPUS_WITHIN"  # set for a worker that has GPUs: whose GPUs its own claims are about


@dataclass(frozen=True)
class Claim:
    """GPUs that are this process's, and of every process that inherits `fds`, until all of them have closed those.

    The descriptors are close-on-exec: hand them on by `pass_fds` of subprocess, or `os.set_inheritable`. Otherwise
    any program that the user's own code starts would keep the GPUs.
    """

    gpus: tuple[Gpu, ...]
    request: GpuRequest | None  # the fallback that was taken; None: no GPU was asked for
    fds: tuple[int, ...]

    @property
    def env(self) -> dict[str, str]:
        """What shows these GPUs, and no other, to a worker. Empty if no GPU was asked for.

        Functions that the worker calls share its GPUs: there are no others that it could see, and to wait for those
        that it holds itself would be for ever. So claims made in this environment exclude each other only.
        """
        if self.request is None:
            return {}
        visible = ",".join(gpu.visible for gpu in self.gpus)
        within = "+".join(filter(None, [os.environ.get(_WITHIN), self.gpus[0].uuid]))
        return {"CUDA_VISIBLE_DEVICES": visible, "NVIDIA_VISIBLE_DEVICES": visible, _WITHIN: within}

    def close(self) -> None:
        """Give this process's hold on the GPUs up. Processes that inherited it keep theirs. Idempotent."""
        fds = self.fds
        object.__setattr__(self, "fds", ())
        for fd in fds:
            os.close(fd)  # no LOCK_UN: that would take the GPU from a worker that has inherited it

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


RequestTuple = tuple[str | None, int | None, int]  # a request as it travels: model, memory_gb, count


def check(requests: Sequence[GpuRequest | RequestTuple], there: Inventory) -> None:
    """Raise ResourceUnavailable if none of `requests` could be met even with every GPU free."""
    requests = _requests(requests)
    if not requests or any(len(_fitting(request, there)) >= request.count for request in requests):
        return
    raise ResourceUnavailable(
        f"gpu: {describe(requests)} asked for; this host has {there}",
        hint="ask for what `flow gpus` lists, or declare slots without NVML: FLOW_GPUS=a100:4",
    )


def slots(requests: Sequence[GpuRequest | RequestTuple], *, there: Inventory | None = None) -> int:
    """How many workers that ask for `requests` (fallbacks) this host has room for, when all its GPUs are free.

    Raises ResourceUnavailable if none.
    """
    there = inventory() if there is None else there
    check(requests, there)
    count = 0
    left = list(there.gpus)
    for request in _requests(requests):
        fitting = _fitting(request, Inventory(tuple(left), there.source))
        workers = len(fitting) // request.count
        count += workers
        left = [gpu for gpu in left if gpu not in fitting[: workers * request.count]]
    return count


def claim(
    requests: Sequence[GpuRequest | RequestTuple],
    *,
    there: Inventory | None = None,
    wait: bool = False,
    timeout: float | None = None,
    cancel: int | None = None,
) -> Claim | None:
    """Take the GPUs of the first of `requests` (fallbacks) that are free: all of them or none.

    `there` is the host's inventory (looked up if not given). If everything that fits is taken: None, or with
    `wait=True` blocks until it isn't, at most `timeout` seconds, or until the descriptor `cancel` becomes readable,
    then None. Waiting takes no turn: a request for many GPUs may be overtaken by ones for few. Raises
    ResourceUnavailable if nothing here fits, and so waiting would be for ever.
    """
    if not requests:
        return Claim((), None, ())
    there = inventory() if there is None else there
    requests = _requests(requests)
    check(requests, there)
    deadline = None if timeout is None else time.monotonic() + timeout
    fitting = {gpu for request in requests for gpu in _fitting(request, there)}
    while True:
        readers = [_open_reader(_slot(gpu)) for gpu in fitting] if wait else []
        try:
            # In this order: what is given back from here on is either found free, or noticed by the poll.
            if (found := _try(requests, there)) or not wait:
                return found
            if not _await_release(readers, deadline, cancel):
                return None
        finally:
            for fd in readers:
                os.close(fd)


def free(there: Inventory) -> tuple[Gpu, ...]:
    """Those that nobody holds at this moment."""
    with _Turn():
        return tuple(gpu for gpu in there.gpus if _probe(_slot(gpu)))


def _requests(requests: Sequence[GpuRequest | RequestTuple]) -> list[GpuRequest]:
    return [GpuRequest(*request) for request in requests]


def holders(there: Inventory) -> dict[Gpu, list[int]]:
    """The ids of the processes that hold each GPU that is held, as far as this user may see them."""
    taken = {os.path.basename(path := _slot(gpu)): (gpu, os.stat(path).st_ino) for gpu in there.gpus}
    found: dict[Gpu, list[int]] = {}
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdigit()):
        try:
            for fd in os.listdir(f"/proc/{pid}/fd"):
                gpu, inode = taken.get(os.path.basename(os.readlink(f"/proc/{pid}/fd/{fd}")), (None, 0))
                if gpu is None or os.stat(f"/proc/{pid}/fd/{fd}").st_ino != inode:
                    continue
                with open(f"/proc/{pid}/fdinfo/{fd}") as info:
                    if "FLOCK" in info.read():  # else it waits for the GPU
                        found.setdefault(gpu, []).append(pid)
        except OSError:  # gone meanwhile, or somebody else's
            continue
    return found


def _fitting(request: GpuRequest, there: Inventory) -> list[Gpu]:
    """The GPUs that fit, the smallest first, so that the larger stay free for those who need them."""
    gpus = [gpu for gpu in there.gpus if request.fits(gpu.model, gpu.memory_bytes)]
    return sorted(gpus, key=lambda gpu: (gpu.memory_bytes, gpu.index))


def _try(requests: Sequence[GpuRequest], there: Inventory) -> Claim | None:
    with _Turn():
        for request in requests:
            # Nobody else takes a slot in our turn, so what is free now can be had. Slots are locked only when there
            # are enough: taking two of four and giving them back would wake everybody who waits, who would do the same.
            gpus = [gpu for gpu in _fitting(request, there) if _probe(_slot(gpu))][: request.count]
            if len(gpus) == request.count:
                gpus.sort(key=lambda gpu: gpu.index)  # CUDA numbers devices in the order given: keep the host's
                return Claim(tuple(gpus), request, tuple(_lock(_slot(gpu)) for gpu in gpus))
    return None


def _await_release(readers: Sequence[int], deadline: float | None, cancel: int | None) -> bool:
    """Block until a holder of one of the slots is gone (True), or the time is up or `cancel` readable (False)."""
    poll = select.poll()
    for fd in readers:
        poll.register(fd, 0)  # POLLHUP is always reported
    if cancel is not None:
        poll.register(cancel, select.POLLIN)
    left = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
    ready = dict(poll.poll(left))
    return bool(ready) and cancel not in ready


class _Turn:
    """Held while slots are tried, so that two clients can't each get half of what both want. Never held while
    waiting: it is a matter of microseconds."""

    def __enter__(self) -> None:
        self._fd = os.open(os.path.join(_directory(), "turn"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._fd, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        # Closing is not enough: a process that another thread forked just now has the descriptor too.
        fcntl.flock(self._fd, fcntl.LOCK_UN)
        os.close(self._fd)


def _directory() -> str:
    # By host: the home may be on a network filesystem that several hosts share, each with GPUs of its own.
    directory = os.path.join(paths.home(), "locks", os.uname().nodename, "gpus")
    if within := os.environ.get(_WITHIN):
        directory = os.path.join(directory, "within", within.replace("/", "_"))
    return paths.private_dir(directory)


def _slot(gpu: Gpu) -> str:
    path = os.path.join(_directory(), gpu.uuid.replace("/", "_"))
    try:
        os.mkfifo(path, 0o600)
    except FileExistsError:
        pass
    except OSError as error:
        raise ResourceUnavailable(
            f"GPUs can't be claimed: no lock can be made in {os.path.dirname(path)} ({error.strerror})",
            hint="set FLOW_HOME to a directory on a local filesystem",
        ) from error
    return path


def _open_reader(path: str) -> int:
    return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)


def _probe(path: str) -> bool:
    """Whether the slot is free. Reads only: a writer that came and went would wake up everybody who waits."""
    fd = _open_reader(path)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(fd, fcntl.LOCK_UN)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True


def _lock(path: str) -> int:
    """A descriptor that holds the slot, which is known to be free.

    It is both the lock and the writer that waiters watch: when the kernel closes it, it drops the lock first, and wakes
    the readers then. With two descriptors they might look before the lock is gone, and sleep on.
    """
    fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.flock(fd, fcntl.LOCK_EX)
    return fd
