from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.tests import abstract

from flowfn import volumes as client
from flowfn_runtime.data import volumes
from flowfn_runtime.data.volumefs import VolumeFileSystem
from flowfn_runtime.errors import DataAccessDenied, DataNotFound


class VolumeFixtures(abstract.AbstractFixtures):  # type: ignore[misc]
    @pytest.fixture
    def fs(self) -> Any:
        return fsspec.filesystem("volume")

    @pytest.fixture
    def fs_path(self) -> str:
        return client.create_volume(name="models").name or ""

    @pytest.fixture
    def fs_join(self) -> Any:
        return lambda *parts: "/".join(parts)


# fsspec's own contract for filesystems.
class TestCopy(abstract.AbstractCopyTests, VolumeFixtures):  # type: ignore[misc]
    pass


class TestGet(abstract.AbstractGetTests, VolumeFixtures):  # type: ignore[misc]
    pass


class TestPut(abstract.AbstractPutTests, VolumeFixtures):  # type: ignore[misc]
    pass


class TestOpen(abstract.AbstractOpenTests, VolumeFixtures):  # type: ignore[misc]
    pass


class TestPipe(abstract.AbstractPipeTests, VolumeFixtures):  # type: ignore[misc]
    pass


@pytest.fixture
def fs() -> VolumeFileSystem:
    made = fsspec.filesystem("volume")
    assert isinstance(made, VolumeFileSystem)
    return made


def test_fsspec_knows_the_url_without_flowfn_being_imported(flow_home: Path) -> None:
    code = """
import fsspec
with fsspec.open("volume://notes/a/b.txt", "w") as file:
    file.write("text")
with fsspec.open("volume://notes/a/b.txt") as file:
    assert file.read() == b"text"
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert Path(volumes.get("notes").path, "a", "b.txt").read_text() == "text"


def test_writing_makes_the_volume_and_reading_does_not(fs: VolumeFileSystem) -> None:
    with pytest.raises(DataNotFound, match="no volume 'results'"):
        fs.open("volume://results/x")
    assert not fs.exists("volume://results")
    assert volumes.list_volumes() == []
    fs.pipe_file("volume://results/x", b"1")
    assert fs.cat_file("volume://results/x") == b"1"
    assert fs.ls("", detail=False) == ["results"]
    assert fs.cat_file(f"volume://{volumes.get('results').id}/x") == b"1"


def test_the_project_is_the_configured_one(fs: VolumeFileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    fs.pipe_file("volume://results/x", b"1")
    monkeypatch.setenv("FLOW_PROJECT", "other")
    assert not fs.exists("volume://results/x")
    fs.pipe_file("volume://results/x", b"2")
    assert [volume.name for volume in client.list_volumes()] == ["results"]
    assert fsspec.filesystem("volume", project="default").cat_file("results/x") == b"1"
    assert len(volumes.list_volumes(None)) == 2


def test_in_a_task_the_mounts_are_meant(
    fs: VolumeFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flow_home: Path
) -> None:
    whole, part = tmp_path / "whole", tmp_path / "part"
    mounts = {"volume://models": str(whole), "volume://models/deep": str(part), "s3://bucket": "/data"}
    monkeypatch.setenv("FLOW_MOUNTS", json.dumps(mounts))
    fs.pipe({"volume://models/a": b"a", "volume://models/deep/b": b"b", "volume://models/deeper": b"c"})
    assert (whole / "a").read_bytes() == b"a"
    assert (whole / "deeper").read_bytes() == b"c"
    assert (part / "b").read_bytes() == b"b"
    assert fs.ls("", detail=False) == ["models"]
    with pytest.raises(DataNotFound, match=r"not mounted here\n.*mounts="):
        fs.pipe_file("volume://elsewhere/x", b"lost")
    assert not flow_home.exists()


def test_nothing_leads_out_of_a_volume(fs: VolumeFileSystem, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("s")
    fs.pipe_file("volume://models/a", b"a")
    root = Path(volumes.get("models").path)
    (root / "out").symlink_to(tmp_path)
    (root / "file").symlink_to(secret)
    (root / "in").symlink_to("a")
    for path in ("out/secret", "file", "../registry.db", "x/../../lock", "out/new"):
        for use in (fs.cat_file, fs.info, lambda p: fs.pipe_file(p, b"x"), fs.rm_file, fs.touch):
            if path == "file" and use == fs.rm_file:
                continue
            with pytest.raises(DataAccessDenied):
                use(f"volume://models/{path}")
    assert secret.read_text() == "s" and not (tmp_path / "new").exists()
    assert fs.cat_file("volume://models/in") == b"a"
    fs.rm_file("volume://models/file")  # the link, not what it names
    fs.rm("volume://models/out", recursive=True)
    assert secret.read_text() == "s"


def test_a_whole_volume_is_not_removed_by_accident(fs: VolumeFileSystem) -> None:
    fs.pipe_file("volume://models/a", b"a")
    for use in (fs.rm_file, fs.rmdir, lambda path: fs.rm(path, recursive=True), lambda path: fs.mv(path, "other/x")):
        with pytest.raises(DataAccessDenied):
            use("volume://models")
    assert fs.cat_file("models/a") == b"a"


def test_errors_name_the_url_and_keep_their_type(fs: VolumeFileSystem, flow_home: Path) -> None:
    client.create_volume(name="models")
    with pytest.raises(FileNotFoundError) as missing:
        fs.open("volume://models/none")
    assert "volume://models/none" in str(missing.value) and str(flow_home) not in str(missing.value)
    fs.makedirs("models/dir")
    with pytest.raises(IsADirectoryError):
        fs.open("models/dir", "wb")


def test_times_moves_and_globs(fs: VolumeFileSystem) -> None:
    before = datetime.now(timezone.utc).timestamp() - 1
    fs.pipe({"models/a/1.txt": b"1", "models/a/2.txt": b"22", "models/b/3.bin": b"3"})
    assert fs.modified("models/a/1.txt").timestamp() >= before
    assert sorted(fs.glob("volume://models/**/*.txt")) == ["models/a/1.txt", "models/a/2.txt"]
    assert fs.du("models") == 4
    fs.mv("models/a", "models/moved")
    assert fs.find("models") == ["models/b/3.bin", "models/moved/1.txt", "models/moved/2.txt"]
    fs.rm("models/moved/*.txt")
    assert fs.find("models") == ["models/b/3.bin"]
    fs.chmod("models/b/3.bin", 0o640)
    assert fs.info("models/b/3.bin")["mode"] & 0o777 == 0o640


def test_the_client_face(caplog: pytest.LogCaptureFixture) -> None:
    volume = client.create_volume(size_gb=2, name="models", region="eu")
    assert client.get_volume("models") == volume == client.list_volumes()[0]
    assert client.volume_usage_bytes("models") == 0
    client.delete_volume(volume)
    assert client.list_volumes() == []


def test_the_client_face_does_not_import_fsspec() -> None:
    code = "import sys, flowfn.volumes; sys.exit('fsspec' in sys.modules or 'sqlite3' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=os.getcwd()).returncode == 0
