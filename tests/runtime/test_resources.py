"""What workers get of this machine, beyond the cases of the contract."""

from __future__ import annotations

import concurrent.futures
import os
import threading
from typing import Any

import pytest

import flowfn as flow
from flowfn.testing import Meeting

WAIT_S = 60.0


@pytest.fixture(autouse=True)
def fresh() -> Any:
    """Workers that know this test's home: locks are there."""
    yield
    flow.shutdown()


@pytest.fixture
def meeting() -> Any:
    place = Meeting("127.0.0.1")
    yield place
    place.close()


def visible() -> str:
    return os.environ["CUDA_VISIBLE_DEVICES"]


def test_the_claim_wins_over_what_the_client_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOW_GPUS", "a100:4")
    assert flow.function(lambda: 1).remote() == 1  # the host is older than what follows
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    shown = flow.function(gpu="a100")(visible).remote()
    assert shown == "3" or "," not in shown
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert flow.function(gpu="a100", env={"CUDA_VISIBLE_DEVICES": "0,1,2,3"})(visible).remote() in {"0", "1", "2", "3"}


def test_slots_declared_later_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(flow.ResourceUnavailable):
        flow.function(gpu="h100")(visible).remote()
    monkeypatch.setenv("FLOW_GPUS", "h100:1")
    assert flow.function(gpu="h100")(visible).remote() == "0"


def test_a_busy_worker_makes_room_when_it_is_done(monkeypatch: pytest.MonkeyPatch, meeting: Meeting) -> None:
    monkeypatch.setenv("FLOW_GPUS", "a100:1")
    meet = meeting.meet

    def hold() -> str:
        meet().recv(1)
        return os.environ["CUDA_VISIBLE_DEVICES"]

    one = flow.function(gpu="a100", env={"SHAPE": "1"}, idle_timeout="1h")(hold)
    other = flow.function(gpu="a100", env={"SHAPE": "2"}, idle_timeout="1h")(visible)
    first = one.spawn()
    met = meeting.next()
    second = other.spawn()
    assert not second.done()
    met.let_go()
    assert first.result(WAIT_S) == second.result(WAIT_S) == "0"


def test_a_map_makes_room_for_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOW_GPUS", "a100:1")
    mapped = flow.function(gpu="a100", env={"SHAPE": "1"}, idle_timeout="1h")(abs)
    other = flow.function(gpu="a100", env={"SHAPE": "2"}, idle_timeout="1h")(visible)
    results = mapped.map(iter(int, 1))  # zeros without end
    assert next(results) == 0
    future = other.spawn()
    consumer = threading.Thread(target=lambda: [None for _ in zip(results, iter(future.done, True), strict=False)])
    consumer.start()
    assert future.result(WAIT_S) == "0"
    consumer.join(WAIT_S)
    results.close()
    assert not consumer.is_alive()


def test_more_calls_than_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOW_GPUS", "a100:3")
    function = flow.function(gpu="a100")(visible)
    seen = [future.result(WAIT_S) for future in [function.spawn() for _ in range(20)]]
    assert set(seen) <= {"0", "1", "2"}


def test_two_that_want_all_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOW_GPUS", "a100:2")
    both = [flow.function(gpu="a100:2", env={"SHAPE": str(n)}, idle_timeout="1h")(visible) for n in range(3)]
    futures = [function.spawn() for _ in range(3) for function in both]
    done, left = concurrent.futures.wait(futures, WAIT_S)
    assert not left and {future.result() for future in done} == {"0,1"}


def test_cores_and_memory_together() -> None:
    def f() -> tuple[str, int]:
        return os.environ["OMP_NUM_THREADS"], len(os.sched_getaffinity(0))

    function = flow.function(cpu=2, memory="1GiB", max_workers=2)(f)
    cores = min(2, len(os.sched_getaffinity(0)))
    assert cores == 2, "this test needs two cores"
    assert function.remote() == ("2", 2)


def test_half_a_core_is_one_thread() -> None:
    def threads() -> str:
        return os.environ["OMP_NUM_THREADS"]

    assert flow.function(cpu=0.5)(threads).remote() == "1"


def test_a_limit_that_python_itself_goes_over() -> None:
    """Too little to do anything with is an error that says so, and not a hang."""
    with pytest.raises((flow.OutOfMemory, flow.BackendError)) as caught:
        flow.function(memory="2MiB")(os.getpid).remote()
    assert "2 MiB" in str(caught.value) or "memory" in str(caught.value)
