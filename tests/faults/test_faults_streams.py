"""Workers that can't be talked to: another Python, another protocol, no protocol at all, noise on the line."""

from __future__ import annotations

import glob
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cloudpickle
import pytest
from fault_scene import STRESS, Scene

import flowfn_runtime

HEAD = """
import os, random, socket, subprocess, sys, threading
import flowfn as flow
from flowfn.backends.base import Backend, Connection, Exit
from flowfn.backends.local import LocalBackend
from flowfn_runtime import wire

class Program(Connection):
    # A program with the stream on its standard input and output.
    def __init__(self, argv, env):
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, bufsize=0)
        self.stream = wire.Stream(os.dup(self.process.stdout.fileno()), os.dup(self.process.stdin.fileno()))
        self.process.stdin.close()
        self.process.stdout.close()
        self.label = f"program pid {self.process.pid}"
    def kill(self):
        self.process.kill()
    def exit(self, timeout):
        try:
            return Exit(self.process.wait(timeout))
        except subprocess.TimeoutExpired:
            return Exit()
    def close(self):
        super().close()
        threading.Thread(target=self.process.wait).start()

class Programs(Backend):
    name = "programs"
    def __init__(self, argv, env=None):
        self.argv, self.env = argv, env
    def connect(self, spec):
        return Program(self.argv, {**os.environ, **(self.env or {})})
    def slots(self, spec):
        return 1

def double(x):
    return 2 * x

def attempt(function, *args):
    try:
        return function(*args)
    except Exception as error:
        return f"{type(error).__name__}: {error}".replace("\\n", " | ")
"""

HERE = f"{sys.version_info[0]}.{sys.version_info[1]}"
RUNTIME = os.path.dirname(os.path.dirname(flowfn_runtime.__file__))
SAY_VERSION = "import sys; print(f'{sys.version_info[0]}.{sys.version_info[1]}')"
BOOT = "from flowfn_runtime.host import main; main()"


def other_pythons() -> dict[str, str]:
    """Interpreters of other minor versions that can run the runtime, by version."""
    found: dict[str, str] = {}
    candidates = [shutil.which(f"python3.{minor}") for minor in range(10, 16)]
    candidates += sorted(glob.glob(os.path.expanduser("~/.pyenv/versions/3.*/bin/python")))
    for python in filter(None, candidates):
        asked = subprocess.run([python, "-c", SAY_VERSION], capture_output=True, text=True)
        version = asked.stdout.strip()
        if asked.returncode == 0 and version != HERE and int(version.split(".")[1]) >= 10:
            found.setdefault(version, python)
    return found


def test_a_worker_under_another_python_is_a_version_mismatch_that_names_both(scene: Scene, tmp_path: Path) -> None:
    pythons = other_pythons()
    if not pythons:
        pytest.skip("no Python of another version here")
    library = tmp_path / "library"
    library.mkdir()
    shutil.copytree(os.path.dirname(cloudpickle.__file__), library / "cloudpickle")
    for version, python in sorted(pythons.items()):
        out = scene.run(
            HEAD
            + """
python, boot, path, here = sys.argv[1:]
backend = Programs([python, "-c", boot, "{}"], {"PYTHONPATH": path})
far = flow.function(backend=backend)(double)
print(attempt(far.remote, 1))
print(attempt(far.spawn(1).result))
print(attempt(lambda: list(far.map(range(3)))))
backend.argv[0] = here
print(attempt(far.remote, 2))
flow.shutdown()
""",
            python,
            BOOT,
            f"{RUNTIME}:{library}",
            sys.executable,
        ).out
        lines = out.splitlines()
        for line in lines[:3]:
            assert line.startswith("VersionMismatch"), out
            assert version in line and HERE in line
            assert "hint" in line
        assert lines[3] == "4"
        scene.check_nothing_left()


def test_a_worker_that_speaks_another_protocol_is_a_version_mismatch(scene: Scene) -> None:
    out = scene.run(
        HEAD
        + """
boot = "import flowfn_runtime.wire as wire; wire.PROTOCOL = 99; " + sys.argv[1]
far = flow.function(backend=Programs([sys.executable, "-c", boot, "{}"], {"PYTHONPATH": sys.argv[2]}))(double)
print(attempt(far.remote, 1))
print(attempt(lambda: list(far.map(range(3)))))
""",
        BOOT,
        RUNTIME,
    ).out
    for line in out.splitlines():
        assert line.startswith("VersionMismatch") and "protocol 99" in line and "client speaks 1" in line, out


@pytest.mark.parametrize(
    ("program", "type_names"),
    [
        ("print('Welcome to this machine!' * 10)", {"ProtocolError"}),
        ("import os; os.write(1, os.urandom(1000))", {"ProtocolError"}),
        ("import os; os.write(1, b'fN')", {"BackendUnavailable"}),
        ("", {"BackendUnavailable"}),
        ("import sys; sys.exit(3)", {"BackendUnavailable"}),
        ("import os; os.write(1, (b'fN' + bytes(34)))", {"ProtocolError"}),
        (
            "import flowfn_runtime.wire as w; s = w.Stream(0, 1); s.send(w.HELLO, meta=b'no json')",
            {"BackendError", "ProtocolError", "BackendUnavailable"},
        ),
        (
            "import flowfn_runtime.wire as w; s = w.Stream(0, 1); s.send(w.RESULT, body=b'early')",
            {"ProtocolError"},
        ),
        (
            "import flowfn_runtime.wire as w; s = w.Stream(0, 1); s.send(w.ERROR, meta=b'{}', body=b'no pickle')",
            {"BackendError", "ProtocolError", "BackendUnavailable"},
        ),
    ],
)
def test_a_program_that_is_no_worker_is_a_clear_error(scene: Scene, program: str, type_names: set[str]) -> None:
    out = scene.run(
        HEAD
        + """
far = flow.function(backend=Programs([sys.executable, "-c", sys.argv[1]], {"PYTHONPATH": sys.argv[2]}))(double)
print(attempt(far.remote, 1))
print(attempt(far.spawn(1).result))
print(attempt(lambda: list(far.map(range(3)))))
""",
        program,
        RUNTIME,
    ).out
    lines = out.splitlines()
    assert len(lines) == 3
    for line in lines:
        assert line.partition(":")[0] in type_names, out


def test_noise_on_the_line_loses_the_worker_and_gives_no_wrong_result(scene: Scene) -> None:
    # Stray bytes get in between two frames, as from a library that found the descriptor, in either direction.
    out = scene.run(
        HEAD
        + """
noise = {"in": 0.0, "out": 0.0}
chance = random.Random()

class Line(LocalBackend):
    # The local backend, with somebody between the two ends.
    def connect(self, spec):
        connection = super().connect(spec)
        ours, theirs = socket.socketpair()
        far = socket.socket(fileno=connection.stream.read_fd)
        fd = ours.detach()
        connection.stream = wire.Stream(fd, fd)
        for source, target, way in ((theirs, far, "in"), (far, theirs, "out")):
            threading.Thread(target=self.carry, args=(source, target, way), daemon=True).start()
        return connection
    def carry(self, source, target, way):
        try:
            while data := source.recv(1 << 20):
                if chance.random() < noise[way]:
                    target.sendall(chance.choice([b"x", b"Segmentation fault\\n", os.urandom(100), b"fN" + bytes(40)]))
                target.sendall(data)
        except OSError:
            pass
        for end in (source, target):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

line = Line(accelerated=False)
far = flow.function(backend=line, max_workers=2)(double)
assert far.remote(1) == 2
noisy = 0
for turn in range(int(sys.argv[1])):
    for way in noise:
        noise[way] = 0.02
        for n in range(60):
            result = attempt(far.remote, n)
            if isinstance(result, str):
                assert result.startswith(("WorkerLost", "BackendUnavailable", "ProtocolError", "VersionMis")), result
                noisy += 1
            else:
                assert result == 2 * n, (result, n)
        for value, n in zip(far.map(range(600), return_exceptions=True), range(600)):
            assert isinstance(value, Exception) or value == 2 * n, (value, n)
        noise[way] = 0.0
        assert list(far.map(range(600))) == list(range(0, 1200, 2))
noise["out"] = 1.0
print(attempt(far.remote, 1))
noise["out"] = 0.0
print(attempt(far.remote, 1))
flow.shutdown()
line.close()
""",
        3 * STRESS,
        options=("-W", "error", "-W", "ignore::ResourceWarning"),
    ).out
    lines = out.splitlines()
    assert lines[0].startswith(("WorkerLost", "ProtocolError")), out
    assert lines[1] == "2"
