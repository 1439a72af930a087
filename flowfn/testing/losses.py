"""Cases: retries, workers that are lost, other versions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import flowfn as flow
from flowfn_runtime import wire

from .base import WAIT_S, Contract, make_where_am_i, needs


class Retrying(Contract):
    """Attempts are counted by what they print: that comes from wherever they ran."""

    def test_as_often_as_asked_for(self) -> None:
        def fails() -> None:
            print("attempt")
            raise ValueError("again")

        for retries, attempts in ((None, 1), (0, 1), (flow.Retries(3, initial_delay=0), 4)):
            future = self.function(fails, retries=retries).spawn()
            assert isinstance(future.exception(timeout=WAIT_S), ValueError)
            assert future.logs().count("attempt") == attempts

    def test_until_it_succeeds(self) -> None:
        def third_time(name: str) -> str:
            import os

            print("attempt")
            count = os.environ[name] = os.environ.get(name, "") + "x"
            if len(count) < 3:
                raise ValueError(count)
            return count

        function = self.function(third_time, max_workers=1, retries=flow.Retries(5, initial_delay=0))
        future = function.spawn("A")
        assert future.result(timeout=WAIT_S) == "xxx" and future.logs().count("attempt") == 3
        assert function.remote("B") == "xxx"

    def test_only_what_is_worth_it(self) -> None:
        def fails(which: str) -> None:
            print("attempt")
            raise {"lookup": KeyError, "value": ValueError}[which]

        function = self.function(fails, retries=flow.Retries(2, initial_delay=0, on=(LookupError,)))
        again, once = function.spawn("lookup"), function.spawn("value")
        assert isinstance(again.exception(timeout=WAIT_S), KeyError) and again.logs().count("attempt") == 3
        assert isinstance(once.exception(timeout=WAIT_S), ValueError) and once.logs().count("attempt") == 1

    def test_classes_of_main_are_worth_it(self) -> None:
        from .base import from_main

        here = from_main("class Flaky(Exception): pass\ndef fails():\n    print('attempt')\n    raise Flaky\n")
        future = self.function(here["fails"], retries=flow.Retries(1, initial_delay=0, on=(here["Flaky"],))).spawn()
        assert type(future.exception(timeout=WAIT_S)) is here["Flaky"] and future.logs().count("attempt") == 2

    def test_others_run_while_one_waits_for_its_next_attempt(self) -> None:
        def f(name: str) -> str:
            import os

            if name == "flaky" and "TRIED" not in os.environ:
                os.environ["TRIED"] = "1"
                raise ValueError
            return os.environ.pop("TRIED", "") if name == "flaky" else os.environ.get("TRIED", "")

        function = self.function(f, max_workers=1, retries=flow.Retries(1, initial_delay=1, jitter=0))
        flaky, other = function.spawn("flaky"), function.spawn("other")
        assert other.result(timeout=WAIT_S) == "1", "it ran after the second attempt"
        assert flaky.result(timeout=WAIT_S) == "1"

    def test_items_of_a_map(self) -> None:
        def f(n: int) -> int:
            import os

            name = f"ITEM_{n}"
            os.environ[name] = os.environ.get(name, "") + "x"
            if n % 4 == 0 and len(os.environ[name]) < 3:
                raise ValueError(n)
            return len(os.environ[name])

        function = self.function(f, max_workers=1, retries=flow.Retries(2, initial_delay=0))
        assert list(function.map(range(40))) == [3 if n % 4 == 0 else 1 for n in range(40)]

        def never(n: int) -> int:
            if n == 3:
                raise ValueError(n)
            return n

        seen = []
        with pytest.raises(ValueError):
            for result in self.function(never, retries=flow.Retries(2, initial_delay=0.01)).map(range(10)):
                seen.append(result)
        assert seen == [0, 1, 2]

    @needs("timeout")
    def test_what_took_too_long(self) -> None:
        def f() -> None:
            while True:
                pass

        future = self.function(f, timeout=0.3, retries=flow.Retries(1, initial_delay=0)).spawn()
        assert isinstance(future.exception(timeout=WAIT_S), flow.FunctionTimeout)


class LostWorkers(Contract):
    @pytest.mark.parametrize("retries", [None, flow.Retries(1, initial_delay=0)])
    def test_a_function_that_exits(self, retries: Any, meeting: Any) -> None:
        meet = meeting.meet

        def f() -> None:
            import os

            meet()
            os._exit(3)

        with pytest.raises(flow.WorkerLost, match="status 3") as caught:
            self.function(f, retries=retries).remote()
        assert caught.value.exitcode == 3
        for _ in range(2 if retries else 1):
            meeting.next().wait_for_end()
        meeting._listener.settimeout(0)
        with pytest.raises(BlockingIOError):  # it did this by itself, so that counts as its failure, and no more
            meeting.next()

    @pytest.mark.parametrize("how", ["SIGSEGV", "SIGABRT"])
    def test_a_function_that_crashes(self, how: str) -> None:
        def f(how: str) -> None:
            import ctypes
            import os
            import signal

            if how == "SIGSEGV":
                ctypes.string_at(8)
            signal.signal(signal.SIGABRT, signal.SIG_DFL)
            os.abort()

        with pytest.raises(flow.WorkerLost, match=how):
            self.function(f).remote(how)
        assert self.function(abs).remote(-1) == 1

    def test_a_worker_that_is_killed_every_time(self, meeting: Any) -> None:
        """Losing workers to kills from outside has a budget of its own, and an end."""
        meet = meeting.meet

        def f() -> None:
            import os
            import signal

            meet()
            os.kill(os.getpid(), signal.SIGKILL)

        with pytest.raises(flow.WorkerLost, match="SIGKILL") as caught:
            self.function(f, name="doomed").remote()
        assert "doomed was tried 3 times" in str(caught.value)
        for _ in range(3):
            meeting.next().wait_for_end()

    @needs("shared-files")
    def test_a_worker_that_is_killed_once(self, scratch: Path) -> None:
        def f(path: str) -> int:
            import os
            import signal

            try:
                os.mkdir(path)
            except FileExistsError:
                return 5
            os.kill(os.getpid(), signal.SIGKILL)
            return 0

        assert self.function(f).remote(str(scratch / "once")) == 5

    @needs("shared-files")
    def test_in_the_middle_of_a_map(self, scratch: Path) -> None:
        def f(n: int, where: str) -> int:
            import os
            import signal

            if n % 40 == 20:
                try:
                    os.mkdir(f"{where}/{n}")
                except FileExistsError:
                    pass
                else:
                    os.kill(os.getpid(), signal.SIGKILL)
            return n

        function = self.function(f, max_workers=2)
        assert list(function.map(range(200), kwargs={"where": str(scratch)})) == list(range(200))
        assert len(list(scratch.iterdir())) == 5
        unordered = sorted(function.map(range(200, 400), kwargs={"where": str(scratch)}, order_outputs=False))
        assert unordered == list(range(200, 400))

    def test_an_item_that_kills_every_worker(self) -> None:
        def f(n: int) -> int:
            import os
            import signal

            if n == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            if n == 11:
                os._exit(1)
            return n

        function = self.function(f, max_workers=2)
        results: list[Any] = list(function.map(range(30), return_exceptions=True))
        for bad in (11, 5):
            assert isinstance(results.pop(bad), flow.WorkerLost)
        assert results == [n for n in range(30) if n not in (5, 11)]
        seen = []
        with pytest.raises(flow.WorkerLost):
            for result in function.map(range(30)):
                seen.append(result)
        assert seen == list(range(5))

    def test_while_a_generator_runs(self) -> None:
        def f() -> Any:
            import os

            yield 1
            yield 2
            os._exit(7)

        stream = self.function(f).remote()
        assert next(stream) == 1
        with pytest.raises(flow.WorkerLost, match="status 7"):
            list(stream)

    def test_its_last_words(self) -> None:
        """What a function printed before it crashed says most about why."""

        def f() -> None:
            import os

            os.write(2, b"assertion failed: x > 0\n")
            os._exit(9)

        future = self.function(f).spawn()
        assert isinstance(future.exception(timeout=WAIT_S), flow.WorkerLost)
        assert "assertion failed: x > 0" in future.logs()

    def test_each_new_worker_is_another(self) -> None:
        where = make_where_am_i()

        def dies() -> None:
            import os

            os._exit(1)

        function = self.function(where, max_workers=1, env={"NEW": "worker"})
        before = function.remote()
        with pytest.raises(flow.WorkerLost):
            self.function(dies, max_workers=1, env={"NEW": "worker"}).remote()
        assert function.remote() != before


class Versions(Contract):
    """This process pretends to be another version than the workers are."""

    @needs("versions")
    def test_another_protocol(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(wire, "PROTOCOL", 4711)
        with pytest.raises(flow.VersionMismatch, match="protocol") as caught:
            self.function(abs, env={"MISMATCH": "protocol"}).remote(-1)
        assert "4711" in str(caught.value) and caught.value.hint

    @needs("versions")
    def test_another_python(self, monkeypatch: pytest.MonkeyPatch) -> None:
        versions = {**wire.versions(), "python": [2, 7]}
        monkeypatch.setattr(wire, "versions", lambda: versions)
        with pytest.raises(flow.VersionMismatch, match="Python") as caught:
            self.function(abs, env={"MISMATCH": "python"}).remote(-1)
        assert "2.7" in str(caught.value) and caught.value.hint
        with pytest.raises(flow.VersionMismatch):
            list(self.function(abs, env={"MISMATCH": "map"}).map([-1]))
        assert isinstance(
            self.function(abs, env={"MISMATCH": "python"}).spawn(-1).exception(timeout=WAIT_S), flow.VersionMismatch
        )
