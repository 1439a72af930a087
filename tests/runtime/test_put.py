from __future__ import annotations

import gc
import os
import pickle
import threading
from typing import Any

import pytest

import flowfn as flow
from flowfn.backends.local import LocalBackend


def test_what_it_says_of_itself() -> None:
    reference = flow.put({"a": list(range(1000))})
    assert "dict" in repr(reference) and "bytes" in repr(reference) and reference.size_bytes > 1000
    assert reference.get()["a"][5] == 5


def test_outside_of_a_call_it_says_what_to_do() -> None:
    data = pickle.dumps(flow.put([1]))
    with pytest.raises(flow.SerializationError, match="call") as caught:
        pickle.loads(data)
    assert caught.value.hint is not None and "get()" in caught.value.hint


def test_what_can_not_be_put() -> None:
    with pytest.raises(flow.SerializationError, match="lock"):
        flow.put({"lock": threading.Lock()})


def test_it_is_a_snapshot() -> None:
    value = {"a": [1]}
    reference = flow.put(value)
    value["a"].append(2)
    assert flow.function(lambda x: x).remote(reference) == {"a": [1]}
    np = pytest.importorskip("numpy")
    for count in (10, 1000, 1_000_000):
        array = np.zeros(count)
        reference = flow.put(array)
        array += 1
        assert flow.function(lambda x: float(x.sum())).remote(reference) == 0


def test_calls_share_the_object_of_their_worker() -> None:
    def f(x: Any) -> tuple[int, int]:
        return os.getpid(), id(x)

    reference = flow.put([[n] for n in range(10_000)])
    seen = set(flow.function(max_workers=3)(f).map([reference] * 300))
    assert len(seen) == len({pid for pid, _ in seen})


@pytest.mark.parametrize("accelerated", [True, False])
def test_arrays_are_read_only_on_every_way(accelerated: bool) -> None:
    np = pytest.importorskip("numpy")
    backend = LocalBackend(accelerated=accelerated)
    try:
        for count in (100, 10_000, 1_000_000):
            reference = flow.put(np.arange(count))

            def f(x: Any) -> bool:
                return bool(x.flags.writeable)

            if count > 100:  # small ones travel in the pickle
                assert flow.function(backend=backend)(f).remote(reference) is False
    finally:
        flow.shutdown()
        backend.close()


def test_workers_on_one_host_share_the_memory() -> None:
    np = pytest.importorskip("numpy")

    def own_kib(x: Any) -> tuple[int, int]:
        total = int(x.sum())
        with open("/proc/self/status") as file:
            fields = dict(line.split(":", 1) for line in file.read().splitlines())
        return total, int(fields["RssAnon"].split()[0])

    reference = flow.put(np.ones(40_000_000, dtype="u1"))
    function = flow.function(max_workers=2)(own_kib)
    before = max(private for _, private in function.map([np.ones(1)] * 20))
    for total, private in function.map([reference] * 20):
        assert total == 40_000_000 and private - before < 30_000  # and not the 39,063 KiB of it


def test_it_is_freed_when_nobody_has_it() -> None:
    def rss(x: Any) -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    backend = LocalBackend(accelerated=False)
    try:
        function = flow.function(backend=backend, max_workers=1)(rss)
        before = function.remote(None)
        for _ in range(8):
            reference = flow.put(os.urandom(50_000_000))
            assert function.remote(reference) > before + 40_000_000
            del reference
            gc.collect()
        assert function.remote(None) - before < 150_000_000
    finally:
        flow.shutdown()
        backend.close()


def test_descriptors_of_big_ones_are_closed() -> None:
    def memory_files() -> int:
        return sum("memfd" in os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _exists(fd))

    gc.collect()
    before = memory_files()
    for _ in range(10):
        assert flow.function(len).remote(flow.put(b"x" * 300_000)) == 300_000
    gc.collect()
    assert memory_files() <= before + 4


def _exists(fd: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")


def test_put_in_put() -> None:
    inner = flow.put(list(range(100)))
    outer = flow.put({"inner": inner})

    def f(x: Any) -> int:
        return sum(x["inner"])

    assert flow.function(f).remote(outer) == 4950


def test_a_put_object_with_a_class_of_main() -> None:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec("class Table:\n    def __init__(self): self.rows = [1, 2]\ndef f(t): return sum(t.rows)\n", namespace)
    assert flow.function(namespace["f"]).remote(flow.put(namespace["Table"]())) == 3


def test_a_reference_that_is_returned_is_the_object() -> None:
    reference = flow.put([1, 2])
    assert flow.function(lambda x: (x, x)).remote(reference) == ([1, 2], [1, 2])


def test_an_executor_takes_it() -> None:
    reference = flow.put([1, 2, 3])
    with flow.Executor(1) as executor:
        assert executor.submit(sum, reference).result(60) == 6
        assert list(executor.map(sum, [reference] * 3)) == [6, 6, 6]
        assert list(executor.map(sum, [reference] * 4, chunksize=2)) == [6] * 4
