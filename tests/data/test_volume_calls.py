"""Volumes in a bucket, used by calls and tasks: what these changed is in the bucket when their outcome is known."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import flowfn as flow
from flowfn_runtime import sandbox, settings
from flowfn_runtime.data import volume_bucket, volume_commit, volume_sync, volumes

Elsewhere = Callable[[], dict[str, str]]


@pytest.fixture
def elsewhere(exact_s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Elsewhere]:
    """The files of the volume "notes" as another host sees them, which then has them too."""
    try:
        sandbox.check()
    except flow.SandboxError as error:
        pytest.skip(str(error))
    options = exact_s3.options
    for name, value in {
        "AWS_ENDPOINT_URL_S3": options["endpoint_url"],
        "AWS_ACCESS_KEY_ID": options["key"],
        "AWS_SECRET_ACCESS_KEY": options["secret"],
        "AWS_REGION": "us-east-1",
        "FLOW_VOLUMES": f"{exact_s3.url}/volumes",
    }.items():
        monkeypatch.setenv(name, value)

    def look() -> dict[str, str]:
        with monkeypatch.context() as other:
            other.setenv("FLOW_HOME", str(tmp_path / "other"))
            with volumes.attach("notes") as held:
                return {path.name: path.read_text() for path in Path(held.path).iterdir()}

    flow.shutdown()
    yield look
    flow.shutdown()


def note(name: str, text: str = "x", *, fail: bool = False) -> str:
    Path("/notes", name).write_text(text)
    if fail:
        raise KeyError(name)
    return name


async def note_later(name: str) -> str:
    return note(name)


def note_each(names: list[str]) -> Iterator[str]:
    for name in names:
        yield note(name)


async def note_each_later(names: list[str]) -> AsyncIterator[str]:
    for name in names:
        yield note(name)


def mounted(function: Callable[..., Any]) -> Any:
    return flow.function(mounts={"/notes": "volume://notes"})(function)


def test_a_call_is_over_when_its_changes_are_in_the_bucket(elsewhere: Elsewhere) -> None:
    assert mounted(note).remote("call") == "call"
    assert elsewhere() == {"call": "x"}


def test_all_kinds_of_functions(elsewhere: Elsewhere) -> None:
    assert mounted(note_later).remote("coroutine") == "coroutine"
    assert elsewhere() == dict.fromkeys(["coroutine"], "x")
    assert list(mounted(note_each).remote(["a", "b"])) == ["a", "b"]
    assert list(mounted(note_each_later).remote(["c"])) == ["c"]
    expected = dict.fromkeys(["coroutine", "a", "b", "c"], "x")
    assert elsewhere() == expected
    assert list(mounted(note).map(["d", "e", "f"])) == ["d", "e", "f"]
    assert elsewhere() == expected | dict.fromkeys("def", "x")


def test_who_comes_just_when_the_last_user_goes_has_the_present_state(
    elsewhere: Elsewhere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last one's keeper has the volume to itself just then."""
    expected = {}
    for number in range(20):
        with monkeypatch.context() as other:
            other.setenv("FLOW_HOME", str(tmp_path / "other"))
            last = volumes.attach("notes")
        with volumes.attach("notes") as held:
            Path(held.path, str(number)).write_text("x")
            held.commit()
        expected[str(number)] = "x"
        last.close()
        assert elsewhere() == expected


def test_what_a_failed_call_wrote_is_written_back_too(elsewhere: Elsewhere) -> None:
    with pytest.raises(KeyError, match="half"):
        mounted(note).remote("half", fail=True)
    assert elsewhere() == {"half": "x"}


def test_an_output_in_a_volume_is_published_before(elsewhere: Elsewhere) -> None:
    def write(out: flow.Output) -> None:
        Path(out).write_text("published")

    mounted(write).remote(flow.Output("volume://notes/out"))
    assert elsewhere() == {"out": "published"}


def test_a_conflict_is_the_calls_error_and_nothing_is_lost(
    elsewhere: Elsewhere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    function = mounted(note)
    function.remote("first")
    with monkeypatch.context() as other:
        other.setenv("FLOW_HOME", str(tmp_path / "third"))
        with volumes.attach("notes") as held:
            Path(held.path, "theirs").write_text("y")
            assert held.commit()
    with pytest.raises(flow.VolumeConflict, match="changed on another host") as raised:
        function.remote("ours")
    assert elsewhere() == {"first": "x", "theirs": "y"}
    kept = volumes.get("notes").path
    assert kept in str(raised.value) and sorted(path.name for path in Path(kept).iterdir()) == ["first", "ours"]


def test_a_call_that_changes_nothing_writes_nothing(elsewhere: Elsewhere) -> None:
    def read() -> int:
        return len(list(Path("/notes").iterdir()))

    mounted(note).remote("a")
    bucket = volume_bucket.Bucket(settings.volumes() or "")
    head = bucket.key("default", "volumes", volumes.get("notes").id, "head")
    before = bucket.get(head)
    assert [mounted(read).remote() for _ in range(3)] == [1, 1, 1]
    assert before is not None and bucket.get(head) == before


def test_commit_from_inside(elsewhere: Elsewhere) -> None:
    def write() -> tuple[bool, bool]:
        Path("/notes/inside").write_text("x")
        from flowfn.volumes import commit_volume

        return commit_volume("notes"), commit_volume("notes")

    assert mounted(write).remote() == (True, False)
    assert elsewhere() == {"inside": "x"}


def test_a_task_is_completed_when_its_changes_are_in_the_bucket(elsewhere: Elsewhere) -> None:
    assert mounted(note).submit("call").result(timeout=60) == "call"
    assert elsewhere() == {"call": "x"}
    task = flow.run("echo -n hello > /notes/command", volumes=[{"name": "notes", "mount_path": "/notes"}])
    task.wait(timeout=60)
    assert elsewhere() == {"call": "x", "command": "hello"}


def test_files_that_are_being_written_to_wait_for_the_next_time(elsewhere: Elsewhere) -> None:
    bucket = volume_bucket.Bucket(settings.volumes() or "")
    with volumes.attach("notes") as held:
        done = threading.Event()

        def write() -> None:
            with open(Path(held.path, "growing"), "w", buffering=1) as file:
                while not done.wait(0.0001):
                    file.write("x\n")

        writer = threading.Thread(target=write)
        writer.start()
        try:
            Path(held.path, "finished").write_text("y")
            for _ in range(20):
                volume_sync.commit(held.volume, bucket, in_use=True)
            assert elsewhere()["finished"] == "y"
        finally:
            done.set()
            writer.join()
        held.commit()
        assert len(elsewhere()["growing"]) == Path(held.path, "growing").stat().st_size


def test_without_its_keeper_a_call_says_so(elsewhere: Elsewhere, tmp_path: Path) -> None:
    folder = tmp_path / ("a long name " * 12) / "vol_1"
    folder.mkdir(parents=True)
    volume_commit.listen(str(folder)).close()
    with pytest.raises(flow.VolumeError, match=r"writes the volume vol_1 back is gone"):
        volume_commit.ask(str(folder / volume_commit.SOCKET))
