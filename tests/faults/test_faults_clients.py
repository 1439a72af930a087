"""Clients that are killed, interrupted, forked, run out of something, or just end: what is left of them?"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import pytest
from fault_scene import BOUND_S, STRESS, Scene

HEAD = """
import os, signal, subprocess, sys, threading, time
from pathlib import Path
import flowfn as flow
here = Path(__file__).parent

@flow.function(max_workers=2)
def double(x):
    return 2 * x

@flow.function(max_workers=2)
def hang(*_):
    print("hanging", os.getpid(), flush=True)
    while True:
        time.sleep(1000)

@flow.function
def host_of(_=None):
    return os.getppid()
"""


# kill -9 of the client

KILL_WHEN = {
    "idle": """
        double.remote(1)
        print("hanging now", flush=True)
        signal.pause()
    """,
    "in mid-call": "hang.remote()",
    "in a call that ignores signals": """
        @flow.function
        def deaf():
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGPIPE):
                signal.signal(number, signal.SIG_IGN)
            os.closerange(0, 3)
            Path(here / "deaf").touch()
            while True:
                signal.pause()
        future = deaf.spawn()
        while not (here / "deaf").exists() and not future.done():
            time.sleep(0.001)
        print("hanging now", flush=True)
        future.result()
    """,
    "in mid-map": """
        for n, _ in enumerate(flow.function(time.sleep).map(0.001 for _ in range(10**9))):
            if n == 200:
                print("hanging now", flush=True)
    """,
    "with processes of its calls": """
        @flow.function
        def family():
            subprocess.Popen(["sleep", "1000"])
            subprocess.Popen(["sleep", "1001"], start_new_session=True)
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0:
                    os.closerange(0, 8192)
                    time.sleep(1000)
                os._exit(0)
            os.wait()
            print("hanging", flush=True)
            time.sleep(1000)
        family.remote()
    """,
    "with shared memory": """
        import numpy as np
        big = np.ones(4_000_000)
        shared = flow.put(big)
        @flow.function(max_workers=2)
        def there_and_back(array, shared):
            return array + shared
        kept = [there_and_back.remote(big, shared) for _ in range(3)]
        print("hanging now", flush=True)
        while True:
            there_and_back.remote(big, shared)
    """,
    "with cores claimed": """
        @flow.function(cpu=1, max_workers=2)
        def busy(_):
            print("hanging", flush=True)
            while True:
                pass
        list(busy.map(range(2)))
    """,
    "while it generates": """
        @flow.function
        def count():
            n = 0
            while True:
                yield n
                n += 1
        for n in count.remote():
            if n == 100:
                print("hanging now", flush=True)
    """,
    "with workers of workers": """
        @flow.function
        def outer():
            hang.remote()
        outer.remote()
    """,
    "with files mounted": """
        (here / "data").mkdir()
        (here / "data" / "file").write_text("content")
        @flow.function(mounts={"/data": str(here / "data")})
        def read():
            assert Path("/data/file").read_text() == "content"
            print("hanging", flush=True)
            time.sleep(1000)
        read.remote()
    """,
}


@pytest.mark.parametrize("when", KILL_WHEN)
def test_a_killed_client_leaves_nothing(scene: Scene, when: str) -> None:
    import textwrap

    program = scene.start(HEAD + textwrap.dedent(KILL_WHEN[when]))
    program.expect("hanging")
    assert len(scene.processes()) >= 2
    program.kill()
    assert program.end().code == -signal.SIGKILL
    scene.check_nothing_left()


def test_a_client_killed_at_any_moment_leaves_nothing(scene: Scene) -> None:
    import random

    body = (
        HEAD
        + """
print("go", flush=True)
import numpy as np
double.remote(1)
print("first", flush=True)
for n in range(50):
    double.remote(np.ones(100_000))
    assert list(double.map(range(100))) == list(range(0, 200, 2))
future = [double.spawn(n) for n in range(10)]
flow.shutdown()
double.remote(1)
"""
    )
    seed = random.randrange(10**6)
    chance = random.Random(seed)
    print("seed", seed)
    for _ in range(8 * STRESS):
        program = scene.start(body)
        if chance.random() < 0.7:
            program.expect("go")
        timer = threading.Timer(chance.random() ** 2 * 0.6, program.process.kill)
        timer.start()
        program.process.wait(BOUND_S)
        timer.join()
        program.end()
        scene.check_nothing_left()


# kill -9 of the host


def test_a_killed_host_loses_no_call_and_leaves_nothing(scene: Scene) -> None:
    out = scene.run(
        HEAD
        + """
@flow.function(max_workers=2)
def family(x):
    subprocess.Popen(["sleep", "1000"], start_new_session=True)
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(1000)
        os._exit(0)
    os.wait()
    try:
        os.close(os.open(here / f"once{x}", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return x
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(1000)

assert family.remote(1) == 1
assert list(family.map([2, 3])) == [2, 3]
os.kill(host_of.remote(), signal.SIGKILL)
assert double.remote(1) == 2
assert sorted(double.map(range(1000), order_outputs=False)) == list(range(0, 2000, 2))
print("whole")
"""
    ).out
    assert out == "whole\n"


def test_a_host_killed_again_and_again_ends_in_worker_lost(scene: Scene) -> None:
    out = scene.run(
        HEAD
        + """
@flow.function(max_workers=1)
def kill_host():
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(1000)
try:
    kill_host.remote()
except flow.WorkerLost as error:
    print(error)
print(double.remote(4))
"""
    ).out
    assert "host process" in out and "SIGKILL" in out and "3 times" in out
    assert out.endswith("\n8\n")


# interpreter exit


def test_exit_with_futures_pending_says_so_and_ends(scene: Scene) -> None:
    result = scene.run(
        HEAD
        + """
futures = [hang.spawn(n) for n in range(10)]
waiting = [double.spawn(n) for n in range(10)]
while not any(future.status == "running" for future in futures):
    time.sleep(0.001)
"""
    )
    assert "not finished when the program ended" in result.err
    assert "Traceback" not in result.err and "Exception" not in result.err


EXITS = {
    "just after spawn": "future = double.spawn(1)",
    "without asking a finished future": "future = double.spawn(1); future.exception()",
    "in the middle of a map": "results = iter(double.map(range(10**6))); next(results)",
    "in the middle of a map with a slow source": """
        def slow():
            yield 1
            time.sleep(1000)
        results = iter(double.map(slow())); next(results)
    """,
    "with an iterator of values": """
        @flow.function
        def count():
            yield from range(10**9)
        values = count.remote()
        assert next(values) == 0
    """,
    "while calls flood the output": """
        @flow.function(max_workers=2)
        def flood(_):
            print("hanging", flush=True)
            while True:
                print("x" * 100)
        futures = [flood.spawn(n) for n in range(2)]
        while not futures[0].logs() and not futures[1].logs():
            time.sleep(0.001)
    """,
    "by sys.exit in a thread's company": """
        threading.Thread(target=lambda: [double.remote(n) for n in range(300)]).start()
        double.remote(1)
        sys.exit()
    """,
    "with threads that call still": """
        def calling():
            try:
                while True:
                    double.remote(1)
            except flow.FlowError:
                pass
        for _ in range(4):
            threading.Thread(target=calling, daemon=True).start()
        double.remote(1)
    """,
    "with an executor": """
        executor = flow.Executor(2)
        futures = [executor.submit(pow, 2, n) for n in range(100)]
        futures[-1].add_done_callback(lambda future: print("done", future.result() == 2**99, flush=True))
    """,
    "with an executor, at once": "executor = flow.Executor(2)",
    "with a map of an executor": "results = flow.Executor(2).map(pow, range(100), range(100))",
    "with an executor whose calls are cancelled": """
        executor = flow.Executor(1)
        first = executor.submit(time.sleep, 0.1)
        while not first.running():
            time.sleep(0.001)
        futures = [executor.submit(pow, 2, n) for n in range(100)]
        executor.shutdown(cancel_futures=True)
        assert all(future.cancelled() or future.done() for future in futures)
        assert any(future.cancelled() for future in futures)
        print(first.result())
    """,
    "with an executor not waited for": """
        executor = flow.Executor(1)
        future = executor.submit(pow, 2, 3)
        executor.shutdown(wait=False)
        print(future.result())
    """,
    "with a call in an exit handler": """
        import atexit
        atexit.register(lambda: print("late", double.remote(2)))
    """,
    "with a call in a finaliser": """
        class Late:
            def __del__(self):
                try:
                    double.remote(2)
                except Exception:
                    pass
        late = Late()
        double.remote(1)
        import builtins
        builtins.late = late
    """,
    "in an asyncio task": """
        import asyncio
        async def main():
            task = asyncio.ensure_future(asyncio.wrap_future(hang.spawn()))
            await double.spawn(1)
        asyncio.run(main())
    """,
    "with a pool shut down twice": "double.remote(1); flow.shutdown(); flow.shutdown(); double.remote(1)",
}


@pytest.mark.parametrize("when", EXITS)
def test_the_interpreter_ends(scene: Scene, when: str) -> None:
    import textwrap

    # An iterator that is left open has an open socket, which the interpreter may say in development mode.
    options = ("-W", "error", "-W", "ignore::ResourceWarning")
    for _ in range(2 * STRESS):
        result = scene.run(HEAD + textwrap.dedent(EXITS[when]), options=options)
        for word in ("Traceback", "Exception ignored", "Fatal", "RuntimeError"):
            assert word not in result.err, result.err
        if when == "with an executor":
            assert result.out == "done True\n"
        if when == "with a call in an exit handler":
            assert result.out == "late 4\n"
        scene.check_nothing_left()


# outputs that are closed


@pytest.mark.parametrize(
    "redirection", ["1>&-", "2>&-", "0<&-", "1>&- 2>&-", "0<&- 1>&- 2>&-", "1>/dev/full", "0<&- 2>&-"]
)
def test_a_client_without_standard_streams_works(scene: Scene, redirection: str) -> None:
    script = scene.script(
        HEAD
        + """
import numpy as np
@flow.function(max_workers=1)
def chatty(x):
    print("to stdout", flush=True)
    os.write(2, b"to stderr")
    subprocess.run(["sh", "-c", "echo from a child; echo and its errors >&2"])
    return x + 1
results = [chatty.remote(1), chatty.spawn(2).result(), *chatty.map(range(5))]
array = chatty.remote(np.ones(300_000))
assert array.sum() == 600_000
Path(here / "results").write_text(repr(results))
os._exit(0) if "full" in sys.argv[1] else None  # the interpreter itself complains of /dev/full
"""
    )
    shell = f'exec "{sys.executable}" "{script}" "{redirection}" {redirection}'
    subprocess.run(["sh", "-c", shell], env=scene.environ(), timeout=BOUND_S, check=True)
    assert (scene.root / "results").read_text() == "[2, 3, 1, 2, 3, 4, 5]"
    scene.check_nothing_left()


def test_a_reader_that_goes_away_ends_no_call(scene: Scene) -> None:
    # As `program | head -1`.
    script = scene.script(
        HEAD
        + """
@flow.function(max_workers=1)
def chatty(x):
    for _ in range(1000):
        print("x" * 100)
    return x
results = list(chatty.map(range(20)))
Path(here / "results").write_text(repr(results))
os._exit(0)
"""
    )
    subprocess.run(["sh", "-c", f'"{sys.executable}" "{script}" | head -1'], env=scene.environ(), timeout=BOUND_S)
    scene.await_no_process()
    assert (scene.root / "results").read_text() == repr(list(range(20)))


# many at once


def test_200_clients_at_once_leave_nothing(scene: Scene) -> None:
    script = scene.script(
        """
        import sys
        import flowfn as flow
        @flow.function(max_workers=1)
        def double(x):
            return 2 * x
        n = int(sys.argv[1])
        assert double.remote(n) == 2 * n
        print("ready", flush=True)
        sys.stdin.read()
        assert list(double.map(range(n))) == list(range(0, 2 * n, 2))
        print("done", double.remote(n), flush=True)
        """
    )
    # All are there at once, but they are started a few at a time: this is about what they share, not about load.
    clients: list[subprocess.Popen[str]] = []
    env = scene.environ()
    try:
        for n in range(200):
            clients.append(
                subprocess.Popen(
                    [sys.executable, str(script), str(n)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    env=env,
                    text=True,
                )
            )
            if n >= 8:
                stdout = clients[n - 8].stdout
                assert stdout is not None and stdout.readline() == "ready\n", clients[n - 8].communicate()
        for client in clients[-8:]:
            assert client.stdout is not None and client.stdout.readline() == "ready\n", client.communicate()
        assert len(scene.processes()) >= 400
        for client in clients[:50]:
            client.kill()
        for n, client in enumerate(clients):
            out, err = client.communicate(timeout=BOUND_S)
            if n >= 50:
                assert (client.returncode, out, err) == (0, f"done {2 * n}\n", "")
    finally:
        for client in clients:
            if client.poll() is None:
                client.kill()
                client.communicate()
    scene.check_nothing_left()


# fork in the client

FORKS = {
    "os.fork": """
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                use("child")
                code = 0
            finally:
                flow.shutdown()
                os._exit(code)
        use("parent")
        assert os.waitpid(pid, 0)[1] == 0
    """,
    "os.fork that ends as a program does": """
        pid = os.fork()
        use("child" if pid == 0 else "parent")
        if pid == 0:
            sys.exit()
        assert os.waitpid(pid, 0)[1] == 0
    """,
    "multiprocessing": """
        import multiprocessing
        process = multiprocessing.get_context("fork").Process(target=use, args=("child",))
        process.start()
        use("parent")
        process.join()
        assert process.exitcode == 0, process.exitcode
    """,
    "ProcessPoolExecutor": """
        import concurrent.futures, multiprocessing
        context = multiprocessing.get_context("fork")
        with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as executor:
            futures = [executor.submit(use, "child") for _ in range(4)]
            use("parent")
            for future in futures:
                future.result()
    """,
    "fork in the middle of a call": """
        pending = [double.spawn(n) for n in range(50)]
        mapped = iter(double.map(range(5000)))
        next(mapped)
        executor = flow.Executor(1)
        in_executor = [executor.submit(pow, 2, n) for n in range(50)]
        pid = os.fork()
        if pid == 0:
            use("child")
            sys.exit()
        assert [future.result() for future in pending] == list(range(0, 100, 2))
        assert sum(mapped) == sum(range(0, 10000, 2))
        assert [future.result() for future in in_executor] == [2**n for n in range(50)]
        use("parent")
        assert os.waitpid(pid, 0)[1] == 0
    """,
    "threads call while it forks": """
        stop = threading.Event()
        def calling():
            while not stop.is_set():
                double.remote(1)
                list(double.map(range(50)))
        threads = [threading.Thread(target=calling) for _ in range(3)]
        for thread in threads:
            thread.start()
        for n in range(12):
            pid = os.fork()
            if pid == 0:
                if n % 4 == 0:
                    use("child")
                os._exit(0)
            assert os.waitpid(pid, 0)[1] == 0
        stop.set()
        for thread in threads:
            thread.join()
        use("parent")
    """,
    "a child that outlives its parent": """
        pid = os.fork()
        if pid == 0:
            use("child")
            parent = os.getppid()
            pidfd = os.pidfd_open(parent)
            os.kill(parent, signal.SIGKILL)
            import select
            select.select([pidfd], [], [])
            use("child")
            Path(here / "child").touch()
            sys.exit()
        while True:
            use("parent")
    """,
}


@pytest.mark.parametrize("way", FORKS)
def test_fork_after_first_use(scene: Scene, way: str) -> None:
    import textwrap

    outlives = "outlives" in way
    program = scene.start(
        HEAD
        + """
import numpy as np
def use(who):
    assert double.remote(3) == 6
    assert double.spawn(4).result() == 8
    assert double.remote(np.ones(100_000)).sum() == 200_000
    assert list(double.map(range(200))) == list(range(0, 400, 2))
    with flow.Executor(1) as executor:
        assert executor.submit(pow, 2, 3).result() == 8

use("before")
mine = host_of.remote()
"""
        + textwrap.dedent(FORKS[way]),
        options=("-W", "error", "-W", "ignore::DeprecationWarning"),  # of forks in programs with threads
    )
    result = program.end()
    assert result.code == (-signal.SIGKILL if outlives else 0), program.said()
    assert result.err == ""
    scene.check_nothing_left()
    assert (scene.root / "child").exists() == outlives


# running out of things


def test_out_of_descriptors_is_a_clear_error_and_passes(scene: Scene) -> None:
    out = scene.run(
        HEAD
        + """
import numpy as np, resource
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
def exhaust():
    held = []
    try:
        while True:
            held.append(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        return held

def attempt(function, *args):
    try:
        return function(*args)
    except Exception as error:
        return f"{type(error).__name__}: {error}"

def free(held):
    for fd in held:
        os.close(fd)

@flow.function(max_workers=1)
def echo(array):
    return array

@flow.function(max_workers=2)
def size(array):
    return array.nbytes

import cloudpickle, flowfn.call, flowfn.map
held = exhaust()
print("first use:", attempt(double.remote, 1))  # nothing can be started
free(held)
print("after:", attempt(double.remote, 1))
held = exhaust()
print("a warm worker:", attempt(double.remote, 1))
print("there:", attempt(size.remote, np.ones(200_000)))  # the stream takes what shared memory can't
print("back:", attempt(double.remote, np.ones(200_000)))
print("map:", attempt(lambda: list(double.map(range(100)))))
free(held)
print("map:", sum(double.map(range(100))))
print("big:", np.array_equal(attempt(double.remote, np.ones(200_000)), np.full(200_000, 2.0)))
print("big:", np.array_equal(attempt(echo.remote, np.ones(200_000)), np.ones(200_000)))
"""
    ).out
    lines = out.splitlines()
    assert lines[0].startswith("first use: ") and "Too many open files" in lines[0], out
    assert lines[1:4] == ["after: 2", "a warm worker: 2", "there: 1600000"], out
    assert all("Too many open files" in line for line in lines[4:6]), out
    assert lines[6:] == ["map: 9900", "big: True", "big: True"], out


def test_a_call_that_uses_up_its_descriptors_gets_its_result(scene: Scene) -> None:
    out = scene.run(
        HEAD
        + """
import numpy as np
@flow.function(max_workers=1)
def exhaust():
    import resource
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
    global held
    held = []
    try:
        while True:
            held.append(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        return np.ones(200_000)

SCALES = [2]
@flow.function(max_workers=1)
def scaled(x):
    return SCALES[0] * x

@flow.function(max_workers=1)
def total(array):
    return float(array.sum())

print(exhaust.remote().sum())
print(scaled.remote(4))  # needs cloudpickle, which that worker can't import any more: another one takes it
print(exhaust.remote().sum())
print(total.remote(np.ones(10)))
print(total.remote(np.ones(300_000)))
print(list(total.map([np.ones(300_000)] * 3)))
"""
    ).out
    assert out == "200000.0\n8\n200000.0\n10.0\n300000.0\n[300000.0, 300000.0, 300000.0]\n"


def test_without_shared_memory_everything_goes_through_the_stream(scene: Scene) -> None:
    # A limit on the size of files is one on anonymous shared memory too.
    out = scene.run(
        """
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        """
        + "\n"
        + """
import flowfn as flow
import numpy as np
@flow.function(max_workers=2)
def double(x):
    return 2 * x
shared = flow.put(np.ones(500_000))
for n in range(3):
    assert double.remote(np.ones(300_000)).sum() == 600_000
    assert double.remote(shared).sum() == 1_000_000
assert [array.sum() for array in double.map([np.ones(300_000)] * 5)] == [600_000] * 5
print("whole")
""".replace("\n", "\n        ")
    ).out
    assert out == "whole\n"


def test_no_more_processes_is_a_clear_error_and_passes(scene: Scene) -> None:
    # Through a backend whose interpreter can't be run, since root has no limit of processes.
    out = scene.run(
        HEAD
        + """
good, sys.executable = sys.executable, str(here / "missing")
for _ in range(2):
    try:
        double.remote(1)
    except flow.BackendUnavailable as error:
        print("unavailable", sys.executable in str(error))
sys.executable = good
print(double.remote(1))
"""
    ).out
    assert out == "unavailable True\nunavailable True\n2\n"


def test_no_more_threads_is_a_clear_error_and_passes(scene: Scene) -> None:
    out = scene.run(
        HEAD
        + """
import _thread
# The very call that fails when the system has no more threads.
def none_left(*_, **__):
    raise RuntimeError("can't start new thread")
real = threading._start_new_thread if hasattr(threading, "_start_new_thread") else None
name = "_start_new_thread" if real else "_start_joinable_thread"
real = getattr(threading, name)
def attempt(function):
    try:
        return function()
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
setattr(threading, name, none_left)
print(attempt(lambda: double.remote(1)).replace("\\n", " "))
print(attempt(lambda: double.spawn(1).result()).replace("\\n", " "))
print(attempt(lambda: list(double.map(range(10)))).replace("\\n", " "))
setattr(threading, name, real)
print(double.remote(1), double.spawn(2).result(), list(double.map(range(3))))
"""
    ).out
    lines = out.splitlines()
    assert all("can't start new thread" in line for line in lines[:3]), out
    assert lines[3] == "2 4 [0, 2, 4]"
