"""Handles where people write them: the REPL, IPython, notebooks, scripts, modules. And what they refuse."""

from __future__ import annotations

import os
import pickle
import pty
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import flowfn as flow

WAIT_S = 60


def run(*command: str, text: str = "", cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, input=textwrap.dedent(text), capture_output=True, text=True, timeout=WAIT_S, cwd=cwd)


@flow.function
def double(x: int) -> int:
    """Twice as much."""
    return 2 * x


@flow.function(name="renamed", timeout=60)
def with_options(x: int) -> int:
    return x


# as an object


def test_it_looks_like_the_function() -> None:
    assert double.__name__ == "double" and double.__doc__ == "Twice as much." and double.__module__ == __name__
    assert double.name == "double" and with_options.name == "renamed"
    assert repr(double) == "<flow.function double>"
    assert double(4) == double.local(4) == 8
    assert double.spec.timeout is None and with_options.spec.timeout == 60


def test_options_make_another_handle() -> None:
    other = double.options(timeout=5, name="other")
    assert other is not double and other.name == "other" and double.spec.timeout is None
    assert other.options(max_workers=2).spec.timeout == 5
    assert other.remote(3) == 6


def test_a_module_function_is_pickled_by_name() -> None:
    assert pickle.loads(pickle.dumps(double)) is double
    assert len(pickle.dumps(double)) < 300


def test_a_changed_handle_is_pickled_with_its_options() -> None:
    import cloudpickle

    back = pickle.loads(cloudpickle.dumps(double.options(timeout=7, secrets={"KEY": "value"})))
    assert back.spec.timeout == 7 and back.spec.secrets["KEY"] == "value" and back(4) == 8


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"gpus": "a100"}, "did you mean gpu"),
        ({"gpu": "a100:zero"}, "gpu"),
        ({"memory": "lots"}, "memory"),
        ({"cpu": 0}, "cpu"),
        ({"timeout": -1}, "timeout"),
        ({"retries": "many"}, "retries"),
        ({"max_workers": 0}, "max_workers"),
        ({"env": {"A": 1}}, "env"),
        ({"mounts": {"data": "s3://b"}}, "data"),
        ({"backend": ""}, "backend"),
    ],
)
def test_bad_options_fail_where_they_are_written(options: dict[str, Any], said: str) -> None:
    with pytest.raises(flow.ValidationError, match=said):
        flow.function(**options)
    with pytest.raises(flow.ValidationError, match=said):
        double.options(**options)


def test_what_can_not_be_decorated() -> None:
    class Plain: ...

    decorate: Any = flow.function
    for wrong in (Plain, double, 5, "f", staticmethod(len), classmethod(lambda cls: None)):
        with pytest.raises(flow.ValidationError):
            decorate(wrong)


def test_backends_that_there_are_not() -> None:
    with pytest.raises(flow.ConfigError, match=r"nowhere.*\n.*local"):
        double.options(backend="nowhere").remote(1)
    with pytest.raises(flow.ConfigError, match="did you mean 'slurm'"):
        double.options(backend="slrum").remote(1)
    with pytest.raises(flow.ConfigError, match="backend"):
        double.options(backend=object()).remote(1)


def test_the_environment_chooses_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOW_BACKEND", "elsewhere")
    with pytest.raises(flow.ConfigError, match="elsewhere"):
        flow.function(lambda: 1).remote()
    assert flow.function(backend="local")(lambda: 1).remote() == 1


def test_map_needs_inputs_and_a_function_one_result() -> None:
    with pytest.raises(TypeError, match="iterable"):
        double.map()
    with pytest.raises(TypeError):
        double.map(5)  # type: ignore[arg-type]


# where people write them


def test_a_script(tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text("SCALE = 10\ndef scale(x): return SCALE * x\n")
    (tmp_path / "script.py").write_text(
        textwrap.dedent(
            """
            import dataclasses
            import flowfn as flow
            import helper

            @dataclasses.dataclass
            class Point:
                x: int

            LIMIT = 5

            @flow.function
            def inner(x): return x + LIMIT

            @flow.function
            def f(point):
                return Point(inner(helper.scale(point.x)))

            # no `if __name__ == "__main__"` is needed
            print(f.remote(Point(1)), [p.x for p in f.map([Point(2), Point(3)])])
            """
        )
    )
    ran = run(sys.executable, "script.py", cwd=tmp_path)
    assert ran.stdout == "Point(x=15) [25, 35]\n" and ran.stderr == "" and ran.returncode == 0


def test_code_from_the_command_line_and_standard_input() -> None:
    code = "import flowfn as flow\nf = flow.function(lambda x: x + 1)\nprint(f.remote(1))\n"
    assert run(sys.executable, "-c", code).stdout == "2\n"
    assert run(sys.executable, "-", text=code).stdout == "2\n"


REPL = """
import flowfn as flow

def helper(x): return x + 1

@flow.function
def f(x): return helper(x)

print("first:", f.remote(1))

def helper(x): return x * 100

print("second:", f.remote(2))

@flow.function
def f(x): return "redefined", helper(x)

print("third:", f.remote(3))
class Config: rate = 1

@flow.function
def g(): return Config.rate

print("rate:", g.remote())
Config.rate = 2
print("rate:", g.remote())
LIMITS = [1]

@flow.function
def h(): return LIMITS

print("limits:", h.remote())
LIMITS.append(2)
print("limits:", h.remote())
"""
REPL_SAYS = [
    "first: 2",
    "second: 200",
    "third: ('redefined', 300)",
    "rate: 1",
    "rate: 2",
    "limits: [1]",
    "limits: [1, 2]",
]


def test_the_repl_through_a_pipe() -> None:
    ran = run(sys.executable, "-i", "-q", text=REPL)
    assert [line for line in ran.stdout.splitlines() if ":" in line] == REPL_SAYS
    assert "Error" not in ran.stderr


def test_the_repl_on_a_terminal(tmp_path: Path) -> None:
    master, slave = pty.openpty()
    # The history is kept in the home directory, and is the user's.
    environ = {**os.environ, "TERM": "dumb", "PYTHON_BASIC_REPL": "1", "HOME": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, "-i", "-q"], stdin=slave, stdout=slave, stderr=slave, env=environ, start_new_session=True
    )
    os.close(slave)
    seen = bytearray()

    def read() -> None:
        try:
            while data := os.read(master, 4096):
                seen.extend(data)
        except OSError:  # how a terminal says that nobody is there any more
            pass

    reader = threading.Thread(target=read)
    reader.start()
    code = (
        "import flowfn as flow\n"
        "f = flow.function(lambda x: print('from', 'afar') or x + 40)\n"
        "print('got', f.remote(2))\n"
        "exit()\n"
    )
    os.write(master, code.encode())
    assert process.wait(WAIT_S) == 0
    reader.join()
    os.close(master)
    lines = seen.decode().replace("\r\n", "\n").split("\n")
    assert any(line.endswith("got 42") for line in lines)
    (output,) = [line for line in lines if line.endswith("from afar")]
    assert "local pid" in output, "a terminal shows whose line it is"


def test_ipython(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("IPython")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    ran = run(sys.executable, "-m", "IPython", "--simple-prompt", "--no-banner", "--colors=NoColor", "-i", text=REPL)
    says = [line.rpartition("]: ")[2] for line in ran.stdout.splitlines()]
    assert [line for line in says if line in REPL_SAYS] == REPL_SAYS, ran.stdout + ran.stderr


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A real notebook kernel, and a client of it."""
    manager_module = pytest.importorskip("jupyter_client.manager")
    pytest.importorskip("ipykernel")
    environ = {**os.environ, "IPYTHONDIR": str(tmp_path_factory.mktemp("ipython"))}
    manager, client = manager_module.start_new_kernel(kernel_name="python3", startup_timeout=WAIT_S, env=environ)
    try:
        yield client
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def cell(client: Any, code: str) -> str:
    """Run a cell; what it printed."""
    said: list[str] = []
    reply = client.execute_interactive(
        textwrap.dedent(code),
        timeout=WAIT_S,
        output_hook=lambda message: (
            said.append(message["content"].get("text") or "\n".join(message["content"].get("traceback", "")))
            if message["msg_type"] in ("stream", "error")
            else None
        ),
    )
    assert reply["content"]["status"] == "ok", "".join(said)
    return "".join(said)


@pytest.mark.filterwarnings("ignore")
def test_a_notebook(kernel: Any, flow_home: Path) -> None:
    home = f"import os; os.environ['FLOW_HOME'] = {str(flow_home)!r}\n"
    assert cell(kernel, home + "import flowfn as flow\ndef helper(x): return x + 1\n") == ""
    assert cell(kernel, "@flow.function\ndef f(x):\n    return helper(x)\nprint(f.remote(1))") == "2\n"
    assert cell(kernel, "def helper(x): return x * 100\nprint(f.remote(2), list(f.map([1, 2])))") == "200 [100, 200]\n"
    assert cell(kernel, "g = flow.function(lambda: print('shown here'))\ng.remote()") == "shown here\n"
    assert cell(kernel, "print(await f.spawn(3), [x async for x in f.map([4])])") == "300 [400]\n"
    warned = cell(kernel, "async def main():\n    return f.remote(4)\nprint(await main())")
    assert "400\n" in warned and "await f.spawn" in warned
    cell(kernel, "class Point:\n    def __init__(self, x): self.x = x\n")
    same = "p = flow.function(lambda p: Point(p.x + 1)).remote(Point(1))\nprint(type(p) is Point, p.x)"
    assert cell(kernel, same) == "True 2\n"
