"""What travels to a worker elsewhere, with a program on this machine in the part of the other one."""

from __future__ import annotations

import importlib
import json
import os
import select
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import flowfn as flow
from flowfn import loader, shipping, userproject
from flowfn.backends import stream
from flowfn.backends.base import Backend, Connection
from flowfn.bundle import Bundle, bundle
from flowfn.spec import FunctionSpec
from flowfn.testing.base import Meeting
from flowfn_runtime import kept


class Elsewhere(Backend):
    """A shell with an environment and a home of its own."""

    name = "elsewhere"
    ships_project = True

    def __init__(self, home: Path, python: str | None = sys.executable, **environ: str) -> None:
        self.home = home
        self.argv = ["env", "-i", f"HOME={home}", f"FLOW_CACHE={home}/cache", f"FLOW_HOME={home}/flow"]
        self.argv += [f"{name}={value}" for name, value in {"PATH": "/usr/bin:/bin", **environ}.items()]
        self.python = python
        self.connections = stream.Connections()

    def connect(self, spec: FunctionSpec) -> Connection:
        argv = [*self.argv, *loader.program(self.python)]
        return self.connections.add(stream.start(argv, shipping.launch(spec), label="elsewhere"))

    def slots(self, spec: FunctionSpec) -> int:
        return 4

    def close(self) -> None:
        self.connections.close()


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Callable[..., Elsewhere]]:
    made: list[Elsewhere] = []

    def make(**options: Any) -> Elsewhere:
        home = tmp_path / f"home-{len(made)}"
        home.mkdir()
        made.append(Elsewhere(home, **options))
        return made[-1]

    yield make
    flow.shutdown()
    for backend in made:
        backend.close()


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Writes the module `shipped`, of a project of its own, and imports it anew."""
    project = tmp_path / "project"
    project.mkdir()
    monkeypatch.syspath_prepend(str(project))

    def write(source: str) -> ModuleType:
        (project / "shipped.py").write_text(source)
        importlib.invalidate_caches()
        sys.modules.pop("shipped", None)
        return importlib.import_module("shipped")

    yield write
    sys.modules.pop("shipped", None)


def test_the_runtime_is_kept_by_its_digest(elsewhere: Callable[..., Elsewhere]) -> None:
    backend = elsewhere()
    f = flow.function(backend=backend)(lambda: str(__import__("flowfn_runtime").__file__))
    file = f.remote()
    assert file.startswith(f"{backend.home}/cache/runtime/{bundle().digest}/")
    before = os.stat(file).st_ino
    assert f.options(max_workers=1).remote() == file  # another worker
    assert os.stat(file).st_ino == before


def test_the_runtime_is_compiled_once_whatever_is_said_of_bytecode(elsewhere: Callable[..., Elsewhere]) -> None:
    backend = elsewhere(PYTHONDONTWRITEBYTECODE="1")
    f = flow.function(backend=backend)(lambda: __import__("sys").dont_write_bytecode)
    assert f.remote() is True  # what is said holds for the user's modules
    kept = backend.home / "cache" / "runtime" / bundle().digest / "flowfn_runtime" / "__pycache__"
    assert {"bootstrap", "host", "worker"} <= {path.name.partition(".")[0] for path in kept.iterdir()}


def test_where_the_runtime_is_kept_nothing_is_waited_for(elsewhere: Callable[..., Elsewhere]) -> None:
    """All that is to be said is said before the other side has spoken, and is enough."""
    backend = elsewhere()
    flow.function(backend=backend)(abs).remote(-1)
    ask = {"digest": bundle().digest, "size": 0, "python": [*sys.version_info[:2], sys.implementation.name]}
    setup = shipping.Launch({"keep": 60.0}).frame()
    said = json.dumps({**ask, "then": len(setup)}).encode() + b"\n" + setup
    # It answers once, when all is done.
    assert is_ready(backend, said).startswith(loader.MARK.encode() + b'{"loaded": ')
    # Another runtime is lacking: what was said for it is passed over, and then it is waited for.
    said = json.dumps({**ask, "digest": "d", "then": len(setup)}).encode() + b"\n" + setup
    more = json.dumps({"digest": bundle().digest, "size": 0}).encode() + b"\n" + setup
    assert is_ready(backend, said + more).startswith(loader.MARK.encode() + b'{"python": ')


def is_ready(backend: Elsewhere, said: bytes) -> bytes:
    """What a worker's program says that is told this, until it is ready."""
    argv = [*backend.argv, *loader.program(sys.executable)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as process:
        assert process.stdin and process.stdout
        process.stdin.write(said)
        answered = b""
        while b'"ready": true' not in answered and (more := process.stdout.read(1 << 16)):
            answered += more
        process.stdin.close()
    assert b'"ready": true' in answered
    return answered


def test_the_bundle_is_named_by_content() -> None:
    one = Bundle([("a.py", b"1"), ("b.py", b"2")])
    assert one.digest == Bundle([("a.py", b"1"), ("b.py", b"2")]).digest
    assert one.pack() == Bundle([("a.py", b"1"), ("b.py", b"2")]).pack()
    assert one.digest != Bundle([("a.py", b"1b.py"), ("", b"2")]).digest


def test_a_runtime_that_arrives_damaged_is_refused(tmp_path: Path) -> None:
    environ = {"PATH": os.environ["PATH"], "FLOW_CACHE": str(tmp_path)}
    with subprocess.Popen(
        loader.program(sys.executable), stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environ
    ) as process:
        assert process.stdin and process.stdout
        ask = {"digest": "d", "python": [], "then": 0}
        process.stdin.write(json.dumps(ask).encode() + b"\n")
        process.stdin.flush()
        assert process.stdout.readline().startswith(loader.MARK.encode())
        ask = {"digest": "d", "size": 3, "sha256": "0" * 64}
        process.stdin.write(json.dumps(ask).encode() + b"\nabc")
        process.stdin.flush()
        said = json.loads(process.stdout.readline().removeprefix(loader.MARK.encode()))
    assert "damaged" in said["error"]
    assert not list((tmp_path / "runtime").glob("*")) if (tmp_path / "runtime").exists() else True


def test_many_workers_that_start_at_once(elsewhere: Callable[..., Elsewhere], module: Any) -> None:
    """All need the runtime and the project, and none is there: each is made once, and nobody waits for ever."""
    function = module("def f(x):\n    import os\n    return os.getpid()\n").f
    f = flow.function(backend=elsewhere(), max_workers=4)(function)

    @flow.function(backend=f.spec.backend, max_workers=4)
    def all_there(place: str) -> int:
        import os
        import time

        open(f"{place}/{os.getpid()}", "w").close()
        while len(os.listdir(place)) < 4:
            time.sleep(0.01)
        return os.getpid()

    place = f.spec.backend.home / "place"
    place.mkdir()
    futures = [all_there.spawn(str(place)) for _ in range(4)]
    assert len({future.result(timeout=60) for future in futures}) == 4


def test_one_of_several_starts_fails(
    elsewhere: Callable[..., Elsewhere], meeting: Meeting, caplog: pytest.LogCaptureFixture
) -> None:
    """It is said, and tried again: the call that waits for it may be what the others wait for."""
    backend = elsewhere()
    fails_once = 'if ! mkdir $HOME/first 2>&- && mkdir $HOME/second 2>&-; then echo full >&2; exit 3; fi; exec "$@"'
    backend.argv += ["/bin/sh", "-c", fails_once, "sh"]
    meet = meeting.meet

    def f() -> None:
        meet().recv(1)

    function = flow.function(backend=backend, max_workers=2)(f)
    futures = [function.spawn() for _ in range(2)]
    for one in [meeting.next(), meeting.next()]:
        one.let_go()
    assert [future.result(timeout=60) for future in futures] == [None, None]
    (record,) = (record for record in caplog.records if record.name == "flowfn")
    assert "ended with status 3" in record.getMessage() and "full" in record.getMessage()


def test_an_edit_is_seen(elsewhere: Callable[..., Elsewhere], module: Any) -> None:
    backend = elsewhere()
    for number in (1, 2, 3):
        f = flow.function(backend=backend)(module(f"def f():\n    return {number}\n").f)
        userproject.look_again()  # in place of the second after which it does so anyway
        assert f.remote() == number


def test_an_edit_while_it_is_sent(
    elsewhere: Callable[..., Elsewhere], module: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shipped = module("def f():\n    return 1\n")
    backend = elsewhere()
    data = tmp_path / "project" / "data.txt"
    data.write_text("first")
    launched = shipping.launch(FunctionSpec())
    data.write_text("second, and longer")  # between the look at it and the sending
    connection = stream.start([*backend.argv, *loader.program(sys.executable)], launched, label="elsewhere")
    backend.connections.add(connection)
    kept_files = {path.read_text() for path in (backend.home / "cache" / "projects" / "checkouts").rglob("data.txt")}
    assert kept_files == {"second, and longer"}
    assert shipped.f() == 1


def test_a_project_that_is_too_large_is_refused(
    elsewhere: Callable[..., Elsewhere], module: Any, tmp_path: Path
) -> None:
    function = module("def f():\n    return 1\n").f
    with (tmp_path / "project" / "huge.bin").open("wb") as file:
        file.truncate(300 << 20)
    with pytest.raises(flow.ValidationError, match=r"too large to go along.*huge\.bin"):
        flow.function(backend=elsewhere())(function).remote()


def test_the_first_python_that_fits_is_found(elsewhere: Callable[..., Elsewhere], tmp_path: Path) -> None:
    bin = tmp_path / "bin"
    bin.mkdir()
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    for name, script in {version: "exit 127", "python3": f'exec {sys.executable} "$@"'}.items():
        (bin / name).write_text(f"#!/bin/sh\n{script}\n")
        (bin / name).chmod(0o755)
    f = flow.function(backend=elsewhere(python=None, PATH=str(bin)))(lambda: 5)
    assert f.remote() == 5


def test_a_program_that_is_none(elsewhere: Callable[..., Elsewhere]) -> None:
    backend = elsewhere(python="/bin/false")
    with pytest.raises(flow.BackendUnavailable, match="ended with status 1"):
        flow.function(backend=backend)(lambda: 1).remote()


def test_the_last_words_of_a_program_are_told() -> None:
    with pytest.raises(flow.BackendUnavailable, match="the engine is on fire"):
        stream.start(["sh", "-c", "echo the engine is on fire >&2; exit 3"], shipping.Launch({}), label="engine")


def test_what_it_says_on_its_standard_output_is_told_as_well(tmp_path: Path) -> None:
    """As a login shell does that lets nobody in."""
    shell = tmp_path / "shell"
    shell.write_text("#!/bin/sh\necho This account is currently not available.; exit 1\n")
    shell.chmod(0o755)
    with pytest.raises(flow.BackendUnavailable, match="status 1:\nThis account is currently not available"):
        stream.start([str(shell), *loader.program()], shipping.Launch({}), label="engine")


def test_noise_without_end_is_given_up() -> None:
    with pytest.raises(flow.BackendError, match="is not the worker's"):
        stream.start(["sh", "-c", "yes"], shipping.Launch({}), label="engine")


def test_a_killed_worker_takes_along_what_went_off_on_its_own(elsewhere: Callable[..., Elsewhere]) -> None:
    backend = elsewhere()

    @flow.function(backend=backend)
    def daemon() -> int:
        import subprocess

        return int(subprocess.run(["setsid", "sh", "-c", "sleep 1000 >&- 2>&- & echo $!"], stdout=-1).stdout)

    left = os.pidfd_open(daemon.remote())
    for connection in list(backend.connections._open):
        connection.kill()
    ready, _, _ = select.select([left], [], [], 30)
    os.close(left)
    assert ready


def test_a_closed_worker_leaves_no_process(elsewhere: Callable[..., Elsewhere]) -> None:
    backend = elsewhere()
    connection = backend.connect(FunctionSpec())
    assert isinstance(connection, stream.StreamConnection)
    connection.close()
    assert connection.exit(30) is not None
    assert connection.process.returncode is not None


# what is the user's


def test_what_belongs_to_the_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    top = tmp_path / "top"
    (top / "src" / "deep").mkdir(parents=True)
    (top / "pyproject.toml").touch()
    assert userproject.top(str(top / "src" / "deep")) == str(top)
    assert userproject.top(str(tmp_path)) == str(tmp_path)
    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)
    assert userproject.find_roots([str(top / "src")], str(top / "src" / "deep")) == [str(top)]
    # Installed packages, everybody's directories and unused entries stay here.
    unused = tmp_path / "unused"
    unused.mkdir()
    entries = [*sys.path, str(unused), "/", os.path.expanduser("~")]
    roots = userproject.find_roots(entries, str(top))
    assert str(top) in roots
    assert not any(root in ("/", os.path.expanduser("~"), str(unused)) or "site-packages" in root for root in roots)


def test_kept_directories_are_made_once(tmp_path: Path) -> None:
    made: list[str] = []
    begun, go = threading.Event(), threading.Event()

    def make(place: str) -> None:
        made.append(place)
        begun.set()
        assert go.wait(30)

    place = str(tmp_path / "kept" / "x")
    fds: list[int] = []
    threads = [threading.Thread(target=lambda: fds.append(kept.get(place, make))) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert begun.wait(30)
    go.set()
    for thread in threads:
        thread.join(30)
    assert made == [place]
    assert len(fds) == 4
    kept.drop_old(str(tmp_path / "kept"), -1)
    assert os.path.isdir(place)  # in use
    for fd in fds:
        os.close(fd)
    kept.drop_old(str(tmp_path / "kept"), -1)
    assert not os.path.exists(place)


def test_what_was_not_finished_is_made_anew(tmp_path: Path) -> None:
    place = str(tmp_path / "kept" / "x")

    def fail(place: str) -> None:
        (Path(place) / "half").touch()
        raise RuntimeError

    with pytest.raises(RuntimeError):
        kept.get(place, fail)
    os.close(kept.get(place, lambda place: (Path(place) / "whole").touch()))
    assert {path.name for path in Path(place).iterdir()} == {"whole", kept.READY}


def test_of_what_is_kept_the_least_recently_used_goes(tmp_path: Path) -> None:
    directory = tmp_path / "kept"
    fds = {name: kept.get(str(directory / name), lambda place: None) for name in "abcd"}
    for age, name in enumerate("dcba"):
        os.utime(directory / f"{name}.lock", (0, 1_000_000_000 - age))
    os.close(fds.pop("b"))
    os.close(fds.pop("c"))
    kept.drop_old(str(directory), float("inf"), most=2)
    assert {path.name for path in directory.iterdir() if path.is_dir()} == {"a", "c", "d"}  # a is in use
    for fd in fds.values():
        os.close(fd)


def test_projects_and_runtimes_that_nobody_uses_go(
    elsewhere: Callable[..., Elsewhere], module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = elsewhere()
    cache = backend.home / "cache"
    old = [cache / "runtime" / f"old-{number}" for number in range(6)]
    for number, place in enumerate(old):
        place.mkdir(parents=True)
        os.utime(place, (number, number))
    module("def f():\n    return 1\n")
    in_use = backend.connect(FunctionSpec())  # a worker of the project as it is
    for number in range(40):
        module(f"# {number}\n")
        connection = backend.connect(FunctionSpec())
        connection.kill()
        connection.exit(30)
        userproject.look_again()
    trees = list((cache / "projects" / "trees").iterdir())
    assert len(trees) <= 32 + 3  # those just ended may count as in use
    contents = {path.read_bytes() for path in (cache / "projects" / "blobs").rglob("*") if path.is_file()}
    assert b"# 39\n" in contents and b"# 0\n" not in contents
    assert b"def f():\n    return 1\n" in contents  # in use all the time
    assert sum(place.exists() for place in old) == 3  # beside the one in use the most recent ones
    in_use.kill()
