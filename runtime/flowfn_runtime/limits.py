"""What the parent of workers needs to hold them in bounds: their cores, their memory, and their end.

Memory is sampled rather than left to cgroups, which a normal user can seldom write to, or to RLIMIT_AS and RLIMIT_DATA,
which count address space: CUDA reserves more of that than any machine has memory. A sample is a bound that costs a
read of /proc per process, and the exact figure only where the bound is over the limit.

A tree of processes is followed by parent. That works only if nothing gets away from its parent: a worker that is a
subreaper (`set_subreaper`) keeps what its descendants orphan, however it was daemonised, until it ends itself; then it
all goes to the parent of the workers, another subreaper, whose `kill_orphans` ends it.
"""

from __future__ import annotations

import errno
import os
import select
import signal
from collections.abc import Collection, Iterable
from typing import NamedTuple

from flowfn_runtime import paths
from flowfn_runtime.errors import ResourceUnavailable

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36

_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "RAYON_NUM_THREADS",
    "POLARS_MAX_THREADS",
    "NUMBA_NUM_THREADS",
)


# --- cores ------------------------------------------------------------------------------------------------------------


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class CpuShare(NamedTuple):
    """The cores of one worker, held until the last process that inherited `fds` is gone."""

    env: dict[str, str]  # the thread counts of the usual numeric libraries
    cores: tuple[int, ...]  # empty: the system can't pin
    fds: tuple[int, ...]


def thread_env(cpus: float) -> dict[str, str]:
    """The environment that has numeric libraries use `cpus` threads (at least one)."""
    return dict.fromkeys(_THREAD_VARIABLES, str(_whole(cpus)))


def set_cpu(cpus: float, *, keep: Collection[str] = ()) -> CpuShare:
    """Confine this process, and what it starts from now on, to `cpus` cores: its affinity and its `os.environ`.

    The cores are those that the fewest other workers of this account are confined to. `keep` names variables that
    stay as they are, since the user set them. Libraries read these when they are imported. Raises ResourceUnavailable
    if this process may not use that many cores.
    """
    share = cpu_share(cpus, keep=keep)
    if share.cores:
        os.sched_setaffinity(0, share.cores)
    os.environ.update(share.env)
    return share


def cpu_share(cpus: float, *, keep: Collection[str] = ()) -> CpuShare:
    """The same without confining anybody: for whoever starts a worker with these cores and variables."""
    env = {name: value for name, value in thread_env(cpus).items() if name not in keep}
    return CpuShare(env, *_claim_cores(cpus))


def _claim_cores(cpus: float) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if not hasattr(os, "sched_getaffinity"):  # macOS: thread counts have to do
        return (), ()
    import fcntl

    allowed = sorted(os.sched_getaffinity(0))
    count = _whole(cpus)
    if count > len(allowed):
        raise ResourceUnavailable(f"cpu={cpus:g} asked for; this process may use {len(allowed)} cores")
    directory = paths.private_dir(os.path.join(paths.home(), "locks", os.uname().nodename, "cpus"))
    claimed: dict[int, int] = {}
    # One file for the first worker on a core, one for the second, ...: the free core with the lowest number has the
    # fewest workers. The kernel drops the locks of those that die.
    layer = 0
    while len(claimed) < count:
        for core in allowed:
            if len(claimed) < count and core not in claimed:
                path = os.path.join(directory, f"{core}.{layer}")
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    claimed[core] = fd
                except BlockingIOError:
                    os.close(fd)
        layer += 1
    return tuple(sorted(claimed)), tuple(claimed.values())


def _whole(cpus: float) -> int:
    """As many threads as cores, and for half a core one of each."""
    return max(1, -int(-cpus // 1))


# --- memory -----------------------------------------------------------------------------------------------------------


def tree_memory(pid: int, *, limit: int | None = None) -> int:
    """Bytes of memory that a process and all below it use; 0 if it is gone.

    Memory of their own and shared memory count; pages that several processes share (after a fork, or of a shared
    array) count once, divided among all that have them. Files that are mapped don't count: the kernel takes their
    pages back when it needs them. With `limit`, the exact figure is found out only if an upper bound, which takes some
    20 µs a process, is above it; else the bound is returned.
    """
    tree = [pid, *descendants(pid)]
    bound = sum(map(_resident, tree))
    if limit is not None and bound <= limit:
        return bound
    return sum(map(_proportional, tree))


def sample_interval(used: int, limit: int, cost_s: float = 0.0) -> float:
    """Seconds until the next sample of a tree that uses `used` of `limit` bytes, when the last one took `cost_s`.

    A process can fill some GB a second (fresh pages have to be zeroed), so one near its limit is looked at often, one
    far from it seldom; and never so often that looking takes more than a twentieth of the time: walking the page
    tables of a large process holds it up.
    """
    return max(min(1.0, (limit - used) / 4e9), 0.02, 20 * cost_s)


def kernel_kills() -> int:
    """How many processes the kernel has killed in this container because they went over its memory limit."""
    for path in ("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control"):
        for line in _read(path).splitlines():
            name, _, value = line.partition(b" ")
            if name == b"oom_kill":
                return int(value)
    return 0


def _resident(pid: int) -> int:
    """Memory of its own and shared, without mapped files. Counts a page once for every process that has it."""
    fields = _fields(f"/proc/{pid}/status", (b"RssAnon", b"RssShmem"))
    return sum(fields.values())


def _proportional(pid: int) -> int:
    """As `_resident`, with pages divided among those who share them. Walks the page tables: 1 ms for 100 MB or so."""
    fields = _fields(f"/proc/{pid}/smaps_rollup", (b"Pss_Anon", b"Pss_Shmem"))
    return sum(fields.values()) if len(fields) == 2 else _resident(pid)  # it may forbid being looked at


def _fields(path: str, names: tuple[bytes, ...]) -> dict[bytes, int]:
    """Lines such as `RssAnon:   1234 kB`, in bytes."""
    found = {}
    for line in _read(path).splitlines():
        name, _, value = line.partition(b":")
        if name in names:
            found[name] = int(value.split()[0]) * 1024
    return found


# --- trees of processes -----------------------------------------------------------------------------------------------


class _Stat(NamedTuple):
    state: str  # one letter: R, S, D, T (stopped), Z (ended, not yet waited for), X
    parent: int


def descendants(pid: int) -> list[int]:
    """All processes below `pid`, parents before their children. Those that ended and were not waited for are among
    them."""
    if _kernel_lists_children():
        children = _listed_children
    else:
        by_parent: dict[int, list[int]] = {}
        for name in os.listdir("/proc"):
            if name.isdigit() and (stat := _stat(int(name))):
                by_parent.setdefault(stat.parent, []).append(int(name))

        def children(pid: int) -> list[int]:
            return by_parent.get(pid, [])

    found: list[int] = []
    todo = [pid]
    while todo:
        below = children(todo.pop(0))
        found += below
        todo += below
    return found


def kill_tree(pid: int) -> None:
    """SIGKILL a process and everything below it. Does not wait for any of them.

    All are stopped first, and looked for again until there are no more: what is stopped can neither fork nor lose a
    child unseen. What a process forks in the very moment of being stopped may be missed; in a subreaper that waits
    for its children, `kill_orphans` then finds it.
    """
    tree = {pid}
    _send([pid], signal.SIGSTOP)
    for _ in range(64):  # more rounds would mean a process that can't be stopped, as one stuck in the kernel
        more = [below for below in descendants(pid) if below not in tree]
        _send(more, signal.SIGSTOP)
        tree.update(more)
        if not more and all((stat := _stat(each)) is None or stat.state in "TtZXx" for each in tree):
            break
    _send(tree, signal.SIGKILL)


def kill_orphans(keep: Collection[int] = ()) -> None:
    """SIGKILL every child of this process that is not in `keep`, with everything below it, and wait for their end.

    For a subreaper whose own children are all in `keep`: what else is its child was orphaned by one that has ended.
    """
    stuck: set[int] = set()
    while True:
        orphans = [pid for pid in children_of(os.getpid()) if pid not in keep and pid not in stuck]
        if not orphans:
            return
        for pid in orphans:
            kill_tree(pid)
        for pid in orphans:  # whose own orphans are ours when they are gone
            if not _await_end(pid):
                stuck.add(pid)


def kill_marked(mark: str) -> None:
    """SIGKILL every process that was started with `mark` ("NAME=value") in its environment, and wait for their end.

    For what is nobody's child any more, since all that would have ended it was killed. What such a process starts
    meanwhile has the mark as well, so it is looked again until there are no more.
    """
    wanted = mark.encode()
    for _ in range(64):
        found = [
            pid
            for pid in (int(name) for name in os.listdir("/proc") if name.isdigit())
            if wanted in _read(f"/proc/{pid}/environ").split(b"\0") and pid != os.getpid()
        ]
        if not found:
            return
        _send(found, signal.SIGKILL)
        for pid in found:
            _await_end(pid)


def children_of(pid: int) -> list[int]:
    """The children of a process."""
    if _kernel_lists_children():
        return _listed_children(pid)
    everyone = (int(name) for name in os.listdir("/proc") if name.isdigit())
    return [each for each in everyone if (stat := _stat(each)) and stat.parent == pid]


def _await_end(pid: int, timeout_s: float = 5.0) -> bool:
    """Wait until the child has ended, and for its status. False if that takes too long: it is stuck in the kernel."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
    else:
        try:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            if not poll.poll(timeout_s * 1000):
                return False
        finally:
            os.close(pidfd)
    try:
        os.waitpid(pid, 0)
    except ChildProcessError:  # somebody else has waited for it
        pass
    return True


def _kernel_lists_children() -> bool:
    # Of this thread, since that exists for sure. Not every kernel has it; else all of /proc has to be read.
    return os.path.exists("/proc/thread-self/children")


def _listed_children(pid: int) -> list[int]:
    """The children of all threads of a process."""
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return []
    return [int(child) for thread in threads for child in _read(f"/proc/{pid}/task/{thread}/children").split()]


def _stat(pid: int) -> _Stat | None:
    # The second field is the command in parentheses, which may hold anything, parentheses too.
    fields = _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
    return _Stat(fields[0].decode(), int(fields[1])) if len(fields) > 1 else None


def _send(pids: Iterable[int], number: int) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except (ProcessLookupError, PermissionError):  # gone, or no longer ours: it runs a setuid program
            pass


def _read(path: str) -> bytes:
    """A small file of /proc; empty if the process is gone or forbids it. Three times as fast as `open`."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        content = chunk = os.read(fd, 65536)
        while chunk:
            content += (chunk := os.read(fd, 65536))
        return content
    except OSError:
        return b""
    finally:
        os.close(fd)


# --- the kernel's help ------------------------------------------------------------------------------------------------


def set_subreaper(on: bool = True) -> None:
    """Become the parent of whatever this process's descendants orphan, or no more. Not inherited by children."""
    _prctl(_PR_SET_CHILD_SUBREAPER, int(on))


def set_pdeathsig(number: int) -> None:
    """Have the kernel send this process a signal when the *thread* that forked it ends.

    The parent may be gone by now: compare `os.getppid()` afterwards with what it should be. Not inherited by children,
    and undone by running a setuid program.
    """
    _prctl(_PR_SET_PDEATHSIG, int(number))


def _prctl(option: int, value: int) -> None:
    # ctypes takes 6 ms to import, which every worker would pay; the module below it does the same in 0.5 ms.
    try:
        from _ctypes import call_function, dlopen, dlsym

        result = call_function(dlsym(dlopen(None, 0), "prctl"), (option, value, 0, 0, 0))  # type: ignore[arg-type]  # None: this program
    except ImportError:
        import ctypes

        result = ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
    if result:
        raise OSError(errno.EINVAL, f"prctl({option}) failed")


# --- words ------------------------------------------------------------------------------------------------------------

_SIGNALS = {
    "SIGKILL": "killed by SIGKILL",
    "SIGTERM": "terminated by SIGTERM",
    "SIGINT": "interrupted by SIGINT",
    "SIGSEGV": "segmentation fault (SIGSEGV)",
    "SIGBUS": "bus error (SIGBUS), as from a file that shrank or a full /dev/shm",
    "SIGABRT": "aborted (SIGABRT), as by a failed assertion in C code",
    "SIGFPE": "arithmetic error in C code (SIGFPE)",
    "SIGILL": "illegal instruction (SIGILL), as by a library built for another CPU",
    "SIGSYS": "forbidden system call (SIGSYS)",
    "SIGXCPU": "used up its CPU time limit (SIGXCPU)",
}


def describe_exit(returncode: int, *, shell: bool = False) -> str:
    """How a process ended, in words: "exited with status 3", "killed by SIGKILL", "segmentation fault (SIGSEGV)".

    `returncode` as of `os.waitstatus_to_exitcode`: negative for a signal. `shell`: it comes through a shell or a
    sandbox, which turn signal N into 128 + N.
    """
    if shell and 128 < returncode <= 128 + signal.NSIG:
        returncode = 128 - returncode
    if returncode >= 0:
        return f"exited with status {returncode}"
    try:
        name = signal.Signals(-returncode).name
    except ValueError:
        return f"killed by signal {-returncode}"
    return _SIGNALS.get(name, f"killed by {name}")
