"""Cases: the project's code, the executor, and what is left when all is over."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import importlib
import os
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

import flowfn as flow

from .base import WAIT_S, Contract, make_where_am_i, open_descriptors


class ProjectCode(Contract):
    @pytest.fixture
    def project(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
        """Makes modules of the user's own project, which no worker has seen before."""
        root = tmp_path / "project"
        root.mkdir()
        monkeypatch.syspath_prepend(root)
        made: list[str] = []

        def make(name: str, source: str) -> Any:
            path = root / f"{name}.py"
            path.write_text(textwrap.dedent(source))
            importlib.invalidate_caches()
            made.append(name)
            return importlib.import_module(name)

        yield make
        for name in made:
            sys.modules.pop(name, None)

    def test_a_function_of_a_module(self, project: Any) -> None:
        project("contract_helper", "FACTOR = 3\ndef scale(x): return FACTOR * x\n")
        module = project("contract_module", "import contract_helper\ndef f(x): return contract_helper.scale(x)\n")
        function = self.function(module.f, env={"PROJECT": "one"})
        assert function.remote(2) == 6
        assert list(function.map(range(5))) == [0, 3, 6, 9, 12]

    def test_a_module_that_comes_later(self, project: Any) -> None:
        """The worker is older than the path of the module."""
        function = self.function(lambda f, x: f(x), max_workers=1, env={"PROJECT": "two"})
        assert function.remote(abs, -1) == 1
        module = project("contract_later", "def f(x): return x + 100\n")
        assert function.remote(module.f, 1) == 101

    def test_a_decorated_function_of_a_module(self, project: Any) -> None:
        module = project(
            "contract_decorated",
            """
            import flowfn as flow

            @flow.function
            def double(x): return 2 * x

            @flow.function
            def quadruple(x): return double(double.local(x))
            """,
        )
        function = module.quadruple.options(backend=self._backend)
        assert function.remote(3) == 12
        assert self.function(lambda x: module.double(x)).remote(4) == 8

    def test_classes_of_a_module_keep_their_identity(self, project: Any) -> None:
        module = project(
            "contract_classes",
            """
            import dataclasses, enum
            class Colour(enum.Enum):
                RED = 1
            @dataclasses.dataclass(frozen=True)
            class Point:
                x: int
                colour: Colour = Colour.RED
            class Missing(Exception):
                def __init__(self, point):
                    super().__init__(f"no {point}")
                    self.point = point
            def f(point):
                if point.x < 0:
                    raise Missing(point)
                assert point.colour is Colour.RED
                return Point(point.x + 1)
            """,
        )
        function = self.function(module.f)
        assert function.remote(module.Point(1)) == module.Point(2)
        with pytest.raises(module.Missing) as caught:
            function.remote(module.Point(-1))
        assert caught.value.point == module.Point(-1)


class Executors(Contract):
    def executor(self, max_workers: int | None = 2, **options: Any) -> flow.Executor:
        return flow.Executor(max_workers, backend=self._backend, **options)

    def test_submit_and_map(self) -> None:
        with self.executor() as executor:
            assert isinstance(executor, concurrent.futures.Executor)
            assert executor.submit(pow, 2, 5).result(timeout=WAIT_S) == 32
            assert list(executor.map(lambda a, b: a * b, range(10), range(10))) == [n * n for n in range(10)]
            assert list(executor.map(abs, range(-50, 0), chunksize=7)) == list(range(50, 0, -1))
            with pytest.raises(ZeroDivisionError):
                executor.submit(lambda: 1 // 0).result(timeout=WAIT_S)

    def test_after_shutdown(self) -> None:
        executor = self.executor()
        future = executor.submit(abs, -3)
        executor.shutdown()
        assert future.done() and future.result() == 3
        with pytest.raises(RuntimeError):
            executor.submit(abs, -3)

    def test_shutdown_with_and_without_waiting(self, meeting: Any) -> None:
        meet = meeting.meet

        def f() -> int:
            meet().recv(1)
            return 5

        executor = self.executor(1)
        futures = [executor.submit(f) for _ in range(4)]
        met = meeting.next()
        executor.shutdown(wait=False, cancel_futures=True)
        assert [future.cancelled() for future in futures] == [False, True, True, True]
        met.let_go()
        assert futures[0].result(timeout=WAIT_S) == 5

    def test_asyncio_can_use_it(self) -> None:
        async def main() -> Any:
            loop = asyncio.get_running_loop()
            with self.executor() as executor:
                return await asyncio.gather(*(loop.run_in_executor(executor, abs, -n) for n in range(5)))

        assert asyncio.run(main()) == list(range(5))

    def test_its_workers_are_its_own(self) -> None:
        where = make_where_am_i()
        with self.executor(1) as one, self.executor(1) as other:
            first = one.submit(where).result(timeout=WAIT_S)
            assert first == one.submit(where).result(timeout=WAIT_S)
            assert first != other.submit(where).result(timeout=WAIT_S)


class CleaningUp(Contract):
    def left_over(self) -> set[str]:
        """What exists outside of this process on account of the backend: processes, containers, jobs.

        Override it for a backend that starts things which are not this process's descendants. A case compares it
        before and after.
        """
        from flowfn_runtime import limits

        return {str(pid) for pid in limits.descendants(os.getpid())}

    def left_since(self, before: set[str]) -> set[str]:
        """What is left over that was not there before.

        An engine's own processes may end after the end of what they ran is known, and tell nobody: they get time to.
        """
        deadline = time.monotonic() + WAIT_S
        while (left := self.left_over() - before) and time.monotonic() < deadline:
            time.sleep(0.05)
        return left

    def shut_down(self) -> None:
        """End all that the backend started."""
        flow.shutdown()
        if isinstance(self._backend, flow.Backend):
            self._backend.close()

    def test_nothing_is_left(self, meeting: Any) -> None:
        meet = meeting.meet

        def busy(n: int) -> Any:
            import os
            import subprocess
            import tempfile

            with open(os.path.join(tempfile.gettempdir(), f"flowfn-contract-user-file-{os.getuid()}"), "w"):
                pass
            subprocess.Popen(["sleep", "600"])
            connection = meet(str(n))
            if n == 2:
                connection.recv(1)
            return b"x" * 1_000_000

        def everything() -> list[Any]:
            function = self.function(busy, max_workers=3)
            reference = flow.put(b"y" * 1_000_000)
            function.remote(0)
            met = [meeting.next()]
            list(self.function(lambda data, n: n).map([reference] * 10, range(10)))
            stream = self.function(lambda: (n for n in range(100))).remote()
            next(stream)
            unfinished = iter(function.map([3, 4, 5, 6]))
            next(unfinished)
            future = function.spawn(2)
            while met[-1].said != "2":
                met.append(meeting.next())
            self.shut_down()
            with pytest.raises(concurrent.futures.CancelledError):
                future.result(timeout=WAIT_S)
            return met

        def files() -> set[str]:
            found = set()
            for directory in (tempfile.gettempdir(), "/dev/shm"):
                if os.path.isdir(directory):
                    found |= {f"{directory}/{name}" for name in os.listdir(directory) if "flowfn" in name}
            return {name for name in found if "flowfn-contract-user-file" not in name}

        self.shut_down()
        gc.collect()
        before = files(), self.left_over(), open_descriptors()
        try:
            for met in everything():
                met.wait_for_end()
                met._socket.close()
            meeting._met.clear()
            gc.collect()
            assert self.left_since(before[1]) == set()
            after = files(), open_descriptors()
            for now, then, what in zip(after, before[::2], ("files", "descriptors"), strict=True):
                assert now - then == set(), what
        finally:
            try:
                os.unlink(os.path.join(tempfile.gettempdir(), "flowfn-contract-user-file"))
            except FileNotFoundError:
                pass

    def test_idle_workers_end(self, meeting: Any) -> None:
        meet = meeting.meet
        kept: list[Any] = []

        def f() -> None:
            kept.append(meet())

        self.function(f, idle_timeout=0).remote()
        meeting.next().wait_for_end()
