"""Bounds on real processes: cores, memory, and the end of whole trees."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowfn_runtime import limits
from flowfn_runtime.errors import ResourceUnavailable

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

MIB = 2**20


def python(code: str, *args: str, **options: Any) -> subprocess.Popen[str]:
    # Lines of several processes in one pipe: each is written at once, by os.write.
    return subprocess.Popen(
        [sys.executable, "-c", code, *args], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options
    )


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


# --- cores


CPU = (
    "import json, os, sys; from flowfn_runtime import limits\n"
    "share = limits.set_cpu(float(sys.argv[1]))\n"
    "now = [sorted(os.sched_getaffinity(0)), share.cores, os.environ['OMP_NUM_THREADS'], share.env]\n"
    "print(json.dumps(now), flush=True)\n"
    "sys.stdin.read()"
)


def test_a_worker_is_confined_to_its_cores() -> None:
    process = python(CPU, "1", env={**os.environ, "OMP_NUM_THREADS": "64"})
    affinity, cores, threads, env = json.loads(line(process))
    assert affinity == cores
    assert len(cores) == 1
    assert threads == "1"
    assert env["OPENBLAS_NUM_THREADS"] == env["MKL_NUM_THREADS"] == "1"
    end(process)


def test_workers_are_spread_over_the_cores_and_a_killed_one_makes_room() -> None:
    allowed = sorted(os.sched_getaffinity(0))
    workers = [python(CPU, "1") for _ in allowed]
    cores = [json.loads(line(worker))[0][0] for worker in workers]
    assert sorted(cores) == allowed
    more = python(CPU, "0.5")  # there is a worker on each: the second round begins
    assert json.loads(line(more))[0] == allowed[:1]
    end(workers[-1])
    last = python(CPU, "1")
    assert json.loads(line(last))[0] == [cores[-1]]
    for worker in [*workers[:-1], more, last]:
        end(worker)


def test_what_the_user_set_stays() -> None:
    code = (
        "import os; from flowfn_runtime import limits; limits.set_cpu(1, keep=['OMP_NUM_THREADS'])\n"
        "print(os.environ['OMP_NUM_THREADS'], os.environ['MKL_NUM_THREADS'])"
    )
    process = python(code, env={**os.environ, "OMP_NUM_THREADS": "2"})
    assert line(process) == "2 1"
    end(process)


def test_more_cores_than_there_are() -> None:
    with pytest.raises(ResourceUnavailable, match=r"cpu=4096 asked for; this process may use \d+ cores"):
        limits.set_cpu(4096)


@pytest.mark.parametrize(("cpus", "threads"), [(0.1, "1"), (1, "1"), (1.5, "2"), (4, "4")])
def test_threads(cpus: float, threads: str) -> None:
    assert set(limits.thread_env(cpus).values()) == {threads}


# --- memory


def used(process: subprocess.Popen[str], limit: int | None = None) -> int:
    return limits.tree_memory(process.pid, limit=limit)


def test_memory_of_a_tree() -> None:
    code = (
        "import os, sys\n"
        "mine = bytearray(40 << 20)\n"
        "if os.fork() == 0:\n"
        "    theirs = bytearray(60 << 20)\n"
        "    os.write(1, b'ready\\n')\n"
        "sys.stdin.read()"
    )
    process = python(code)
    assert line(process) == "ready"
    # 40 of the parent's (shared with the child since the fork) and 60 of the child's, and the interpreter's own.
    assert 100 * MIB < used(process) < 125 * MIB
    # The bound counts what is shared twice.
    assert 140 * MIB < used(process, limit=1000 * MIB) < 170 * MIB
    # It is only asked where it decides.
    assert 100 * MIB < used(process, limit=120 * MIB) < 125 * MIB
    end(process)
    assert used(process) == 0


def test_shared_memory_counts_once_and_mapped_files_not_at_all(tmp_path: Any) -> None:
    file = tmp_path / "mapped"
    with open(file, "wb") as out:
        out.truncate(100 * MIB)
    code = (
        "import mmap, os, sys\n"
        "shared = mmap.mmap(-1, 50 << 20); shared.write(bytes(50 << 20))\n"
        "with open(sys.argv[1], 'rb') as f: mapped = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)\n"
        "for n in range(3):\n"
        "    if os.fork() == 0: break\n"
        "sum(shared[::4096]); sum(mapped[::4096])\n"
        "os.write(1, b'ready\\n')\n"
        "sys.stdin.read()"
    )
    process = python(code, str(file))
    for _ in range(4):
        assert line(process) == "ready"
    assert 50 * MIB < used(process) < 90 * MIB
    end(process)


@given(st.integers(0, 10**12), st.integers(1, 10**12), st.floats(0, 10))
def test_sampling_is_neither_idle_nor_a_burden(used: int, limit: int, cost_s: float) -> None:
    interval = limits.sample_interval(used, limit, cost_s)
    assert interval >= 20 * cost_s
    assert 0.02 <= interval <= max(1.0, 20 * cost_s)


# --- trees

# Prints the pids of a tree of all kinds: a child, its child in a session of its own, and one whose parent has ended.
TREE = """
import os, subprocess, sys
from flowfn_runtime import limits
limits.set_subreaper()
child = subprocess.Popen([sys.executable, "-c", '''
import os, time
if (grandchild := os.fork()) == 0:
    os.setsid()
    if (orphan := os.fork()) == 0:
        if (last := os.fork()) == 0:
            os.setsid()
            os.write(1, b"last %d\\\\n" % os.getpid())
            time.sleep(1000)
        os._exit(0)
    os.waitpid(orphan, 0)
    os.write(1, b"grandchild %d\\\\n" % os.getpid())
    time.sleep(1000)
time.sleep(1000)
'''])
os.write(1, b"child %d\\n" % child.pid)
sys.stdin.read()
"""


def read_tree(process: subprocess.Popen[str]) -> dict[str, int]:
    return {name: int(pid) for name, pid in (line(process).split() for _ in range(3))}


def gone(read: int) -> bool:
    """Whether every process that holds the other end of a pipe has ended; waits for it."""
    return os.read(read, 1) == b""


@pytest.mark.parametrize("listed", [True, False])
def test_descendants(listed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if listed and not limits._kernel_lists_children():
        pytest.skip("this kernel does not list the children of a process (CONFIG_PROC_CHILDREN)")
    monkeypatch.setattr(limits, "_kernel_lists_children", lambda: listed)
    process = python(TREE)
    tree = read_tree(process)
    found = limits.descendants(process.pid)
    assert set(tree.values()) <= set(found)
    assert found.index(tree["child"]) < found.index(tree["grandchild"])
    assert limits.descendants(tree["last"]) == []
    limits.kill_tree(process.pid)
    end(process)


def test_a_whole_tree_is_killed() -> None:
    read, write = os.pipe()
    process = python(TREE.replace("'''])", f"'''], pass_fds=[{write}])"), pass_fds=[write])
    os.close(write)
    read_tree(process)
    limits.kill_tree(process.pid)
    assert gone(read)
    assert process.wait() == -signal.SIGKILL
    process.communicate()
    os.close(read)
    limits.kill_tree(process.pid)  # nothing is left to kill, and that is no error


HOST = """
import os, subprocess, sys
from flowfn_runtime import limits
limits.set_subreaper()
limits.set_pdeathsig(9)
keep = subprocess.Popen(["sleep", "1000"])
write = int(sys.argv[2])
victim = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE, pass_fds=[write], text=True)
victim.stdout.readline()
if sys.argv[3] == "kill":
    limits.kill_tree(victim.pid)
else:
    os.kill(victim.pid, 9)
victim.wait()
limits.kill_orphans(keep=[keep.pid])
print(limits.describe_exit(victim.returncode), limits.children_of(os.getpid()) == [keep.pid], keep.poll(), flush=True)
keep.kill()
"""

# Forks, orphans and sessions as fast as it can, but no more than some hundreds of them.
MANY = """
import os, sys, time
from flowfn_runtime import limits
limits.set_subreaper()
print("started", flush=True)
for _ in range(int(sys.argv[1]) if len(sys.argv) > 1 else 150):
    if os.fork() == 0:
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                time.sleep(1000)
            time.sleep(1000)
        os._exit(0)
time.sleep(1000)
"""


@pytest.mark.parametrize("how", ["kill", "death"])
def test_nothing_survives_of_a_worker_that_forks_meanwhile(how: str) -> None:
    read, write = os.pipe()
    host = python(HOST, MANY, str(write), how, pass_fds=[write])
    os.close(write)
    assert line(host) == "killed by SIGKILL True None"
    assert gone(read)
    host.communicate()
    os.close(read)


def test_the_end_of_a_parent_is_signalled() -> None:
    read, write = os.pipe()
    code = (
        "import os, subprocess, sys\n"
        "inner = 'import time; from flowfn_runtime import limits; limits.set_pdeathsig(9)'\n"
        "inner += '; print(1, flush=True); time.sleep(1000)'\n"
        "subprocess.Popen([sys.executable, '-c', inner], pass_fds=[int(sys.argv[1])])\n"
        "sys.stdin.read()"
    )
    process = python(code, str(write), pass_fds=[write])
    os.close(write)
    assert line(process) == "1"
    end(process)
    assert gone(read)
    os.close(read)


def test_the_kernels_help_needs_no_ctypes() -> None:
    code = (
        "import sys; from flowfn_runtime import limits; limits.set_subreaper(); limits.set_pdeathsig(9)\n"
        "print('ctypes' in sys.modules, 'subprocess' in sys.modules, 'asyncio' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False False False\n"
    with pytest.raises(OSError, match="prctl"):
        limits._prctl(0x7FFF, 0)


# --- words


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import sys; sys.exit(0)", "exited with status 0"),
        ("import sys; sys.exit(3)", "exited with status 3"),
        ("import os; os.kill(os.getpid(), 9)", "killed by SIGKILL"),
        ("import os; os.kill(os.getpid(), 15)", "terminated by SIGTERM"),
        ("import os; os.kill(os.getpid(), 11)", "segmentation fault (SIGSEGV)"),
        ("import os; os.kill(os.getpid(), 10)", "killed by SIGUSR1"),
        ("import os; os.kill(os.getpid(), 40)", "killed by signal 40"),
    ],
)
def test_how_a_process_ended(code: str, words: str) -> None:
    returncode = subprocess.run([sys.executable, "-S", "-c", code]).returncode
    assert limits.describe_exit(returncode) == words
    if returncode < 0:
        assert limits.describe_exit(128 - returncode, shell=True) == words
        assert limits.describe_exit(128 - returncode) == f"exited with status {128 - returncode}"
