"""Ctrl-C at any moment: the program ends, or goes on if it catches it, and in either case nothing is left or lost."""

from __future__ import annotations

import os
import pty
import random
import select
import signal
import sys
import termios
import threading
import time

import pytest
from fault_scene import BOUND_S, STRESS, Scene

BODY = """
import os, sys, time
print("go", flush=True)
import flowfn as flow
from pathlib import Path
here = Path(__file__).parent
(here / "data").mkdir(exist_ok=True)
(here / "data" / "file").write_text("content")

@flow.function(max_workers=2)
def double(x):
    return 2 * x

@flow.function(max_workers=2)
def slow(x):
    time.sleep(0.05)
    return x

@flow.function(mounts={"/data": str(here / "data")}, max_workers=1)
def read():
    return Path("/data/file").read_text()

@flow.function
def count():
    yield from range(1000)

double.remote(1)
print("warm", flush=True)
for n in range(100):
    double.remote(bytes(n * 10_000))
print("mapping", flush=True)
assert sum(double.map(range(20_000))) == sum(range(0, 40_000, 2))
assert list(slow.map(range(6))) == list(range(6))
print("generating", flush=True)
assert sum(count.remote()) == sum(range(1000))
print("staging", flush=True)
assert read.remote() == "content"
print("waiting", flush=True)
futures = [slow.spawn(n) for n in range(6)]
assert [future.result() for future in futures] == list(range(6))
print("ending", flush=True)
with flow.Executor(2) as executor:
    executor.submit(pow, 2, 3)
flow.shutdown()
"""

PHASES = ["", "go", "warm", "mapping", "generating", "staging", "waiting", "ending"]


def test_ctrl_c_at_any_moment_leaves_nothing(scene: Scene) -> None:
    seed = random.randrange(10**6)
    print("seed", seed)
    chance = random.Random(seed)
    for phase in PHASES * STRESS:
        program = scene.start(BODY, new_session=True)
        if phase:
            program.expect(phase)
        delay = chance.random() * (0.3 if phase in ("go", "staging") else 0.1)

        def interrupt(pid: int = program.pid) -> None:
            try:
                os.killpg(pid, signal.SIGINT)  # as a terminal does: to all that are not in a group of their own
            except ProcessLookupError:
                pass

        timer = threading.Timer(delay, interrupt)
        timer.start()
        timer.join()
        result = program.end()
        assert result.code in (-signal.SIGINT, 130, 1, 0), (phase, delay, program.said())
        # One traceback, of the interrupt, and no word from anybody else. (The interpreter itself may be ending.)
        if "go" not in result.out:  # the interpreter itself had not started yet
            scene.check_nothing_left()
            continue
        quiet = result.err.count("Traceback") <= 1 or "ignored" in result.err
        assert quiet and "Fatal" not in result.err, (phase, delay, result.err)
        for word in ("flowfn_runtime/host.py", "release unlocked lock", "can't start new thread"):
            assert word not in result.err, (phase, delay, result.err)
        scene.check_nothing_left()


def test_a_program_that_catches_ctrl_c_goes_on(scene: Scene) -> None:
    # As a notebook does. Whatever was lost, the next call must find its workers.
    out = scene.run(
        """
        import itertools, os, random, signal, sys, threading, time
        import flowfn as flow

        @flow.function(max_workers=2)
        def double(x):
            return 2 * x

        @flow.function(max_workers=2)
        def count():
            yield from range(100)

        @flow.function(max_workers=2)
        def big(n):
            return bytes(n)

        def calls():
            for n in itertools.count():
                assert double.remote(n) == 2 * n

        def futures():
            while True:
                assert [future.result() for future in [double.spawn(n) for n in range(10)]] == list(range(0, 20, 2))

        def maps():
            while True:
                assert list(double.map(range(2000))) == list(range(0, 4000, 2))

        def unordered():
            while True:
                assert sum(double.map(range(500), order_outputs=False)) == sum(range(0, 1000, 2))

        def left():
            while True:
                for n in double.map(range(10**6)):
                    if n > 500:
                        break

        def generators():
            while True:
                assert sum(count.remote()) == 4950

        def bigs():
            for n in itertools.count(100_000, 50_000):
                assert len(big.remote(n % 3_000_000)) == n % 3_000_000

        def cold():
            while True:
                flow.shutdown()
                assert double.remote(1) == 2

        work = [calls, futures, maps, unordered, left, generators, bigs, cold]
        seed = random.randrange(10**6)
        chance = random.Random(seed)
        print("seed", seed, flush=True)
        main = threading.main_thread().ident
        armed, caught = threading.Event(), threading.Event()
        active = False
        def on_interrupt(*_):
            if active:
                raise KeyboardInterrupt
        signal.signal(signal.SIGINT, on_interrupt)
        def interrupter():
            while True:
                armed.wait()
                armed.clear()
                time.sleep(chance.random() * 0.02)
                signal.pthread_kill(main, signal.SIGINT)
                while not caught.wait(0.2):  # Python ignores what is raised in finalisers, so one may not be enough
                    signal.pthread_kill(main, signal.SIGINT)
        threading.Thread(target=interrupter, daemon=True).start()
        def until_interrupted(work):
            global active
            try:
                try:
                    active = True
                    caught.clear()
                    armed.set()
                    work()
                finally:
                    active = False
            except KeyboardInterrupt:
                active = False
            caught.set()
        rounds = int(sys.argv[1])
        for turn in range(rounds):
            until_interrupted(work[turn % len(work)])
            # All workers must be there still: none may be lost to a call that is no more.
            assert sorted(future.result(30) for future in [double.spawn(n) for n in range(8)]) == list(range(0, 16, 2))
            assert double.remote(turn) == 2 * turn
        print("whole", turn)
        """,
        240 * STRESS,
    ).out
    assert "whole" in out


def test_ctrl_c_on_a_terminal(scene: Scene) -> None:
    script = scene.script(
        """
        import time
        import flowfn as flow
        @flow.function(max_workers=2)
        def slow(x):
            print("working on", x, flush=True)
            time.sleep(30)
        try:
            list(slow.map(range(10)))
        except KeyboardInterrupt:
            print("interrupted", flush=True)
            raise
        """
    )
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(sys.executable, [sys.executable, str(script)], scene.environ())
    try:
        attributes = termios.tcgetattr(terminal)
        said = b""
        deadline = time.monotonic() + BOUND_S
        interrupted = False
        while True:
            ready, _, _ = select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, said
            try:
                data = os.read(terminal, 1 << 16)
            except OSError:  # nobody has the other end any more
                break
            if not data:
                break
            said += data
            if said.count(b"working on") >= 2 and not interrupted:
                interrupted = True
                os.write(terminal, attributes[6][termios.VINTR])  # the key, as it is pressed
        assert b"interrupted" in said and b"KeyboardInterrupt" in said
        assert said.count(b"Traceback") == 1, said.decode()
    finally:
        os.close(terminal)
        status = os.waitpid(pid, 0)[1]
    assert os.waitstatus_to_exitcode(status) in (-signal.SIGINT, 130, 1)


def test_interrupts_in_a_handler_of_the_users_own(scene: Scene) -> None:
    # Timeouts by SIGALRM raise wherever the main thread is, which is where Ctrl-C does.
    out = scene.run(
        """
        import random, signal, sys
        import flowfn as flow

        class Late(Exception):
            pass

        def on_alarm(*_):
            raise Late
        signal.signal(signal.SIGALRM, on_alarm)

        @flow.function(max_workers=1)
        def double(x):
            return 2 * x

        def work():
            signal.setitimer(signal.ITIMER_REAL, random.random() * 0.003 + 1e-4)
            for n in range(200):
                assert double.remote(n) == 2 * n
            signal.setitimer(signal.ITIMER_REAL, 0)

        late = 0
        for turn in range(int(sys.argv[1])):
            try:
                work()
            except Late:
                late += 1
            except flow.SerializationError as error:  # it came while the arguments or the result were pickled
                assert type(error.__cause__) is Late
            assert double.remote(turn) == 2 * turn
        assert late
        print("whole")
        """,
        300 * STRESS,
    ).out
    assert out == "whole\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_other_signals_that_end_a_program(scene: Scene, number: signal.Signals) -> None:
    program = scene.start(
        """
        import time
        import flowfn as flow
        @flow.function(max_workers=2)
        def slow(x):
            print("working", flush=True)
            time.sleep(1000)
        list(slow.map(range(4)))
        """,
        options=("-W", "error"),
    )
    program.expect("working")
    program.kill(number)
    assert program.end().code == -number
