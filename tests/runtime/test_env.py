"""What a worker sees of the world: environment, directory, paths, descriptors."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

import flowfn as flow


def variable(name: str) -> str | None:
    return os.environ.get(name)


def test_the_clients_environment_is_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SET_BY_THE_CLIENT", "yes")
    assert flow.function(env={"SHAPE": "1"})(variable).remote("SET_BY_THE_CLIENT") == "yes"
    monkeypatch.delenv("SET_BY_THE_CLIENT")
    assert flow.function(env={"SHAPE": "2"})(variable).remote("SET_BY_THE_CLIENT") is None


def test_env_wins_over_the_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHO", "client")
    assert flow.function(env={"WHO": "function"})(variable).remote("WHO") == "function"


def test_variables_that_count_at_the_start_of_a_program() -> None:
    def hash_seed() -> tuple[Any, int]:
        return os.environ.get("PYTHONHASHSEED"), hash("text")

    seeded = flow.function(env={"PYTHONHASHSEED": "7"})(hash_seed)
    other = flow.function(env={"PYTHONHASHSEED": "7", "SHAPE": "other"})(hash_seed)
    assert seeded.remote() == other.remote()
    code = "print(hash('text'))"
    environ = {**os.environ, "PYTHONHASHSEED": "7"}
    wanted = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    assert seeded.remote() == ("7", int(wanted.stdout))


def test_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert flow.function(env={"SHAPE": "cwd"})(os.getcwd).remote() == str(tmp_path)


@pytest.mark.skipif(
    sys.version_info[:3] == (3, 13, 0),
    reason="this Python, 3.13.0, fails in a directory that is gone at any attribute that a module lacks",
)
def test_a_working_directory_that_is_gone(tmp_path: Path) -> None:
    code = """
        import os, flowfn as flow
        os.mkdir("gone"); os.chdir("gone"); os.rmdir("../gone")
        print(flow.function(lambda: 5).remote())
    """
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert ran.stdout == "5\n", ran.stderr


def test_a_module_of_the_working_directory_stands_in_for_none_of_ours(tmp_path: Path) -> None:
    """`random.py` and the like in one's own directory break nothing but oneself."""
    for name in ("json", "socket", "cloudpickle", "zlib", "struct", "queue", "select"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('the wrong module')\n")
    code = """if True:
        import flowfn as flow, sys
        f = flow.function(lambda: 5)
        f.remote()  # so that this process has what it needs
        sys.path.insert(0, "")
        print(f.options(env={"PYTHONHASHSEED": "1"}).remote())  # which takes a host of its own
    """
    ran = subprocess.run(
        [sys.executable, "-P" if sys.version_info >= (3, 11) else "-I", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.stdout == "5\n", ran.stderr


def test_paths_that_are_added_and_removed_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def paths() -> list[str]:
        import sys

        return sys.path

    function = flow.function(max_workers=1, env={"SHAPE": "paths"})(paths)
    assert str(tmp_path) not in function.remote()
    monkeypatch.syspath_prepend(tmp_path)
    assert str(tmp_path) in function.remote()
    (tmp_path / "added_later.py").write_text("VALUE = 8\n")

    def imports(n: int) -> int:
        import added_later  # type: ignore[import-not-found]

        return n + int(added_later.VALUE)

    assert list(flow.function(max_workers=1, env={"SHAPE": "paths"})(imports).map([1, 2])) == [9, 10]
    sys.path.remove(str(tmp_path))
    assert str(tmp_path) not in function.remote()


def test_standard_input_is_empty_and_nothing_of_the_clients_is_open(tmp_path: Path) -> None:
    def descriptors() -> list[str]:
        found = []
        for fd in os.listdir("/proc/self/fd"):
            try:
                found.append(os.readlink(f"/proc/self/fd/{fd}"))
            except OSError:
                pass
        return found

    with open(tmp_path / "private.txt", "w") as file:
        os.set_inheritable(file.fileno(), True)
        there = flow.function(env={"SHAPE": "descriptors"})(descriptors).remote()
    assert not any("private.txt" in target for target in there)
    assert "/dev/null" in there


def test_a_worker_has_nothing_of_another_ones() -> None:
    """No worker can read or end another one's stream."""

    def sockets() -> tuple[int, int]:
        targets = [
            os.readlink(f"/proc/self/fd/{fd}")
            for fd in os.listdir("/proc/self/fd")
            if fd.isdigit() and os.path.lexists(f"/proc/self/fd/{fd}")
        ]
        return sum("socket" in t for t in targets), sum("pipe" in t for t in targets)

    first = flow.function(max_workers=1, env={"SHAPE": "a"})(sockets).remote()
    for shape in "bcd":
        assert flow.function(max_workers=1, env={"SHAPE": shape})(sockets).remote() == first


def test_secrets_are_on_no_command_line_and_in_no_file(flow_home: Path, tmp_path: Path) -> None:
    def look(pid: int) -> tuple[str | None, str]:
        import subprocess

        command_lines = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
        return os.environ.get("CONTRACT_KEY"), command_lines

    value, command_lines = flow.function(secrets={"CONTRACT_KEY": "s3cr3t-here"})(look).remote(os.getpid())
    assert value == "s3cr3t-here" and "s3cr3t-here" not in command_lines
    for path in [*flow_home.rglob("*"), *(tmp_path / "flow-cache").rglob("*")]:
        assert not path.is_file() or b"s3cr3t-here" not in path.read_bytes()


def test_a_secret_that_changes_reaches_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    function = flow.function(secrets=["ROTATED"])(variable)
    monkeypatch.setenv("ROTATED", "old")
    assert function.remote("ROTATED") == "old"
    monkeypatch.setenv("ROTATED", "new")
    assert function.remote("ROTATED") == "new"
    assert list(function.map(["ROTATED"])) == ["new"]
    monkeypatch.delenv("ROTATED")
    with pytest.raises(flow.ConfigError, match="ROTATED"):
        function.remote("ROTATED")


def test_the_command_line_is_not_the_functions(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text("import sys, flowfn as flow\nprint(flow.function(lambda: sys.argv).remote())\n")
    ran = subprocess.run(
        [sys.executable, "script.py", "--lr", "3"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert ran.stdout == "['script.py']\n", ran.stderr
