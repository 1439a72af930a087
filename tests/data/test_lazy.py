from __future__ import annotations

import errno
import fcntl
import mmap
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from s3 import S3, Fault, Proxy, xml

from flowfn_runtime import sandbox
from flowfn_runtime.data import fuse
from flowfn_runtime.data.blocks import BLOCK_BYTES
from flowfn_runtime.data.cache import Cache
from flowfn_runtime.data.mounts import Staged, stage
from flowfn_runtime.data.spec import Mount
from flowfn_runtime.errors import DataNotFound, SandboxError

try:
    fuse.check()
except SandboxError as missing:
    pytestmark = pytest.mark.skip(reason=str(missing))


@pytest.fixture
def proxy(s3: S3) -> Iterator[Proxy]:
    with s3.proxy() as proxy:
        yield proxy


def lazily(s3: S3, proxy: Proxy, path: str) -> Staged:
    return stage([Mount(f"{s3.url}/{path}", "/data", mode="lazy")], env=s3.through(proxy).env)


def close_and_wait(staged: Staged) -> Path:
    """Close the last lease, and return when the server has ended: its lock on its folder's lease is free then."""
    folder = Path(staged.binds[0].host_path).parent
    lease = os.open(folder / "lease", os.O_RDWR)
    staged.close()
    fcntl.flock(lease, fcntl.LOCK_EX)
    os.close(lease)
    return folder


def test_nothing_is_fetched_until_it_is_read(s3: S3, proxy: Proxy) -> None:
    data = os.urandom(5 * BLOCK_BYTES + 123)
    s3.put("set/big", data)
    s3.put("set/sub/small", b"small")
    s3.put("set/empty")
    with lazily(s3, proxy, "set") as staged:
        root = Path(staged.binds[0].host_path)
        assert sorted(path.relative_to(root).as_posix() for path in root.rglob("*")) == [
            "big",
            "empty",
            "sub",
            "sub/small",
        ]
        assert (root / "big").stat().st_size == len(data)
        assert not proxy.gets
        assert (root / "sub/small").read_bytes() == b"small" and (root / "empty").read_bytes() == b""
        assert len(proxy.gets) == 1
        with open(root / "big", "rb", buffering=0) as file:
            file.seek(3 * BLOCK_BYTES + 7)
            assert file.read(10) == data[3 * BLOCK_BYTES + 7 :][:10]
        fetched = {request.headers["range"] for request in proxy.gets[1:]}
        assert f"bytes={3 * BLOCK_BYTES}-{4 * BLOCK_BYTES - 1}" in fetched
        assert (root / "big").read_bytes() == data
        with open(root / "big", "rb") as whole, mmap.mmap(whole.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            assert mapped[-100:] == data[-100:]
        requests = len(proxy.gets)
        with pytest.raises(OSError) as caught:
            (root / "new").write_bytes(b"")
        assert caught.value.errno == errno.EROFS
        with pytest.raises(FileNotFoundError):
            (root / "nothing").read_bytes()
    # Another mount of the same finds the blocks.
    with lazily(s3, proxy, "set") as staged:
        root = Path(staged.binds[0].host_path)
        assert (root / "big").read_bytes() == data and (root / "sub/small").read_bytes() == b"small"
        assert len(proxy.gets) == requests


def test_reading_in_sequence_takes_few_requests(s3: S3, proxy: Proxy) -> None:
    data = os.urandom(64 * BLOCK_BYTES)
    s3.put("big", data)
    with lazily(s3, proxy, "big") as staged:
        assert Path(staged.binds[0].host_path).read_bytes() == data
    assert len(proxy.gets) < 32
    assert len({request.headers["range"] for request in proxy.gets}) == len(proxy.gets)


def test_a_program_in_a_sandbox_keeps_the_mount_alive(s3: S3, proxy: Proxy) -> None:
    s3.put("set/a", b"abc")
    staged = lazily(s3, proxy, "set")
    root = Path(staged.binds[0].host_path)
    argv = sandbox.command([sys.executable, "-c", "input(); print(open('/data/a').read())"], staged.binds)
    program = subprocess.Popen(
        argv, pass_fds=staged.lease_fds, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    staged.close()
    assert root.exists() and program.communicate("\n")[0] == "abc\n"


def test_the_mount_goes_with_its_last_holder(s3: S3, proxy: Proxy) -> None:
    s3.put("set/a", b"abc")
    staged = lazily(s3, proxy, "set")
    folder = close_and_wait(staged)
    assert not folder.exists()
    with open("/proc/self/mounts") as mounts:
        assert str(folder) not in mounts.read()


def test_faults_pass_or_are_errors_of_the_read(s3: S3, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOW_DATA_PATIENCE", "1")
    data = os.urandom(3 * BLOCK_BYTES)
    s3.put("set/a", data)
    s3.put("set/b", data)
    failed: set[str] = set()

    def rule(request: object) -> Fault | None:
        span = request.headers.get("range", "")  # type: ignore[attr-defined]
        if request.is_get and span not in failed:  # type: ignore[attr-defined]
            failed.add(span)
            return Fault(keep=1000)
        return None

    proxy.rule = rule
    with lazily(s3, proxy, "set") as staged:
        root = Path(staged.binds[0].host_path)
        assert (root / "a").read_bytes() == data and failed
        proxy.rule = lambda request: Fault(status=403, body=xml("AccessDenied"))
        with pytest.raises(OSError) as caught:
            (root / "b").read_bytes()
        assert caught.value.errno in (errno.EIO, errno.EACCES)
        proxy.rule = lambda request: None
        assert (root / "b").read_bytes() == data
    with pytest.raises(DataNotFound):
        lazily(s3, proxy, "nothing")


def test_blocks_count_and_go_when_room_is_needed(s3: S3, proxy: Proxy) -> None:
    s3.put("set/a", os.urandom(2 * BLOCK_BYTES))
    room = Cache().room
    staged = lazily(s3, proxy, "set")
    with open(Path(staged.binds[0].host_path, "a"), "rb") as file:
        file.read()
        assert room.used_bytes() >= 2 * BLOCK_BYTES
        room.prune(0)
        assert room.used_bytes() >= 2 * BLOCK_BYTES  # it is open
    close_and_wait(staged)
    room.prune(0)
    assert room.used_bytes() == 0


AS_USER = """
import array, concurrent.futures.thread, os, subprocess, sys, threading
from flowfn_runtime import sandbox
from flowfn_runtime.data import lazy
from flowfn_runtime.data.cache import Cache
from flowfn_runtime.data.sources import open_source
base, url = sys.argv[1:]
# /dev/fuse as most hosts have it, in a mount namespace of this process's own.
subprocess.run(["mount", "-t", "tmpfs", "tmpfs", base], check=True)
os.mknod(base + "/fuse", 0o20666, os.makedev(10, 229)); os.chmod(base + "/fuse", 0o666)
subprocess.run(["mount", "--bind", base + "/fuse", "/dev/fuse"], check=True)
source = open_source(url)
os.environ["FLOW_CACHE"] = base + "/loaded"; Cache().stage(source)  # the interpreter may be root's alone: all is loaded
os.mkdir(base + "/own"); os.chown(base + "/own", 1, 1)
os.environ.update(FLOW_CACHE=base + "/own/cache", FLOW_HOME=base + "/own/home", HOME=base + "/own")
os.setgroups([]); os.setgid(1); os.setuid(1)  # daemon: fusermount wants to know the name
watch, hold = os.pipe()
server = lazy._Server(source, source.listing(), [])
thread = threading.Thread(target=server.run, args=(watch,)); thread.start()
print(open(server.path + "/a").read())
inside = sandbox.command(["sh", "-c", "cat /data/a; echo no >/data/a"], [sandbox.Bind(server.path, "/data", True)])
run = subprocess.run(inside, capture_output=True, text=True)
print(run.stdout, run.stderr)
mounts = open("/proc/self/mounts").read()
os.close(hold); thread.join()
print(server.path in mounts, server.path in open("/proc/self/mounts").read(), os.path.exists(server.folder))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user; the other tests ran as a normal one")
@pytest.mark.skipif(not (shutil.which("fusermount3") or shutil.which("fusermount")), reason="there is no fusermount3")
def test_a_normal_user_mounts_by_fusermount(s3: S3) -> None:
    s3.put("set/a", b"abc")
    base = Path("/tmp") / f"flowfn-user-{os.getpid()}"  # pytest's own directory is root's alone
    base.mkdir()
    try:
        done = subprocess.run(
            ["unshare", "--mount", sys.executable, "-c", AS_USER, str(base), f"{s3.url}/set"],
            env={**os.environ, **s3.env},
            cwd="/",
            capture_output=True,
            text=True,
            timeout=60,
        )
    finally:
        base.rmdir()
    assert done.returncode == 0, done.stderr
    assert "abc\nabc" in done.stdout and "Read-only file system" in done.stdout
    assert done.stdout.split()[-3:] == ["True", "False", "False"]


REFUSED = """
import os, shutil, subprocess, sys
from flowfn_runtime.data import fuse
base = sys.argv[1]
subprocess.run(["mount", "-t", "tmpfs", "tmpfs", base], check=True)
os.mknod(base + "/fuse", 0o20600, os.makedev(10, 229))
subprocess.run(["mount", "--bind", base + "/fuse", "/dev/fuse"], check=True)
os.setuid(1)
fuse.check()
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.skipif(not (shutil.which("fusermount3") or shutil.which("fusermount")), reason="there is no fusermount3")
def test_a_device_for_root_alone_is_said_before_anything_is_mounted(tmp_path: Path) -> None:
    run = ["unshare", "--mount", sys.executable, "-c", REFUSED, str(tmp_path)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=60)
    assert done.returncode and "SandboxError" in done.stderr and "chmod 666 /dev/fuse" in done.stderr


def test_without_fuse_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SandboxError, match="fusermount3") as caught:
        fuse.check()
    assert "apt-get install fuse3" in str(caught.value)
