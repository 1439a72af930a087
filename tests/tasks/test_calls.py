"""Calls made durable: `fn.submit` and `invoke`."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from s3 import S3

import flowfn as flow
from flowfn.client import Flow
from flowfn.task import Task
from flowfn_runtime import taskdir
from flowfn_runtime.errors import (
    CallCancelled,
    DataNotFound,
    FunctionTimeout,
    OutOfMemory,
    SerializationError,
    ValidationError,
    WorkerLost,
)


class Odd(Exception):
    def __init__(self, code: int, *, detail: str) -> None:
        super().__init__(f"odd {code}")
        self.detail = detail


def test_a_submitted_call_survives_its_client(project: Path, client: Flow) -> None:
    (project / "helper.py").write_text("def double(x): return 2 * x")
    script = textwrap.dedent("""
        import os, helper
        import flowfn as flow

        factor = 3

        @flow.function
        def work(x, *, plus):
            print("working in", os.getcwd())
            return {"value": helper.double(x) * factor + plus, "pid": os.getpid()}

        task = work.submit(7, plus=1)
        print(task.task_id, os.getpid())
    """)
    (project / "main.py").write_text(script)
    done = subprocess.run([sys.executable, "main.py"], capture_output=True, text=True, check=True)
    task_id, pid = done.stdout.split()
    task = flow.Task.get(task_id)
    for _ in range(2):  # any number of times
        value = task.result(60)
        assert value["value"] == 43 and value["pid"] != int(pid)
    assert task.logs() == "working in /workspace\n"
    assert task.name.startswith("work-") and task.status == "completed"


def submit(function: Any, *args: Any, **options: Any) -> Task:
    task: Task = flow.function(**options)(function).submit(*args)
    return task


def test_every_kind_of_ending(client: Flow) -> None:
    def raise_odd() -> None:
        raise Odd(3, detail="more")

    def die() -> None:
        os.kill(os.getpid(), 9)

    def leave() -> None:
        os.write(2, b"last words\n")
        os._exit(5)

    def unpicklable() -> Any:
        import threading

        return threading.Lock()

    def forever() -> None:
        import time

        time.sleep(300)

    def numbers() -> Any:
        yield from range(3)

    async def later() -> str:
        return "later"

    def large() -> Any:
        import numpy

        return numpy.ones(5_000_000)

    ended = {f.__name__: submit(f) for f in (raise_odd, die, leave, unpicklable, numbers, later, large)}
    slow = submit(forever, timeout=0.3)

    def greedy() -> None:
        kept = bytearray(400 << 20)
        forever()
        del kept

    hog = submit(greedy, memory="200MiB")
    unwanted = submit(forever)
    with pytest.raises(Odd, match="odd 3") as caught:
        ended["raise_odd"].result(60)
    assert caught.value.detail == "more"
    assert "raise_odd" in ended["raise_odd"].logs(stderr=True)
    with pytest.raises(WorkerLost) as lost:
        ended["die"].result(60)
    assert lost.value.exitcode == 137
    with pytest.raises(WorkerLost) as lost:
        ended["leave"].result(60)
    assert lost.value.exitcode == 5 and "last words" in str(lost.value)
    with pytest.raises(SerializationError):
        ended["unpicklable"].result(60)
    assert ended["numbers"].result(60) == [0, 1, 2]
    assert ended["later"].result(60) == "later"
    array = ended["large"].result(60)
    array[0] = 2.0  # it is the caller's own
    assert array.sum() == 5_000_001 and ended["large"].result().sum() == 5_000_000
    with pytest.raises(FunctionTimeout):
        slow.result(60)
    with pytest.raises(OutOfMemory) as memory:
        hog.result(60)
    assert memory.value.limit_bytes == 200 << 20
    unwanted.cancel()
    with pytest.raises(CallCancelled):
        unwanted.result(60)


def test_data_in_calls(client: Flow, s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    url = s3.put("in/a.txt", b"hello")

    def copy(source: Any, target: Any) -> str:
        text = open(source).read()
        with open(target, "w") as file:
            file.write(text.upper())
        return open("/data/a.txt").read() + open("/volumes/mark", "a+").name

    mounts = {"/data": f"{s3.url}/in", "/volumes": "volume://kept"}
    task = submit(copy, flow.File(url), flow.Output(f"{s3.url}/out.txt"), mounts=mounts)
    assert task.result(60) == "hello/volumes/mark"
    assert (s3.root / "out.txt").read_bytes() == b"HELLO"
    with pytest.raises(DataNotFound):
        submit(copy, 1, 2, mounts={"/data": f"{s3.url}/nothing-here"}).result(60)


def test_retries_of_a_call(client: Flow) -> None:
    def flaky() -> int:
        with open("/volumes/tries", "a") as file:
            file.write("x")
        tries = len(open("/volumes/tries").read())
        if tries < 3:
            raise ValueError(tries)
        return tries

    task = submit(flaky, mounts="volume://tries", retries=flow.Retries(5, initial_delay=0))
    assert task.result(60) == 3


def test_secrets_of_a_function(client: Flow, flow_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tell() -> int:
        return len(os.environ["TOKEN"] + os.environ["OTHER"])

    monkeypatch.setenv("TOKEN", "sesame-open")
    task = submit(tell, secrets=["TOKEN"], env={"OTHER": "sesame-close"})
    assert task.result(60) == len("sesame-opensesame-close")
    for path in Path(taskdir.task_dir(task.task_id)).iterdir():
        assert not path.is_file() or b"sesame" not in path.read_bytes(), path


def test_invoke_takes_a_file_anywhere(project: Path, tmp_path: Path, client: Flow) -> None:
    outside = tmp_path / "elsewhere" / "tool.py"
    outside.parent.mkdir()
    outside.write_text("import os\ndef where(x, *, y=1): return (__file__, x, y, os.getcwd())")
    assert flow.invoke(outside, "where", [1], {"y": 2}) == (str(outside), 1, 2, "/workspace")
    (project / "pkg").mkdir()
    (project / "pkg" / "near.py").write_text("N = 4")
    (project / "pkg" / "tool.py").write_text(
        "import near\ndef n(): return near.N, __file__\nclass C:\n  pass\ndef c(): return C()"
    )
    assert flow.invoke("pkg/tool.py", "n") == (4, "/workspace/pkg/tool.py")
    assert type(flow.invoke("pkg/tool.py", "c")).__name__ == "C"
    (project / "broken.py").write_text("def f(:\n")
    for path, name in (("broken.py", "f"), ("none.py", "f"), ("pkg", "f"), ("pkg/tool.py", "m")):
        with pytest.raises(ValidationError):
            flow.invoke(path, name)


def test_invoke_keeps_the_types_of_what_the_client_can_import(
    project: Path, client: Flow, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / "shared_types.py").write_text("class Wrong(Exception): pass\ndef f(): raise Wrong('here')")
    monkeypatch.syspath_prepend(str(project))
    import shared_types  # type: ignore[import-not-found]

    with pytest.raises(shared_types.Wrong, match="here"):
        flow.invoke("shared_types.py", "f")
