"""Workers that die, in every way that processes die."""

from __future__ import annotations

import os
import signal

import pytest
from fault_scene import Scene

HEAD = """
import ctypes, os, signal, subprocess, sys, time
from pathlib import Path
import flowfn as flow
here = Path(__file__).parent

def touch(path):
    Path(path).touch()

def only_once(name):
    # True in one process only, whoever asks.
    try:
        os.close(os.open(here / name, os.O_CREAT | os.O_EXCL))
        return True
    except FileExistsError:
        return False

def outcome(function, *args):
    try:
        value = function(*args)
    except BaseException as error:
        print("raised", type(error).__name__, getattr(error, "exitcode", "-"), str(error).replace("\\n", " | "))
        return error
    print("returned", repr(value))
    return value
"""


def test_a_worker_killed_in_mid_call_does_not_lose_the_call(scene: Scene) -> None:
    program = scene.start(
        HEAD
        + """
@flow.function(max_workers=1)
def work():
    if only_once("first"):
        print("busy", os.getpid(), flush=True)
        signal.pause()
    return os.getpid()

outcome(work.remote)
outcome(work.remote)
"""
    )
    victim = int(program.expect("busy"))
    os.kill(victim, signal.SIGKILL)
    survivor = int(program.expect("returned"))
    assert survivor != victim
    assert int(program.expect("returned")) == survivor
    assert program.end().code == 0


def test_retries_are_not_burnt_by_lost_workers(scene: Scene) -> None:
    out = scene.run(
        HEAD
        + """
@flow.function(max_workers=1, retries=1)
def work():
    with open(here / "attempts", "a") as file:
        file.write("x")
    attempt = len((here / "attempts").read_text())
    if attempt <= 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if attempt == 3:
        raise ValueError("the function's own failure")
    return attempt

outcome(work.remote)
"""
    ).out
    assert out == "returned 4\n"


def test_a_map_loses_and_doubles_nothing_when_workers_are_killed(scene: Scene) -> None:
    program = scene.start(
        HEAD
        + """
import threading
@flow.function(max_workers=3)
def work(x):
    time.sleep(0.002)
    return x, os.getpid()

victims = set()
results = []
for x, pid in work.map(range(600)):
    results.append(x)
    if x and x % 100 == 0:
        os.kill(pid, signal.SIGKILL)  # it may be at any item, or between two, or in the middle of an answer
        victims.add(pid)
assert results == list(range(600)), results
assert len(victims) >= 2, victims
unordered = []
for x, pid in work.map(range(600), order_outputs=False):
    unordered.append(x)
    if len(unordered) % 100 == 50:
        os.kill(pid, signal.SIGKILL)
assert sorted(unordered) == list(range(600)), unordered
print("whole")
"""
    )
    program.expect("whole")
    assert program.end().code == 0


def test_big_results_survive_the_death_of_the_worker_that_made_them(scene: Scene) -> None:
    out = scene.run(
        HEAD
        + """
import numpy as np
@flow.function(max_workers=1)
def make(x):
    if x == 3 and only_once("once"):
        os.kill(os.getpid(), signal.SIGKILL)
    return np.full(300_000, x)

kept = list(make.map(range(6)))
for x, array in enumerate(kept):
    assert array.shape == (300_000,) and (array == x).all(), (x, array)
kept_too = make.remote(7)
os.kill(outcome(flow.function(max_workers=1)(os.getpid).remote), signal.SIGKILL)
assert (kept_too == 7).all()
print("whole")
"""
    ).out
    assert out.endswith("whole\n")


def test_every_worker_killed_again_and_again_ends_in_worker_lost(scene: Scene) -> None:
    out = scene.run(
        HEAD
        + """
@flow.function(max_workers=2, retries=3)
def suicide(x=0):
    with open(here / "tries", "a") as file:
        file.write("x")
    os.kill(os.getpid(), signal.SIGKILL)

error = outcome(suicide.remote)
assert type(error) is flow.WorkerLost, error
print("tries", len((here / "tries").read_text()))
(here / "tries").unlink()
error = outcome(lambda: list(suicide.map([1])))
print("tries", len((here / "tries").read_text()))
results = list(suicide.map(range(4), return_exceptions=True))
print([type(result).__name__ for result in results])
"""
    ).out
    lines = out.splitlines()
    assert lines[0].startswith("raised WorkerLost -9 ") and "killed by SIGKILL" in lines[0] and "3 times" in lines[0]
    assert lines[1] == "tries 3"
    assert lines[2].startswith("raised WorkerLost -9 ")
    assert lines[3] == "tries 3"
    assert lines[4] == str(["WorkerLost"] * 4)


def test_workers_killed_before_they_can_start_a_call_end_in_an_error(scene: Scene) -> None:
    # Somebody (a job of the system, an unlucky administrator) kills every worker as soon as there is one.
    program = scene.start(
        HEAD
        + """
import threading
@flow.function(max_workers=1)
def work():
    return os.getpid()
host = int(Path(f"/proc/{work.remote()}/stat").read_text().rpartition(")")[2].split()[1])
stop = threading.Event()
def killer():
    while not stop.is_set():
        for entry in Path(f"/proc/{host}/task/{host}/children").read_text().split():
            try:
                os.kill(int(entry), signal.SIGKILL)
            except ProcessLookupError:
                pass
thread = threading.Thread(target=killer)
thread.start()
try:
    for _ in range(5):
        outcome(work.remote)
finally:
    stop.set()
    thread.join()
print("then", work.remote() > 0)
""",
    )
    if not os.path.exists("/proc/thread-self/children"):
        program.process.kill()
        program.end()
        pytest.skip("this kernel does not list a process's children")
    assert program.expect("then") == "True"
    result = program.end()
    assert result.code == 0
    for line in result.out.splitlines()[:-1]:
        assert line.startswith(("returned ", "raised WorkerLost -9", "raised BackendUnavailable")), result.out


@pytest.mark.parametrize(
    ("how", "code", "words"),
    [
        ("os._exit(3)", 3, "exited with status 3"),
        ("os._exit(0)", 0, "exited with status 0"),
        ("ctypes.string_at(0)", -signal.SIGSEGV, "segmentation fault"),
        ("os.abort()", -signal.SIGABRT, "aborted"),
        ("os.kill(os.getpid(), signal.SIGBUS)", -signal.SIGBUS, "bus error"),
        ("signal.alarm(1); signal.pause()", -signal.SIGALRM, "SIGALRM"),
        ("deep_c()", -signal.SIGSEGV, "segmentation fault"),
        ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)", -signal.SIGTERM, "terminated by SIGTERM"),
    ],
)
def test_a_worker_that_ends_itself_is_a_worker_lost_that_says_how(
    scene: Scene, how: str, code: int, words: str
) -> None:
    out = scene.run(
        HEAD
        + f"""
def deep_c():
    # Overflows the stack of C long before Python's own limit is reached.
    import threading
    nested = []
    for _ in range(900):
        nested = [nested]
    threading.stack_size(1 << 15)
    thread = threading.Thread(target=repr, args=(nested,))
    thread.start()
    thread.join()

@flow.function(max_workers=1)
def end(x=0):
    {how}

@flow.function(max_workers=1)
def fine(x=0):
    return "fine"

outcome(end.remote)
outcome(fine.remote)
results = list(end.map(range(2), return_exceptions=True))
print([(type(result).__name__, result.exitcode) for result in results])
outcome(fine.remote)
"""
    ).out
    lines = out.splitlines()
    assert lines[0].startswith(f"raised WorkerLost {code} ") and words in lines[0], out
    assert lines[1] == "returned 'fine'"
    assert lines[2] == str([("WorkerLost", code)] * 2)
    assert lines[3] == "returned 'fine'"


@pytest.mark.parametrize(
    ("how", "type_name"),
    [
        ("sys.exit(3)", "RemoteError"),
        ("raise KeyboardInterrupt", "RemoteError"),
        ("deep(0)", "RecursionError"),
        ("raise GeneratorExit", "RemoteError"),
    ],
)
def test_what_python_can_catch_costs_no_worker(scene: Scene, how: str, type_name: str) -> None:
    out = scene.run(
        HEAD
        + f"""
def deep(n):
    return deep(n + 1)

@flow.function(max_workers=1)
def fail():
    {how}

@flow.function(max_workers=1)
def where():
    return os.getpid()

before = where.remote()
error = outcome(fail.remote)
outcomes = list(fail.map([], return_exceptions=True))
print("same", where.remote() == before)
print([type(result).__name__ for result in flow.function(max_workers=1)(lambda x: {how.removeprefix("raise ")}
    if not {how.startswith("raise")} else fail()).map(range(2), return_exceptions=True)])
print("same", where.remote() == before)
"""
    ).out
    lines = out.splitlines()
    assert lines[0].startswith(f"raised {type_name} "), out
    assert lines[1] == "same True"
    assert lines[2] == str([type_name] * 2)
    assert lines[3] == "same True"


def test_what_a_call_started_ends_with_its_worker_however_it_was_daemonised(scene: Scene) -> None:
    program = scene.start(
        HEAD
        + """
def daemon(depth):
    # Double-forked, in a session of its own, with every descriptor closed, and deaf to polite signals.
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
            os.closerange(0, 8192)
            while True:
                signal.pause()
        os._exit(0)
    os.wait()

@flow.function(max_workers=1)
def leave_things_behind(way):
    for depth in range(3):
        daemon(depth)
    subprocess.Popen(["sleep", "1000"], start_new_session=True)
    print("left", flush=True)
    if way == "return":
        return True
    if way == "crash":
        os._exit(9)
    time.sleep(1000)

@flow.function(max_workers=1, timeout=5)
def with_timeout(way):
    return leave_things_behind(way)

outcome(leave_things_behind.remote, "crash")
print("now", flush=True)
sys.stdin.readline()
outcome(with_timeout.remote, "hang")
print("now", flush=True)
sys.stdin.readline()
future = leave_things_behind.spawn("hang")
print("spawned", flush=True)
sys.stdin.readline()
assert future.cancel()
print("now", flush=True)
sys.stdin.readline()
outcome(leave_things_behind.remote, "return")
flow.shutdown()
print("now", flush=True)
sys.stdin.readline()
outcome(leave_things_behind.remote, "return")
"""
    )

    def only_flowfn_goes_on() -> None:
        # The pids go one after another; those that stay are the client, its host and idle workers.
        program.expect("now")
        import time

        deadline = time.monotonic() + 30
        while True:
            left = scene.processes()
            strays = [pid for pid, what in left.items() if what.startswith("sleep") or _is_deaf(pid)]
            if not strays:
                break
            assert time.monotonic() < deadline, left
        program.tell("go on")

    program.expect("left")
    program.expect("raised WorkerLost 9")
    only_flowfn_goes_on()
    program.expect("left")
    program.expect("raised FunctionTimeout")
    only_flowfn_goes_on()
    program.expect("spawned")
    program.expect("left")
    program.tell("go on")
    only_flowfn_goes_on()
    program.expect("left")
    program.expect("returned")
    only_flowfn_goes_on()
    program.expect("left")
    assert program.end().code == 0


def _is_deaf(pid: int) -> bool:
    """Whether a process ignores SIGTERM and SIGHUP, as the daemons of this file do."""
    try:
        with open(f"/proc/{pid}/status") as file:
            ignored = next(int(line.split()[1], 16) for line in file if line.startswith("SigIgn"))
    except (OSError, StopIteration):
        return False
    return bool(ignored >> (signal.SIGTERM - 1) & 1 and ignored >> (signal.SIGHUP - 1) & 1)


def test_a_fork_bombs_children_are_ended(scene: Scene) -> None:
    out = scene.run(
        HEAD
        + """
@flow.function(max_workers=1, timeout=3)
def bomb(generations):
    # Bounded: 2 ** generations processes, all of which would stay for ever.
    for _ in range(generations):
        os.fork()
    while True:
        time.sleep(1000)

outcome(bomb.remote, 6)
@flow.function(max_workers=1)
def fine():
    return "fine"
outcome(fine.remote)
flow.shutdown()
"""
    ).out
    assert out.splitlines()[0].startswith("raised FunctionTimeout")
    assert out.splitlines()[1] == "returned 'fine'"


def test_a_forked_child_that_returns_into_the_worker_gives_no_second_result(scene: Scene) -> None:
    out = scene.run(
        HEAD
        + """
@flow.function(max_workers=1)
def fork(x):
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
    return x, "parent" if pid else "child"

for x in range(3):
    outcome(fork.remote, x)
print(list(fork.map(range(4))))
@flow.function(max_workers=1)
def fork_and_raise(x):
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
    raise ValueError("parent" if pid else "child")
outcome(fork_and_raise.remote, 1)
@flow.function(max_workers=1)
def fork_in_a_generator():
    yield 1
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
    yield "parent" if pid else "child"
print(list(fork_in_a_generator.remote()))
"""
    ).out
    assert out.splitlines() == [
        "returned (0, 'parent')",
        "returned (1, 'parent')",
        "returned (2, 'parent')",
        "[(0, 'parent'), (1, 'parent'), (2, 'parent'), (3, 'parent')]",
        "raised ValueError - parent",
        "[1, 'parent']",
    ]


def test_memory_over_the_limit_is_out_of_memory_naming_limit_and_peak(scene: Scene) -> None:
    out = scene.run(
        HEAD
        + """
@flow.function(memory="200MiB", max_workers=1)
def fill(mib):
    held = []
    for _ in range(mib // 10):
        held.append(bytearray(os.urandom(1 << 20) * 10))
        time.sleep(0.001)
    return len(held)

@flow.function(memory="200MiB", max_workers=1)
def fill_in_a_child():
    code = "import time; held = bytearray(b'x') * (400 << 20); time.sleep(1000)"
    subprocess.run([sys.executable, "-c", code])

for function, args in ((fill, (400,)), (fill_in_a_child, ())):
    error = outcome(function.remote, *args)
    assert isinstance(error, flow.OutOfMemory) and isinstance(error, (MemoryError, flow.WorkerLost)), error
    assert error.limit_bytes == 200 << 20 and error.peak_bytes > error.limit_bytes, vars(error)
print("fits", fill.remote(100))
results = list(fill.map([50, 400, 60], return_exceptions=True))
print([result if isinstance(result, int) else type(result).__name__ for result in results])
"""
    ).out
    lines = out.splitlines()
    assert "limit is 200 MiB" in lines[0] and "MiB of memory" in lines[0]
    assert lines[2:] == ["fits 10", "[5, 'OutOfMemory', 6]"]


def test_a_stopped_worker_is_ended_by_its_timeout(scene: Scene) -> None:
    out = scene.run(
        HEAD
        + """
@flow.function(max_workers=1, timeout=0.5)
def stop(x=0):
    os.kill(os.getpid(), signal.SIGSTOP)

@flow.function(max_workers=1, timeout=0.5)
def stop_with_children():
    subprocess.Popen(["sleep", "1000"])
    os.kill(os.getpid(), signal.SIGSTOP)

outcome(stop.remote)
outcome(stop_with_children.remote)
results = list(stop.map(range(3), return_exceptions=True))
print([type(result).__name__ for result in results])
future = stop.options(timeout=None).spawn()
"""
    ).out
    assert [line.split()[1] for line in out.splitlines()[:2]] == ["FunctionTimeout"] * 2
    assert out.splitlines()[2] == str(["FunctionTimeout"] * 3)


@pytest.mark.parametrize(
    "deed",
    [
        "[os.close(fd) for fd in (1, 2) if os.path.exists(f'/proc/self/fd/{fd}')]",
        "sys.stdout.close(); sys.stderr.close()",
        "sys.stdout = sys.stderr = None",
        "sys.stdout = open(os.devnull, 'w'); os.dup2(os.open(os.devnull, os.O_RDWR), 1)",
        "os.closerange(3, 256)",
        "os.closerange(0, 256)",
        "[print('x' * 1000) for _ in range(2000)]; [os.write(2, os.urandom(1000)) for _ in range(2000)]",
        "os.write(1, b'\\xff\\xfe\\x00' * 100_000)",
        "os.set_blocking(1, False); os.set_blocking(2, False)",
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.signal(signal.SIGPIPE, signal.SIG_DFL)",
        "os.environ.clear()",
        "sys.path.clear()",
        "sys.path = None",
        "sys.setswitchinterval(5)",
        "os.chdir('/'); os.umask(0o777)",
        "import threading; threading.stack_size(1 << 20)",
        "import builtins; builtins.print = None",
    ],
)
def test_a_call_that_spoils_its_process_gets_its_result(scene: Scene, deed: str) -> None:
    out = scene.run(
        HEAD
        + f"""
@flow.function(max_workers=1)
def spoil(x):
    {deed}
    return x

@flow.function(max_workers=1)
def after(x):
    return x + 1

class Large:
    data = bytes(40_000_000)
    def __add__(self, one):
        return self.data

assert spoil.remote(1) == 1
assert spoil.spawn(2).result() == 2
assert after.remote(2) == 3
assert list(after.map(range(1000))) == list(range(1, 1001))
assert list(spoil.map([5])) == [5]
assert len(after.remote(Large())) == 40_000_000
sys.__stderr__.write("whole")
"""
    ).err
    assert out.endswith("whole")


@pytest.mark.parametrize(
    "deed",
    [
        "os.closerange(0, 70_000)",
        "flood(fds())",
        "flood(fds(), junk=bytes(36))",
        "[os.dup2(os.open(os.devnull, os.O_RDWR), fd) for fd in fds()]",
    ],
)
def test_a_call_that_breaks_its_own_stream_loses_its_worker_and_no_other(scene: Scene, deed: str) -> None:
    out = scene.run(
        HEAD
        + f"""
def fds():
    return [int(name) for name in os.listdir("/proc/self/fd") if int(name) > 2]

def flood(fds, junk=b"fN" + bytes(range(200)) * 50):
    for fd in fds:
        try:
            os.set_blocking(fd, False)
            os.write(fd, junk)
        except OSError:
            pass

@flow.function(max_workers=1)
def harm(x):
    {deed}
    return x

@flow.function(max_workers=1)
def fine(x):
    return x + 1

@flow.function(max_workers=1, idle_timeout=200)
def elsewhere(x):
    return x * 2

future = elsewhere.spawn(5)
error = outcome(harm.remote, 1)
assert isinstance(error, flow.WorkerLost), error
assert fine.remote(1) == 2
assert future.result() == 10
print([type(result).__name__ for result in harm.map([1], return_exceptions=True)])
assert list(fine.map(range(100))) == list(range(1, 101))
print("whole")
"""
    ).out
    lines = out.splitlines()
    assert lines[0].startswith("raised WorkerLost")
    assert lines[1:] == [str(["WorkerLost"]), "whole"]


def test_signal_handlers_of_a_call_harm_no_other(scene: Scene) -> None:
    out = scene.run(
        HEAD
        + """
class Late(Exception):
    pass

@flow.function(max_workers=1)
def late():
    def on_alarm(*_):
        raise Late("too late")
    signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    time.sleep(60)

@flow.function(max_workers=1)
def interrupted_often():
    ticks = []
    signal.signal(signal.SIGALRM, lambda *_: ticks.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    deadline = time.monotonic() + 0.2
    while time.monotonic() < deadline:
        pass
    return bytes(300_000)

@flow.function(max_workers=1)
def stop_ticking():
    signal.setitimer(signal.ITIMER_REAL, 0)
    return "quiet"

@flow.function(max_workers=1)
def where(x=None):
    return os.getpid()

outcome(late.remote)
before = where.remote()
assert interrupted_often.remote() == bytes(300_000)  # the ticking goes on while the worker sends and waits
for n in range(300):
    assert where.remote(bytes(n * 1000)) == before
assert set(where.map(range(2000))) == {before}
outcome(stop_ticking.remote)
"""
    ).out
    assert out.splitlines() == ["raised Late - too late", "returned 'quiet'"]


def test_an_alarm_that_goes_off_after_its_call_is_not_blamed_on_the_next(scene: Scene) -> None:
    out = scene.run(
        HEAD
        + """
@flow.function(max_workers=1)
def careless():
    signal.setitimer(signal.ITIMER_REAL, 0.05)  # nobody handles it: the kernel ends the process
    return os.getpid()

@flow.function(max_workers=1)
def careful():
    return "fine"

pid = careless.remote()
pidfd = os.pidfd_open(pid)
import select
select.select([pidfd], [], [])
outcome(careful.remote)
pid = careless.remote()
pidfd = os.pidfd_open(pid)
select.select([pidfd], [], [])
print(list(careful.map([]) ), list(flow.function(max_workers=1)(lambda x: x).map([1, 2, 3])))
"""
    ).out
    assert out.splitlines() == ["returned 'fine'", "[] [1, 2, 3]"]


def test_what_floods_the_output_for_ever_holds_up_no_result(scene: Scene) -> None:
    err = scene.run(
        HEAD
        + """
@flow.function(max_workers=1)
def start_flood(x):
    subprocess.Popen(["sh", "-c", "while true; do head -c 10000000 /dev/zero; done"])
    return x

assert start_flood.remote(1) == 1
assert [start_flood.remote(n) for n in range(3)] == [0, 1, 2]
assert list(start_flood.map(range(4))) == [0, 1, 2, 3]
flow.shutdown()
sys.stderr.write("whole")
"""
    ).err
    assert err == "whole"


def test_last_words_are_heard(scene: Scene) -> None:
    result = scene.run(
        HEAD
        + """
@flow.function(max_workers=1)
def assertion_in_c(x):
    os.write(2, b"assertion failed: x > 0\\n" * 3)
    print("and", x, flush=True)
    os.abort()

future = assertion_in_c.spawn(5)
outcome(future.result)
assert future.logs().count("assertion failed: x > 0") == 3 and "and 5" in future.logs(), future.logs()
list(assertion_in_c.map([1], return_exceptions=True))
"""
    )
    assert result.err.count("assertion failed: x > 0") == 6
    assert "and 5" in result.out and "and 1" in result.out


def test_threads_and_processes_of_a_call_that_go_on_harm_no_other(scene: Scene) -> None:
    out = scene.run(
        HEAD
        + """
import threading
@flow.function(max_workers=1)
def leave_a_thread():
    def chatter():
        while True:
            print("chatter")
            time.sleep(0.001)
    threading.Thread(target=chatter, daemon=True).start()
    threading.Thread(target=time.sleep, args=(1000,)).start()  # not a daemon: it must not keep the worker alive
    return True

@flow.function(max_workers=1)
def where(x):
    return os.getpid()

leave_a_thread.remote()
assert len({where.remote(n) for n in range(200)}) == 1
assert len(set(where.map(range(2000)))) == 1
sys.stderr.write("whole")
"""
    )
    assert out.err == "whole"


def test_a_result_that_cannot_be_rebuilt_here_is_an_error_and_no_hang(scene: Scene) -> None:
    out = scene.run(
        HEAD
        + """
def boom(*_):
    raise RuntimeError("not here")

class OnlyThere:
    def __reduce__(self):
        return (explode_here, (os.getpid(),))

def explode_here(pid):
    if os.getpid() != pid:
        raise RuntimeError("only in the worker")
    return OnlyThere()

class OddError(Exception):
    def __init__(self, a, b):
        super().__init__(a)
    def __reduce__(self):
        return (explode_here, (os.getpid(),))

@flow.function(max_workers=1)
def give(x=0):
    return OnlyThere()

@flow.function(max_workers=1)
def throw():
    raise OddError(1, 2)

@flow.function(max_workers=1)
def unpicklable(x=0):
    return {"lock": __import__("threading").Lock()}

@flow.function(max_workers=1)
def fine(x):
    return x

outcome(give.remote)
future = give.spawn()
outcome(future.result)
print(future.status, type(future.exception()).__name__)
print([type(result).__name__ for result in give.map(range(3), return_exceptions=True)])
outcome(lambda: list(give.map(range(3))))
outcome(throw.remote)
outcome(unpicklable.remote)
print([type(result).__name__ for result in unpicklable.map(range(3), return_exceptions=True)])
outcome(fine.remote, 1)
"""
    ).out
    lines = out.splitlines()
    assert lines[0].startswith("raised SerializationError") and "only in the worker" in lines[0]
    assert lines[1].startswith("raised SerializationError")
    assert lines[2] == "failed SerializationError"
    assert lines[3] == str(["SerializationError"] * 3)
    assert lines[4].startswith("raised SerializationError")
    assert lines[5].startswith("raised OddError - 1")
    assert lines[6].startswith("raised SerializationError") and "['lock']" in lines[6]
    assert lines[7] == str(["SerializationError"] * 3)
    assert lines[8] == "returned 1"
