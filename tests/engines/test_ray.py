"""The Ray backend on a real Ray of this machine, in a network and process namespace of its own."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import engines
import pytest

MODULE = """
import flowfn as flow

@flow.function(backend="ray")
def double(x):
    return 2 * x
"""

SCRIPT = """
import os
import subprocess
import sys
import time

import numpy as np
import ray

import flowfn as flow
import usersmodule

ray.init(num_cpus=3, num_gpus=2, resources={"accelerator_type:A100": 1}, log_to_driver=False, namespace="flowfn")


@flow.function(backend="ray")
def where():
    return os.getpid(), os.getppid(), os.getcwd()


pid, parent, cwd = where.remote()
assert pid != os.getpid() and parent != os.getpid(), (pid, parent)
command = subprocess.run(["ps", "-ww", "-o", "args=", "-p", str(parent)], capture_output=True, text=True).stdout
assert "flowfn_runtime" in command, command
print("ok identity")

assert usersmodule.double.remote(4) == 8  # by name: its file went along
assert list(usersmodule.double.map(range(2000))) == [2 * i for i in range(2000)]
print("ok project and map")

big = np.arange(1 << 22, dtype=np.float64)


@flow.function(backend="ray")
def scaled(array, factor):
    print("scaling")
    return array * factor


assert np.array_equal(scaled.remote(big, factor=2.0), big * 2)
future = scaled.spawn(big[:10], factor=1.0)
future.result()
assert future.logs() == "scaling\\n", future.logs()
print("ok arrays and logs")


class Odd(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")
        self.one = one


@flow.function(backend="ray")
def fail():
    raise Odd(1, 2)


try:
    fail.remote()
except Odd as error:
    assert error.one == 1
else:
    raise AssertionError("nothing was raised")


@flow.function(backend="ray", timeout=0.5)
def slow():
    time.sleep(60)


try:
    slow.remote()
except flow.FunctionTimeout:
    pass
else:
    raise AssertionError("nothing was raised")


@flow.function(backend="ray")
def die():
    os._exit(3)


try:
    die.remote()
except flow.WorkerLost as error:
    assert error.exitcode == 3, error
else:
    raise AssertionError("nothing was raised")


@flow.function(backend="ray", memory="300MiB")
def hog():
    return len(bytearray(os.urandom(1 << 20) * 600))


try:
    hog.remote()
except flow.OutOfMemory as error:
    assert error.limit_bytes == 300 << 20, error
else:
    raise AssertionError("nothing was raised")
print("ok errors")


@flow.function(backend="ray", gpu="a100:2", max_workers=1)
def gpus():
    return os.environ["CUDA_VISIBLE_DEVICES"]


assert sorted(gpus.remote().split(",")) == ["0", "1"]
for refused in (
    {"gpu": "b200"},
    {"gpu": "a100:4"},
    {"cpu": 64},
    {"memory": "64TiB"},
    {"image": "debian:12"},  # there is no Podman, or no Ray in it
    {"image": flow.Image.from_registry("debian:12").pip_install("numpy")},
):
    try:
        where.options(**refused).remote()
    except flow.FlowError as error:
        print("refused:", str(error).splitlines()[0])
    else:
        raise AssertionError(f"{refused} was not refused")
print("ok resources")

version = f"{sys.version_info[0]}.{sys.version_info[1]}"


@flow.function(backend="ray", image=flow.Image.python(version).run("echo made > $VIRTUAL_ENV/mark").env(OF="image"))
def prefix():
    return sys.prefix, open(f"{sys.prefix}/mark").read(), os.environ["OF"]


made, mark, of = prefix.remote()
assert made != sys.prefix and mark.split() == ["made"] and of == "image", (made, mark, of)
print("ok image")

# Raw Ray beside it goes on, and can't be disturbed by what workers do.
assert ray.get(ray.remote(lambda n: abs(n)).remote(-1)) == 1
print("ok beside Ray")
flow.shutdown()
deadline = time.monotonic() + 30
while "flowfn_runtime.host" in (left := subprocess.run(["ps", "axo", "args="], capture_output=True, text=True).stdout):
    assert time.monotonic() < deadline, left
print("ok all")
"""


def test_functions_run_as_ray_actors(tmp_path: Path, flow_home: Path) -> None:
    engines.need(None if importlib.util.find_spec("ray") else "Ray is not installed (pip install 'flowfn[ray]')")
    engines.need(
        None if os.getuid() == 0 and shutil.which("unshare") else "a network of its own takes root and unshare"
    )
    project = tmp_path / "project"
    project.mkdir()
    (project / "usersmodule.py").write_text(MODULE)
    (project / "main.py").write_text(SCRIPT)
    environ = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    inside = f"ip link set lo up; exec {sys.executable} main.py"
    command = ["unshare", "-n", "-p", "-f", "--kill-child", "--mount-proc", "bash", "-c", inside]
    try:
        done = subprocess.run(command, cwd=project, env=environ, capture_output=True, text=True, timeout=240)
    except subprocess.TimeoutExpired as error:
        pytest.fail(f"it hangs after:\n{error.stdout!r}\n{error.stderr!r}")
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-4000:]}"
    assert done.stdout.splitlines()[-1] == "ok all"
