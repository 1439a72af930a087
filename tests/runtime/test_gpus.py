"""The inventory, read through a real NVML client library; claims, by real processes that are really killed."""

from __future__ import annotations

import json
import logging
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from flowfn_runtime import gpus
from flowfn_runtime.errors import ConfigError, ResourceUnavailable
from flowfn_runtime.gpu_request import parse_gpu
from flowfn_runtime.gpus import Claim, Inventory, check, claim, free, holders, inventory, slots

# A driver's library with two A100, one H100 and, where FAKE_MIG is set, the first of them cut in two.
NVML = r"""
#include <string.h>
#include <stdlib.h>
#include <stdio.h>
typedef struct { unsigned long long total, used_or_free, rest; } memory_t;
static int mig(void) { return getenv("FAKE_MIG") != NULL; }
int nvmlInitWithFlags(unsigned flags) { return getenv("FAKE_BROKEN") ? 9 : 0; }
int nvmlInit_v2(void) { return 0; }
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int code) { return code == 9 ? "Driver Not Loaded" : "Some Error"; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = getenv("FAKE_EMPTY") ? 0 : 3; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, long *device) { *device = index + 1; return 0; }
int nvmlDeviceGetMigMode(long device, unsigned *now, unsigned *later)
{ if (device == 3) return 3; *now = *later = mig() && device == 1; return 0; }
int nvmlDeviceGetMaxMigDeviceCount(long device, unsigned *count) { *count = 7; return 0; }
int nvmlDeviceGetMigDeviceHandleByIndex(long device, unsigned index, long *instance)
{ if (index != 1 && index != 4) return 6; *instance = 100 + index; return 0; }
int nvmlDeviceGetName(long device, char *name, unsigned size)
{ strncpy(name, device > 99 ? "NVIDIA A100-SXM4-80GB MIG 1g.10gb" : device == 3 ? "NVIDIA H100 80GB HBM3" :
    "NVIDIA A100-SXM4-80GB", size); return 0; }
int nvmlDeviceGetUUID(long device, char *uuid, unsigned size)
{ snprintf(uuid, size, device > 99 ? "MIG-%ld" : "GPU-%ld-beef", device); return 0; }
int nvmlDeviceGetMemoryInfo(long device, memory_t *memory)
{ memory->total = device > 99 ? 10200547328ULL : 85899345920ULL; return 0; }
"""


@pytest.fixture(scope="session")
def nvml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a libnvidia-ml.so.1, for LD_LIBRARY_PATH."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler to build a libnvidia-ml.so.1 with")
    directory = tmp_path_factory.mktemp("nvml")
    source = directory / "nvml.c"
    source.write_text(NVML)
    library = directory / "libnvidia-ml.so.1"
    subprocess.run([compiler, "-w", "-shared", "-fPIC", "-o", library, source], check=True)
    return directory


def in_subprocess(code: str, env: Mapping[str, str]) -> Any:
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


READ = (
    "import json; from flowfn_runtime.gpus import inventory; there = inventory()\n"
    "print(json.dumps([there.source, there.reason, str(there),"
    " [[g.index, g.uuid, g.model, g.memory_bytes, g.declared] for g in there.gpus]]))"
)


def test_the_inventory_is_read_through_nvml(nvml: Path) -> None:
    source, reason, text, found = in_subprocess(READ, {"LD_LIBRARY_PATH": str(nvml)})
    assert (source, reason, text) == ("nvml", "", "2 x a100 (80 GiB), 1 x h100 (80 GiB)")
    assert found == [
        [0, "GPU-1-beef", "a100", 80 << 30, False],
        [1, "GPU-2-beef", "a100", 80 << 30, False],
        [2, "GPU-3-beef", "h100", 80 << 30, False],
    ]


def test_mig_instances_stand_for_a_device_that_is_cut_up(nvml: Path) -> None:
    *_, found = in_subprocess(READ, {"LD_LIBRARY_PATH": str(nvml), "FAKE_MIG": "1"})
    assert [(uuid, model) for _, uuid, model, *_ in found] == [
        ("MIG-101", "a100-mig-1g.10gb"),
        ("MIG-104", "a100-mig-1g.10gb"),
        ("GPU-2-beef", "a100"),
        ("GPU-3-beef", "h100"),
    ]


@pytest.mark.parametrize(
    ("visible", "uuids"),
    [
        ("1", ["GPU-2-beef"]),
        ("2,0", ["GPU-3-beef", "GPU-1-beef"]),
        ("GPU-3", ["GPU-3-beef"]),
        ("0,-1,1", ["GPU-1-beef"]),
        ("0,0", ["GPU-1-beef"]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("GPU-", []),
    ],
)
def test_what_the_process_may_not_see_is_not_there(nvml: Path, visible: str, uuids: list[str]) -> None:
    _, reason, _, found = in_subprocess(READ, {"LD_LIBRARY_PATH": str(nvml), "CUDA_VISIBLE_DEVICES": visible})
    assert [uuid for _, uuid, *_ in found] == uuids
    assert f"CUDA_VISIBLE_DEVICES={visible!r} leaves {len(uuids)} of 3" in reason


def test_a_driver_that_fails_is_a_reason_and_no_error(nvml: Path) -> None:
    source, reason, text, found = in_subprocess(READ, {"LD_LIBRARY_PATH": str(nvml), "FAKE_BROKEN": "1"})
    assert (source, reason, found) == ("none", "NVML says: Driver Not Loaded", [])
    assert text == "no GPU (NVML says: Driver Not Loaded)"
    source, reason, _, _ = in_subprocess(READ, {"LD_LIBRARY_PATH": str(nvml), "FAKE_EMPTY": "1"})
    assert (source, reason) == ("none", "NVML finds no device")


def test_no_nvml_client_library_is_a_reason_and_no_error() -> None:
    code = "import sys; sys.modules['pynvml'] = None\n" + READ
    source, reason, _, found = in_subprocess(code, {})
    assert (source, found) == ("none", [])
    assert "driver" in reason


def test_a_worker_sees_its_gpus_by_uuid(nvml: Path) -> None:
    code = (
        "import json; from flowfn_runtime.gpus import claim; from flowfn_runtime.gpu_request import parse_gpu\n"
        "envs = [claim(parse_gpu('h100')).env, claim(parse_gpu('any:2')).env]\n"
        "print(json.dumps([{k: v for k, v in env.items() if 'VISIBLE' in k} for env in envs]))"
    )
    assert in_subprocess(code, {"LD_LIBRARY_PATH": str(nvml)}) == [
        dict.fromkeys(("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES"), visible)
        for visible in ("GPU-3-beef", "GPU-1-beef,GPU-2-beef")
    ]


def declared(text: str) -> Inventory:
    return inventory(text, environ={})


def take(text: Any, there: Inventory, **options: Any) -> Claim | None:
    return claim(parse_gpu(text), there=there, **options)


def taken(text: Any, there: Inventory) -> Claim:
    found = take(text, there)
    assert found is not None
    return found


def test_declared_slots(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    with caplog.at_level(logging.INFO, logger="flowfn.gpus"):
        there = inventory(environ={"FLOW_GPUS": "a100-80gb:2, h100"})
    assert "declared, not found: FLOW_GPUS=a100-80gb:2, h100" in caplog.text
    assert [(g.index, g.model, g.memory_bytes, g.declared) for g in there.gpus] == [
        *((0, "a100", 80 * 10**9, True), (1, "a100", 80 * 10**9, True), (2, "h100", 0, True)),
    ]
    assert str(there) == "2 x a100 (75 GiB), 1 x h100 (declared by FLOW_GPUS)"
    with taken("h100", there) as held:
        assert held.env["CUDA_VISIBLE_DEVICES"] == held.env["NVIDIA_VISIBLE_DEVICES"] == "2"
    restricted = inventory("a100:4", environ={"CUDA_VISIBLE_DEVICES": "1,3"})
    assert [gpu.index for gpu in restricted.gpus] == [1, 3]
    assert inventory("none", environ={}).gpus == ()
    with pytest.raises(ConfigError, match="FLOW_GPUS="):
        inventory("a100:few", environ={})


def test_a_claim_is_exclusive_until_closed() -> None:
    there = declared("a100:2")
    first, second = taken("a100", there), taken("a100", there)
    assert {first.gpus[0].index, second.gpus[0].index} == {0, 1}
    assert take("a100", there) is None
    assert free(there) == ()
    first.close()
    first.close()
    assert free(there) == first.gpus
    assert taken("a100", there).gpus == first.gpus


def test_no_request_claims_nothing() -> None:
    held = claim(())
    assert held is not None
    assert (held.env, held.fds, held.gpus) == ({}, (), ())


def test_all_or_none() -> None:
    there = declared("a100:4")
    held = taken("a100:3", there)
    assert take("a100:2", there) is None
    assert len(free(there)) == 1
    held.close()
    assert len(taken("a100:4", there).fds) == 4


def test_the_first_fallback_that_is_free_is_taken() -> None:
    there = declared("a100:2,h100:1")
    assert taken(["h100:2", "h100", "a100"], there).request == parse_gpu("h100")[0]
    assert taken(["h100:2", "h100", "a100"], there).request == parse_gpu("a100")[0]


def test_the_smallest_that_fits_is_taken() -> None:
    there = declared("a100-80gb:1,a100-40gb:1")
    assert taken("a100-40gb", there).gpus[0].memory_bytes == 40 * 10**9
    assert taken("a100-40gb", there).gpus[0].memory_bytes == 80 * 10**9


def test_what_never_fits_names_what_was_asked_and_what_is_there() -> None:
    there = declared("a100:2")
    for wait in (False, True):
        with pytest.raises(ResourceUnavailable) as caught:
            take(["h100:8", "a100:3"], there, wait=wait)
        assert "h100:8 or a100:3 asked for; this host has 2 x a100 (declared by FLOW_GPUS)" in str(caught.value)
    with pytest.raises(ResourceUnavailable, match=r"no GPU \(.*FLOW_GPUS"):
        check(parse_gpu("any"), Inventory((), "none", "FLOW_GPUS declares none"))
    check((), Inventory((), "none"))


def test_how_many_workers_there_is_room_for() -> None:
    there = declared("a100:5,h100:2")
    assert slots(parse_gpu("a100:2"), there=there) == 2
    assert slots(parse_gpu("any"), there=there) == 7
    assert slots(parse_gpu(["h100", "a100:2", "any"]), there=there) == 5
    assert slots([("a100", None, 5)], there=there) == 1  # as requests travel
    with pytest.raises(ResourceUnavailable):
        slots(parse_gpu("l4"), there=there)
    with taken("h100:2", there):  # who has them now does not matter
        assert slots(parse_gpu("h100"), there=there) == 2


CHILD = """
import os, sys
from flowfn_runtime.gpu_request import parse_gpu
from flowfn_runtime.gpus import claim, inventory
held = claim(parse_gpu(sys.argv[1]), there=inventory(sys.argv[2], environ={}), wait=True)
print(*[gpu.index for gpu in held.gpus], flush=True)
sys.stdin.read()
"""


@contextmanager
def holder(text: str, slots: str) -> Iterator[subprocess.Popen[str]]:
    """Another client that claims, says what it has got, and keeps it until its stdin ends or it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, text, slots], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_clients_exclude_each_other_and_the_kernel_frees_what_a_killed_one_held() -> None:
    there = declared("a100:2")
    with holder("a100:2", "a100:2") as other:
        assert line(other) == "0 1"
        assert take("a100", there) is None
        other.kill()
        other.wait()
        assert len(taken("a100:2", there).gpus) == 2


def test_who_holds_what() -> None:
    there = declared("a100:3")
    mine = taken("a100", there)
    worker = subprocess.Popen(["sleep", "1000"], pass_fds=mine.fds)
    with holder("a100", "a100:3") as other:
        assert line(other) == "1"
        waits = os.open(gpus._slot(there.gpus[2]), os.O_RDONLY | os.O_NONBLOCK)  # as one who waits has it
        found = holders(there)
        os.close(waits)
    worker.kill()
    worker.wait()
    assert found == {there.gpus[0]: sorted([os.getpid(), worker.pid]), there.gpus[1]: [other.pid]}


def test_a_waiter_is_woken_by_the_death_of_a_holder() -> None:
    with holder("a100", "a100:1") as first, holder("a100", "a100:1") as second:
        # Which of them came first is open; the one that has it says so.
        assert first.stdout is not None and second.stdout is not None
        ready, _, _ = select.select([first.stdout, second.stdout], [], [], 60)
        winner, loser = (first, second) if ready[0] is first.stdout else (second, first)
        assert line(winner) == "0"
        winner.kill()
        assert line(loser) == "0"


def test_waiting_for_several_of_them() -> None:
    there = declared("a100:3")
    holds = [taken("a100", there) for _ in range(3)]
    with holder("a100:2", "a100:3") as other:
        assert other.stdin is not None
        holds[0].close()
        holds[2].close()
        assert line(other) == "0 2"


def test_waiting_ends_by_timeout_or_when_cancelled() -> None:
    there = declared("a100")
    held = taken("a100", there)
    assert take("a100", there, wait=True, timeout=0.01) is None
    read, write = os.pipe()
    outcome: list[Claim | None] = []
    thread = threading.Thread(target=lambda: outcome.append(take("a100", there, wait=True, cancel=read)))
    thread.start()
    os.close(write)
    thread.join()
    os.close(read)
    assert outcome == [None]
    held.close()
    again = take("a100", there, wait=True, timeout=60)
    assert again is not None


def test_a_worker_that_inherits_a_claim_keeps_it() -> None:
    there = declared("a100")
    held = taken("a100", there)
    worker = subprocess.Popen(["sleep", "1000"], pass_fds=held.fds)
    held.close()
    assert take("a100", there) is None
    worker.send_signal(signal.SIGKILL)
    assert take("a100", there, wait=True, timeout=60) is not None
    worker.wait()


def test_what_a_worker_calls_shares_its_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    held = taken("a100:2", declared("a100:3"))
    with monkeypatch.context() as worker:  # in its environment, and in that of a worker of its own
        for name, value in held.env.items():
            worker.setenv(name, value)
        there = inventory("a100:3")
        assert there.gpus == held.gpus
        first, second = taken("a100", there), taken("a100", there)
        assert take("a100", there) is None
        for name, value in second.env.items():
            worker.setenv(name, value)
        assert taken("a100", inventory("a100:3")).gpus == second.gpus
        assert take("a100", inventory("a100:3")) is None
    assert len(free(declared("a100:3"))) == 1
    first.close()


def test_a_claim_is_not_inherited_by_accident() -> None:
    there = declared("a100")
    held = taken("a100", there)
    stranger = subprocess.Popen(["sleep", "1000"], close_fds=False)
    held.close()
    assert take("a100", there) is not None
    stranger.kill()
    stranger.wait()


def test_many_clients_never_share_a_gpu_and_all_get_their_turn(tmp_path: Path) -> None:
    code = """
import os, sys
from flowfn_runtime.gpu_request import parse_gpu
from flowfn_runtime.gpus import claim, inventory
there = inventory("a100:4", environ={})
for turn in range(15):
    with claim(parse_gpu(sys.argv[1]), there=there, wait=True) as held:
        marks = [os.path.join(sys.argv[2], str(gpu.index)) for gpu in held.gpus]
        for mark in marks:
            os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
        for mark in marks:
            os.unlink(mark)
"""
    clients = [
        subprocess.Popen([sys.executable, "-c", code, f"a100:{1 + number % 4}", str(tmp_path)]) for number in range(8)
    ]
    assert [client.wait() for client in clients] == [0] * 8


def test_locks_are_private(flow_home: Path) -> None:
    taken("a100", declared("a100"))
    for path in [flow_home, *flow_home.rglob("*")]:
        assert path.stat().st_mode & 0o077 == 0, path


def test_a_home_that_takes_no_locks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "_directory", lambda: "/proc/self")
    with pytest.raises(ResourceUnavailable, match="no lock can be made in /proc/self"):
        gpus._slot(declared("a100").gpus[0])


def flow_gpus(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from flowfn.cli import main; sys.exit(main(['gpus', *sys.argv[1:]]))"
    return subprocess.run(
        [sys.executable, "-c", code, *args], env={**os.environ, **env}, capture_output=True, text=True, timeout=60
    )


def test_the_verb_lists_what_is_there_and_who_has_it(nvml: Path) -> None:
    done = flow_gpus("--json", LD_LIBRARY_PATH=str(nvml))
    assert done.returncode == 0, done.stderr
    listed = json.loads(done.stdout)
    assert listed["source"] == "nvml"
    assert [(gpu["model"], gpu["uuid"], gpu["processes"]) for gpu in listed["gpus"]] == [
        *(("a100", "GPU-1-beef", []), ("a100", "GPU-2-beef", []), ("h100", "GPU-3-beef", [])),
    ]
    with taken("h100", declared("a100:1,h100:1")):
        done = flow_gpus(FLOW_GPUS="a100:1,h100:1")
    header, first, second = done.stdout.splitlines()
    assert header.split() == ["INDEX", "MODEL", "MEMORY", "UUID", "USED", "BY"]
    assert first.split() == ["0", "a100", "(declared)", "free"]
    assert second.split()[:4] == ["1", "h100", "(declared)", str(os.getpid())]
    assert "declared" in done.stderr


def test_the_verb_says_why_there_is_none(nvml: Path) -> None:
    done = flow_gpus(LD_LIBRARY_PATH=str(nvml), FAKE_BROKEN="1")
    assert (done.returncode, done.stdout) == (0, "")
    assert "no GPU here: NVML says: Driver Not Loaded" in done.stderr
    assert json.loads(flow_gpus("--json", FLOW_GPUS="none").stdout)["gpus"] == []
