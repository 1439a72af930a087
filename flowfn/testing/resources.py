"""Cases: memory, cores, GPUs, environment and secrets."""

from __future__ import annotations

from typing import Any

import pytest

import flowfn as flow

from .base import WAIT_S, Contract, needs


class Memory(Contract):
    @needs("memory", memory={"memory": "512MiB"})
    def test_going_over_the_limit(self) -> None:
        function = self.function(_filling(), memory="300MiB", retries=None)
        with pytest.raises(flow.OutOfMemory, match="300 MiB") as caught:
            function.remote(600)
        error = caught.value
        assert isinstance(error, MemoryError) and isinstance(error, flow.WorkerLost)
        assert error.limit_bytes == 300 << 20 and (error.peak_bytes is None or error.peak_bytes >= 300 << 20)
        assert function.remote(1) == 1

    @needs("memory")
    def test_what_a_function_starts_counts(self) -> None:
        def child() -> None:
            import subprocess
            import sys

            fill = "x = [b'x' * (1 << 20) for _ in range(500)]; input()"
            process = subprocess.Popen([sys.executable, "-c", fill], stdin=subprocess.PIPE)
            process.wait()

        with pytest.raises(flow.OutOfMemory):
            self.function(child, memory="300MiB").remote()

    @needs("memory")
    def test_in_a_map(self) -> None:
        fill = _filling()
        results: list[Any] = list(
            self.function(fill, memory="300MiB", max_workers=1).map([1, 600, 2, 3], return_exceptions=True)
        )
        assert isinstance(results.pop(1), flow.OutOfMemory) and results == [1, 2, 3]


def _filling() -> Any:
    def fill(mib: int) -> int:
        """Use so much memory for as long as it takes somebody to notice."""
        import time

        kept = [b"x" * (1 << 20) for _ in range(mib)]
        if mib >= 100:
            time.sleep(60)
        return len(kept)

    return fill


class Cores(Contract):
    @needs("cpu", cpu={"cpu": 1})
    def test_threads_and_affinity(self) -> None:
        def f() -> tuple[str, str, int]:
            import os

            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
            return os.environ["OMP_NUM_THREADS"], os.environ["OPENBLAS_NUM_THREADS"], cores

        assert self.function(f, cpu=1).remote() == ("1", "1", 1)

    @needs("cpu")
    def test_what_the_user_sets_stands(self) -> None:
        def f() -> str:
            import os

            return os.environ["OMP_NUM_THREADS"]

        assert self.function(f, cpu=1, env={"OMP_NUM_THREADS": "3"}).remote() == "3"

    @needs("cpu")
    def test_more_than_there_are(self) -> None:
        with pytest.raises(flow.ResourceUnavailable, match="cpu"):
            self.function(abs, cpu=4096).remote(-1)


class Gpus(Contract):
    """The backend offers `gpus`; on a machine without, they are declared slots."""

    @pytest.fixture(autouse=True)
    def declared(self, _contract: None, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FLOW_GPUS", self.gpus)

    @needs("gpu", gpu={"gpu": "a100"})
    def test_one_is_shown_to_the_worker(self) -> None:
        def f() -> str:
            import os

            return os.environ["CUDA_VISIBLE_DEVICES"]

        visible = self.function(f, gpu="a100").remote()
        assert visible and "," not in visible

    @needs("gpu")
    def test_several_are_shown_together(self) -> None:
        def f() -> str:
            import os

            return os.environ["CUDA_VISIBLE_DEVICES"]

        assert len(set(self.function(f, gpu="a100:2").remote().split(","))) == 2

    @needs("gpu")
    def test_no_two_workers_share_one(self, meeting: Any) -> None:
        meet = meeting.meet

        def f(n: int) -> str:
            import os

            visible = os.environ["CUDA_VISIBLE_DEVICES"]
            meet(visible).recv(1)
            return visible

        function = self.function(f, gpu="a100")
        futures = [function.spawn(n) for n in range(3)]
        first, second = meeting.next(), meeting.next()
        assert first.said != second.said
        assert [future.status for future in futures] == ["running", "running", "pending"]
        first.let_go()
        third = meeting.next()
        assert third.said == first.said
        second.let_go()
        third.let_go()
        seen = [future.result(timeout=WAIT_S) for future in futures]
        assert set(seen) == {first.said, second.said}

    @needs("gpu")
    def test_a_map_uses_all_that_fit(self) -> None:
        def f(n: int) -> str:
            import os

            return os.environ["CUDA_VISIBLE_DEVICES"]

        assert len(set(self.function(f, gpu="a100").map(range(50)))) <= 2

    @needs("gpu")
    def test_none_that_fits(self) -> None:
        for request in ("b200", "a100:64"):
            with pytest.raises(flow.ResourceUnavailable) as caught:
                self.function(abs, gpu=request).remote(-1)
            text = str(caught.value)
            assert request.split(":")[0] in text and "h100" in text, "say what was asked for, and what there is"

    @needs("gpu")
    def test_the_next_best(self) -> None:
        assert self.function(abs, gpu=["b200", "h100"]).remote(-1) == 1

    @needs("gpu")
    def test_one_is_free_again_when_its_worker_is_gone(self) -> None:
        def f(die: bool) -> str:
            import os

            if die:
                os._exit(1)
            return os.environ["CUDA_VISIBLE_DEVICES"]

        function = self.function(f, gpu="h100")
        before = function.remote(False)
        for _ in range(3):
            with pytest.raises(flow.WorkerLost):
                function.remote(True)
        assert function.remote(False) == before

    @needs("gpu")
    def test_idle_workers_of_another_shape_make_room(self) -> None:
        """A worker that does nothing must not keep a GPU from a call that needs it."""

        def f() -> str:
            import os

            return os.environ["CUDA_VISIBLE_DEVICES"]

        one = self.function(f, gpu="h100", env={"SHAPE": "one"})
        other = self.function(f, gpu="h100", env={"SHAPE": "other"})
        assert one.remote() == other.remote() == one.remote()


class Environments(Contract):
    def test_variables(self) -> None:
        def f() -> tuple[Any, Any]:
            import os
            import subprocess

            shell = subprocess.run(["sh", "-c", "echo $GREETING"], capture_output=True, text=True, check=True)
            return os.environ.get("GREETING"), shell.stdout.strip()

        assert self.function(f, env={"GREETING": "hello"}).remote() == ("hello", "hello")
        assert self.function(f).remote() == (None, "")

    def test_secrets(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def f(name: str) -> Any:
            import os

            return os.environ.get(name)

        monkeypatch.setenv("CONTRACT_TOKEN", "s3cr3t-of-this-process")
        by_name = self.function(f, secrets=["CONTRACT_TOKEN"])
        by_value = self.function(f, secrets={"CONTRACT_KEY": "s3cr3t-by-value"})
        assert by_name.remote("CONTRACT_TOKEN") == "s3cr3t-of-this-process"
        assert by_value.remote("CONTRACT_KEY") == "s3cr3t-by-value"
        for shown in (by_name, by_value, by_name.spec, by_value.spec, by_value.spec.shape):
            assert "s3cr3t" not in repr(shown)

    def test_secrets_that_are_not_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("CONTRACT_TOKEN", raising=False)
        with pytest.raises(flow.ConfigError, match="CONTRACT_TOKEN"):
            self.function(abs, secrets=["CONTRACT_TOKEN"]).remote(-1)

    def test_secrets_in_no_error(self) -> None:
        def dies() -> None:
            import os

            os._exit(1)

        with pytest.raises(flow.WorkerLost) as caught:
            self.function(dies, secrets={"CONTRACT_KEY": "s3cr3t-by-value"}).remote()
        assert "s3cr3t" not in repr(caught.value) + str(caught.value)
