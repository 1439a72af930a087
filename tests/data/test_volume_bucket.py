"""Volumes in a bucket, and hosts that share nothing else: each has a home of its own."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from s3 import S3

from flowfn_runtime.data import volume_bucket, volume_db, volume_fetch, volume_locks, volumes
from flowfn_runtime.errors import ConfigError, VolumeConflict, VolumeError, VolumeInUse, VolumeNotFound

Host = Callable[[str], None]


@pytest.fixture
def on(exact_s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    """Go to a host, by its name."""
    options = exact_s3.options
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", options["endpoint_url"])
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", options["key"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", options["secret"])
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("FLOW_VOLUMES", f"{exact_s3.url}/volumes")

    def go(name: str) -> None:
        monkeypatch.setenv("FLOW_HOME", str(tmp_path / name))

    go("one")
    return go


def free(name: str) -> None:
    """Return when the volume's keeper has written back and ended."""
    volume = volumes.get(name)
    turn = os.open(os.path.join(os.path.dirname(volume.path), "keeper.lock"), os.O_RDWR)
    import fcntl

    fcntl.flock(turn, fcntl.LOCK_EX)
    os.close(turn)


def tree(root: str) -> dict[str, tuple[Any, ...]]:
    found = {}
    for path in Path(root).rglob("*"):
        status = path.lstat()
        content: Any = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        mode = None if path.is_symlink() else stat.S_IMODE(status.st_mode)
        found[str(path.relative_to(root))] = (mode, status.st_mtime_ns, content)
    return found


def test_what_one_host_writes_the_next_one_finds(on: Host) -> None:
    with volumes.attach("models") as held:
        root = Path(held.path)
        (root / "deep" / "er").mkdir(parents=True)
        (root / "deep" / "er" / "data").write_bytes(os.urandom(100_000))
        (root / "big").write_bytes(os.urandom(20_000_000))
        (root / "script").write_text("#!/bin/sh\n")
        (root / "script").chmod(0o750)
        (root / "link").symlink_to("deep/er/data")
        (root / "away").symlink_to("/nowhere")
        (root / "empty").mkdir(mode=0o500)
        (root / "näme with spaces").write_text("x")
        os.utime(root / "script", ns=(10**18, 10**18))
        os.utime(root / "deep", ns=(10**18, 10**18))
        expected = tree(held.path)
    free("models")
    on("two")
    with volumes.attach("models") as held:
        assert tree(held.path) == expected
        (Path(held.path) / "script").write_text("#!/bin/sh\nexit\n")
        (Path(held.path) / "link").unlink()
        os.rename(Path(held.path) / "deep", Path(held.path) / "moved")
        expected = tree(held.path)
    free("models")
    on("one")
    with volumes.attach("models") as held:
        assert tree(held.path) == expected


def test_only_changes_move(on: Host, exact_s3: Any) -> None:
    def contents() -> set[str]:
        listed = exact_s3.client.list_objects_v2(Bucket=exact_s3.bucket).get("Contents", [])
        return {item["Key"] for item in listed if "/data/" in item["Key"]}

    with volumes.attach("models") as held:
        for number in range(20):
            Path(held.path, str(number)).write_bytes(b"%d" % number * 1000)
        assert held.commit()
        first = contents()
        assert len(first) == 20
        assert not held.commit()
        Path(held.path, "3").write_bytes(b"new")
        assert held.commit()
        assert contents() > first and len(contents()) == 21
        Path(held.path, "4").unlink()
        assert held.commit()
        Path(held.path, "5").unlink()
        assert held.commit()
        assert len(contents()) == 19  # what only states before the last but one had is cleared away


def test_names_and_ids_are_the_same_everywhere(on: Host) -> None:
    made = volumes.create("models", size_gb=5, region="eu")
    unnamed = volumes.create()
    on("two")
    found = volumes.get("models")
    assert (found.id, found.size_gb, found.region) == (made.id, 5, "eu") and found.path != made.path
    assert volumes.find_or_create("models").id == volumes.get(made.id).id == made.id
    with pytest.raises(VolumeError, match=made.id):
        volumes.create("models")
    with pytest.raises(VolumeNotFound):
        volumes.get("models", "other-project")
    with pytest.raises(VolumeNotFound):
        volumes.get(made.id, "other-project")
    assert {volume.id for volume in volumes.list_volumes()} == {made.id, unnamed.id}
    volumes.delete("models")
    on("one")
    assert [volume.id for volume in volumes.list_volumes()] == [unnamed.id]
    with pytest.raises(VolumeNotFound):
        volumes.attach("models", create=False)
    assert volumes.create("models").id != made.id


def test_many_hosts_make_one_volume(on: Host, tmp_path: Path) -> None:
    code = "from flowfn_runtime.data import volumes; print(volumes.find_or_create('shared').id)"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, "FLOW_HOME": str(tmp_path / str(number))},
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(12)
    ]
    ends = {process.communicate(timeout=100)[0] for process in processes}
    assert len(ends) == 1 and {process.returncode for process in processes} == {0}
    assert len(volumes.list_volumes()) == 1


def test_two_writers_conflict_and_nothing_is_lost(on: Host) -> None:
    with volumes.attach("models") as held:
        Path(held.path, "shared").write_text("begin")
        held.commit()
    free("models")
    on("two")
    two = volumes.attach("models")
    on("one")
    one = volumes.attach("models")
    Path(one.path, "shared").write_text("of one")
    assert one.commit()
    on("two")
    Path(two.path, "shared").write_text("of two")
    with pytest.raises(VolumeConflict, match="nothing is lost"):
        two.commit()
    assert Path(two.path, "shared").read_text() == "of two"
    two.close()
    free("models")  # its keeper finds the same conflict, and leaves everything as it is
    with pytest.raises(VolumeConflict) as conflict:
        volumes.attach("models")
    (aside,) = Path(two.path).parent.glob("conflict-*")
    assert str(aside) in str(conflict.value)
    assert (aside / "shared").read_text() == "of two"
    with volumes.attach("models") as held:
        assert Path(held.path, "shared").read_text() == "of one"
    on("one")
    one.close()


def test_what_a_killed_user_wrote_is_written_back(on: Host) -> None:
    code = """
import os
from flowfn_runtime.data import volumes
held = volumes.attach("models", exclusive=True)
with open(held.path + "/result", "w") as file:
    file.write("1")
os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    free("models")
    on("two")
    with volumes.attach("models") as held:
        assert Path(held.path, "result").read_text() == "1"


def test_a_fetch_that_was_cut_short_is_done_again(on: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    with volumes.attach("models") as held:
        for number in range(30):
            Path(held.path, str(number)).write_bytes(b"%d" % number * 1000)
        held.commit()
    free("models")
    on("two")
    code = """
import os, threading
from flowfn_runtime.data import volume_sync, volumes
real, count = os.replace, iter(range(10**6))
def replace(*args):  # killed after some of the files
    if not args[1].endswith("base.json") and next(count) == 12:
        os.kill(os.getpid(), 9)
    real(*args)
os.replace = replace
volumes.attach("models")
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert 0 < len(os.listdir(volumes.get("models").path)) < 30
    with volumes.attach("models") as held:
        assert len(os.listdir(held.path)) == 30
        assert not held.commit()


def test_on_one_host_the_copy_is_shared(on: Host) -> None:
    one = volumes.attach("models")
    Path(one.path, "x").write_text("1")
    with volumes.attach("models") as two:
        assert Path(two.path, "x").read_text() == "1"
    with pytest.raises(VolumeInUse):
        volumes.attach("models", exclusive=True)
    with pytest.raises(VolumeInUse):
        volumes.delete("models")
    one.close()
    free("models")
    lock = volume_locks.acquire(volumes.get("models"), exclusive=True, wait=True)
    volume_db.release(lock)
    volumes.delete("models")


def test_changes_to_a_deleted_volume_are_kept(on: Host) -> None:
    held = volumes.attach("models")
    Path(held.path, "x").write_text("1")
    held.commit()
    on("two")
    volumes.delete("models")
    on("one")
    Path(held.path, "x").write_text("2")
    with pytest.raises(VolumeNotFound):
        held.commit()
    held.close()
    assert Path(held.path, "x").read_text() == "2"


def test_a_manifest_can_not_reach_out_of_the_volume(on: Host, exact_s3: Any, tmp_path: Path) -> None:
    for bad in (
        {"../out": ["f", 0o600, 0, 0, "x"]},
        {"/out": ["f", 0o600, 0, 0, "x"]},
        {"a": ["l", 0, 0, 0, str(tmp_path)], "a/out": ["f", 0o600, 0, 0, "x"]},
    ):
        volume = volumes.create()
        bucket = volume_bucket.Bucket(os.environ["FLOW_VOLUMES"])
        import hashlib
        import json

        text = json.dumps({"entries": bad, "contents": {"x": "x"}}).encode()
        base = ("volumes", volume.id)
        bucket.put(bucket.key("default", *base, "manifests", "1-x"), text)
        head = {"generation": 1, "manifest": "1-x", "sha256": hashlib.sha256(text).hexdigest()}
        bucket.put_if(bucket.key("default", *base, "head"), json.dumps(head).encode(), None)
        with pytest.raises(VolumeError, match="impossible path"):
            volumes.attach(volume.id)
    assert not list(tmp_path.rglob("out"))


def test_a_store_without_conditional_writes_is_refused(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FLOW_VOLUMES", f"{s3.url}/volumes")
    with pytest.raises(VolumeError, match="ignores If-None-Match"):
        volumes.create("models")
    assert [path for path in s3.root.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("url", ["gs://bucket/x", "/tmp/x", "s3://"])
def test_other_urls_are_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOW_VOLUMES", url)
    with pytest.raises(ConfigError, match="FLOW_VOLUMES"):
        volumes.list_volumes()


def test_volume_urls_read_and_write_the_copy(on: Host, tmp_path: Path) -> None:
    code = """
import fsspec
with fsspec.open("volume://notes/a", "w") as file:
    file.write("from one")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    free("notes")
    on("two")
    code = "import fsspec; print(fsspec.filesystem('volume').cat_file('notes/a').decode())"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "from one\n"
    assert volume_fetch.stored_bytes(volumes.get("notes"), volume_bucket.Bucket(os.environ["FLOW_VOLUMES"])) == 8
