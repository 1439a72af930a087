"""Cases: mounts, volumes, references, and objects that travel once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import flowfn as flow

from .base import WAIT_S, Contract, needs


class Mounts(Contract):
    @pytest.fixture
    def tree(self, tmp_path: Path) -> Path:
        tree = tmp_path / "tree"
        (tree / "sub").mkdir(parents=True)
        (tree / "a.txt").write_text("alpha")
        (tree / "sub" / "b.txt").write_text("beta")
        return tree

    @needs("mounts", mounts={"mounts": "/tmp"})
    @pytest.mark.parametrize("prefix", ["", "file://"])
    def test_a_mounted_directory(self, tree: Path, prefix: str) -> None:
        def f() -> tuple[str, list[str], str]:
            import os
            import subprocess

            with open("/data/a.txt") as file:
                text = file.read()
            shell = subprocess.run(["cat", "/data/sub/b.txt"], capture_output=True, text=True, check=True)
            return text, sorted(os.listdir("/data")), shell.stdout

        function = self.function(f, mounts={"/data": f"{prefix}{tree}"})
        assert function.remote() == ("alpha", ["a.txt", "sub"], "beta")
        assert not Path("/data/a.txt").exists(), "the mount is seen on this machine"

    @needs("mounts")
    def test_targets_and_the_function_in_them(self, tree: Path) -> None:
        def f(paths: list[str]) -> list[str]:
            import os

            return [",".join(sorted(os.listdir(path))) for path in paths]

        function = self.function(f, mounts={"/one/deep": str(tree), "/two": str(tree / "sub")})
        assert function.remote(["/one/deep", "/two"]) == ["a.txt,sub", "b.txt"]

    @needs("mounts")
    def test_they_are_read_only(self, tree: Path) -> None:
        def f() -> None:
            with open("/data/new.txt", "w") as file:
                file.write("x")

        with pytest.raises(OSError):
            self.function(f, mounts={"/data": str(tree)}).remote()
        assert not (tree / "new.txt").exists()

    @needs("mounts")
    def test_a_mount_of_what_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(flow.DataNotFound, match="nowhere") as caught:
            self.function(abs, mounts=str(tmp_path / "nowhere")).remote(-1)
        assert isinstance(caught.value, FileNotFoundError)
        with pytest.raises(flow.DataNotFound):
            list(self.function(abs, mounts=str(tmp_path / "nowhere")).map([1, 2]))
        future = self.function(abs, mounts=str(tmp_path / "nowhere")).spawn(-1)
        assert isinstance(future.exception(timeout=WAIT_S), flow.DataNotFound)

    @needs("mounts")
    def test_a_map_over_what_is_mounted(self, tree: Path) -> None:
        for n in range(40):
            (tree / f"{n}.txt").write_text(str(n))

        def f(n: int) -> int:
            with open(f"/data/{n}.txt") as file:
                return int(file.read())

        assert list(self.function(f, mounts={"/data": str(tree)}).map(range(40))) == list(range(40))

    @needs("volumes", volumes={"mounts": {"/models": "volume://contract"}})
    def test_a_volume_is_written_and_read_back(self) -> None:
        def write(text: str) -> None:
            with open("/models/best.txt", "w") as file:
                file.write(text)

        def read() -> str:
            with open("/elsewhere/best.txt") as file:
                return file.read()

        writer = self.function(write, mounts={"/models": "volume://contract"})
        reader = self.function(read, mounts={"/elsewhere": "volume://contract"})
        writer.remote("first")
        assert reader.remote() == "first"
        writer.remote("second")
        assert reader.remote() == "second"
        flow.shutdown()
        assert reader.remote() == "second"


class References(Contract):
    @needs("references")
    def test_a_file_is_a_path(self, tmp_path: Path) -> None:
        (tmp_path / "in.txt").write_text("content")

        def f(file: Any, nested: dict[str, list[Any]]) -> tuple[str, str]:
            with open(file) as one, open(nested["files"][0]) as other:
                return one.read(), other.read()

        reference = flow.File(str(tmp_path / "in.txt"))
        assert self.function(f).remote(reference, {"files": [reference]}) == ("content", "content")

    @needs("references")
    def test_a_directory_reference(self, tmp_path: Path) -> None:
        (tmp_path / "d").mkdir()
        for n in range(3):
            (tmp_path / "d" / f"{n}.txt").write_text(str(n))

        def f(directory: Any) -> list[str]:
            import pathlib

            return sorted(path.read_text() for path in pathlib.Path(directory).iterdir())

        assert self.function(f).remote(flow.Dir(str(tmp_path / "d"))) == ["0", "1", "2"]

    @needs("references", "shared-files")
    def test_an_output_is_published_if_the_call_succeeds(self, scratch: Path) -> None:
        def f(output: Any, fail: bool) -> None:
            with open(output, "w") as file:
                file.write("whole")
            if fail:
                raise ValueError

        function = self.function(f)
        with pytest.raises(ValueError):
            function.remote(flow.Output(str(scratch / "bad.txt")), True)
        function.remote(flow.Output(str(scratch / "good.txt")), False)
        assert (scratch / "good.txt").read_text() == "whole" and not (scratch / "bad.txt").exists()

    @needs("references")
    def test_inputs_of_a_map(self, tmp_path: Path) -> None:
        for n in range(10):
            (tmp_path / f"{n}.txt").write_text(str(n))

        def f(file: Any) -> int:
            with open(file) as opened:
                return int(opened.read())

        files = [flow.File(str(tmp_path / f"{n}.txt")) for n in range(10)]
        assert list(self.function(f).map(files)) == list(range(10))

    @needs("references")
    def test_a_reference_to_what_is_not_there(self, tmp_path: Path) -> None:
        def f(file: Any) -> str:
            with open(file) as opened:
                return opened.read()

        with pytest.raises(flow.DataNotFound):
            self.function(f).remote(flow.File(str(tmp_path / "nowhere.txt")))


class Put(Contract):
    """`flow.put`: an object that many calls use travels once."""

    def test_it_arrives_as_the_object(self) -> None:
        def f(table: dict[str, int], nested: list[Any]) -> tuple[int, bool]:
            return table["a"], nested[0] is table

        reference = flow.put({"a": 7})
        assert self.function(f).remote(reference, [reference]) == (7, True)
        assert reference.get() == {"a": 7}
        assert self.function(f)(reference, [reference.get()]) == (7, True), "a plain call takes it as well"

    def test_it_travels_once(self) -> None:
        class Counted:
            def __setstate__(self, state: Any) -> None:
                import sys

                vars(sys)["flowfn_contract_put"] = vars(sys).get("flowfn_contract_put", 0) + 1

            def __getstate__(self) -> Any:
                return {"pickled": 1}

        def f(thing: Any) -> int:
            import sys

            count: int = vars(sys).get("flowfn_contract_put", 0)
            return count

        reference = flow.put({"thing": Counted(), "size": b"x" * 200_000})
        function = self.function(f, max_workers=1, env={"PUT": "once"})
        assert [function.remote(reference) for _ in range(5)] == [1] * 5
        assert set(function.map([reference] * 20)) == {1}

    def test_big_arrays_are_read_only_and_the_same(self) -> None:
        np = pytest.importorskip("numpy")

        def f(array: Any) -> tuple[float, bool]:
            return float(array.sum()), array.flags.writeable

        array = np.arange(1_000_000, dtype="f8")
        reference = flow.put(array)
        total = float(array.sum())
        array[:] = 0  # later changes are not seen
        function = self.function(f)
        assert set(function.map([reference] * 30)) == {(total, False)}

    def test_inside_other_arguments(self) -> None:
        reference = flow.put(list(range(1000)))
        function = self.function(lambda bundle: sum(bundle["data"][0]) + bundle["n"])
        bundles = [{"data": (reference,), "n": n} for n in range(20)]
        assert list(function.map(bundles)) == [499_500 + n for n in range(20)]

    def test_captured_by_a_function(self) -> None:
        reference = flow.put({"a": 5})

        def f() -> Any:
            return reference["a"]  # type: ignore[index]

        assert self.function(f).remote() == 5

    def test_another_of_the_same_does_not_stand_in_for_it(self) -> None:
        function = self.function(lambda x: x, max_workers=1)
        for n in range(20):
            assert function.remote(flow.put([n])) == [n]

    def test_after_its_worker_was_lost(self) -> None:
        def f(data: list[int], die: bool) -> int:
            import os

            if die:
                os._exit(1)
            return sum(data)

        function = self.function(f, max_workers=1)
        reference = flow.put([1, 2, 3])
        assert function.remote(reference, False) == 6
        with pytest.raises(flow.WorkerLost):
            function.remote(reference, True)
        assert function.remote(reference, False) == 6
