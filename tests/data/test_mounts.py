from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from s3 import S3

from flowfn_runtime import sandbox
from flowfn_runtime.data.mounts import stage
from flowfn_runtime.data.spec import Mount, parse_mounts
from flowfn_runtime.errors import DataNotFound, ValidationError


def test_a_bucket_is_staged_once_and_then_costs_one_listing(s3: S3) -> None:
    for index in range(50):
        s3.put(f"set/{index:03}.txt", f"content {index}".encode())
    mounts = parse_mounts({"/data": f"{s3.url}/set"})
    with s3.proxy() as proxy:
        env = s3.through(proxy).env
        with stage(mounts, env=env) as first:
            (bind,) = first.binds
            assert bind.target == "/data" and bind.read_only
            assert first.fetched_bytes == sum(path.stat().st_size for path in (s3.root / "set").iterdir())
            assert {path.name: path.read_bytes() for path in Path(bind.host_path).iterdir()} == {
                path.name: path.read_bytes() for path in (s3.root / "set").iterdir()
            }
        assert len(proxy.gets) == 50
        requests = len(proxy.requests)
        with stage(mounts, env=env) as second:
            assert second.binds == first.binds and second.fetched_bytes == 0
        assert len(proxy.gets) == 50 and len(proxy.requests) == requests + 1


def test_a_single_object_that_is_there_costs_one_request(s3: S3) -> None:
    mounts = parse_mounts(s3.put("models/net.pt", b"weights"))
    with s3.proxy() as proxy:
        env = s3.through(proxy).env
        stage(mounts, env=env).close()
        requests = len(proxy.requests)
        with stage(mounts, env=env) as staged:
            assert staged.fetched_bytes == 0
        assert len(proxy.requests) == requests + 1 and len(proxy.gets) == 1


def test_only_what_changed_moves(s3: S3) -> None:
    for index in range(10):
        s3.put(f"set/{index}", b"old")
    with s3.proxy() as proxy:
        env = s3.through(proxy).env
        mounts = parse_mounts(f"{s3.url}/set")
        before = stage(mounts, env=env)
        s3.put("set/3", b"newer")
        s3.put("set/new", b"x")
        (s3.root / "set/4").unlink()
        count = len(proxy.gets)
        after = stage(mounts, env=env)
        assert sorted(request.target for request in proxy.gets[count:]) == [
            f"/{s3.bucket}/set/3",
            f"/{s3.bucket}/set/new",
        ]
        old, new = (Path(staged.binds[0].host_path) for staged in (before, after))
        # The running task keeps what it started with.
        assert (old / "3").read_bytes() == b"old" and (old / "4").exists() and not (old / "new").exists()
        assert (new / "3").read_bytes() == b"newer" and not (new / "4").exists()
        before.close()
        after.close()


def test_programs_see_the_files_and_can_not_change_them(s3: S3, tmp_path: Path) -> None:
    s3.put("set/a/b.txt", b"hello")
    script = (
        "import errno, sys\n"
        "print(open('/data/a/b.txt').read())\n"
        "for path, mode in (('/data/a/b.txt', 'r+'), ('/data/a/b.txt', 'w'), ('/data/new', 'w')):\n"
        "    try: open(path, mode)\n"
        "    except OSError as error: print(errno.errorcode[error.errno])\n"
        "open('/out/result', 'w').write('done')\n"
    )
    (tmp_path / "out").mkdir()
    mounts = (*parse_mounts(f"{s3.url}/set"), Mount(str(tmp_path / "out"), "/out", read_only=False))
    with stage(mounts, env=s3.env) as staged:
        argv = sandbox.command([sys.executable, "-c", script], staged.binds)
        output = subprocess.run(argv, check=True, capture_output=True, text=True, pass_fds=staged.lease_fds).stdout
    assert output.split() == ["hello", "EROFS", "EROFS", "EROFS"]
    assert (tmp_path / "out/result").read_text() == "done"
    assert not Path("/data").exists()


def test_mounts_can_be_nested(s3: S3) -> None:
    s3.put("outer/x", b"outer")
    s3.put("inner/y", b"inner")
    s3.put("outer/deep/z", b"hidden")
    mounts = parse_mounts({"/data": f"{s3.url}/outer", "/data/in/ner": f"{s3.url}/inner", "/data/vol": "volume://vol"})
    with stage(mounts, env=s3.env) as staged:
        argv = sandbox.command(["find", "/data", "-type", "f"], staged.binds)
        output = subprocess.run(argv, check=True, capture_output=True, text=True, pass_fds=staged.lease_fds).stdout
    assert sorted(output.split()) == ["/data/deep/z", "/data/in/ner/y", "/data/x"]


def test_local_directories_are_bound_in_place(tmp_path: Path) -> None:
    (tmp_path / "a b").mkdir()
    for source in (str(tmp_path / "a b"), (tmp_path / "a b").as_uri()):
        with stage(parse_mounts({"/data": source})) as staged:
            assert staged.binds == (sandbox.Bind(str(tmp_path / "a b"), "/data", True),)
    with pytest.raises(DataNotFound, match="nowhere"):
        stage(parse_mounts({"/data": str(tmp_path / "nowhere")}))


@pytest.mark.parametrize(
    ("target", "expected"),
    [("/data", "/data/net.pt"), ("/models/net.pt", "/models/net.pt"), ("/models/m.pt", "/models/m.pt")],
)
def test_a_single_object_is_a_file(s3: S3, target: str, expected: str) -> None:
    url = s3.put("models/net.pt", b"weights")
    with stage(parse_mounts({target: url}), env=s3.env) as staged:
        (bind,) = staged.binds
        host = bind.host_path if bind.target == expected else os.path.join(bind.host_path, os.path.basename(expected))
        assert Path(host).read_bytes() == b"weights"
        assert bind.target in (expected, os.path.dirname(expected))


def test_a_link_on_the_host_does_not_lead_a_mount_into_the_system(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/usr")
    for target in (tmp_path / "link", tmp_path / "link/share", Path(sys.prefix).parent):
        with pytest.raises(ValidationError, match="restricted"):
            stage(parse_mounts({str(target): str(tmp_path)}))
