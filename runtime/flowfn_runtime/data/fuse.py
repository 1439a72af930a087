"""The kernel's side of a read-only filesystem in user space: FUSE's protocol over /dev/fuse, without libfuse.

`Mount` makes the mount and answers the kernel's requests from a `Tree`: names and sizes that never change, and bytes
that are read when they are asked for. Root mounts by the system call, others by way of fusermount3.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import stat
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from flowfn_runtime.errors import SandboxError

_IN = struct.Struct("=IIQQIIIHH")
_OUT = struct.Struct("=IiQ")
_ATTR = struct.Struct("=QQQQQQIIIIIIIIII")
_ENTRY = struct.Struct("=QQQQII")
_ATTR_OUT = struct.Struct("=QII")
_INIT_OUT = struct.Struct("=IIIIHHIIHHI28x")
_OPEN_OUT = struct.Struct("=QII")
_READ = struct.Struct("=QQIIQII")
_STATFS = struct.Struct("=QQQQQIIII24x")
_DIRENT = struct.Struct("=QQII")

_LOOKUP, _FORGET, _GETATTR, _OPEN, _READ_OP, _STATFS_OP, _RELEASE = 1, 2, 3, 14, 15, 17, 18
_GETXATTR, _FLUSH, _INIT, _OPENDIR, _READDIR, _RELEASEDIR = 22, 25, 26, 27, 28, 29
_INTERRUPT, _DESTROY, _BATCH_FORGET = 36, 38, 42

_ASYNC_READ, _PARALLEL_DIROPS, _MAX_PAGES = 1 << 0, 1 << 18, 1 << 22
_KEEP_CACHE, _CACHE_DIR = 1 << 1, 1 << 3
_READ_BYTES = 1 << 20
_VALID_S = 1 << 30  # nothing of it ever changes
_THREADS = 16

_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MNT_DETACH = 1, 2, 4, 2


@dataclass
class Node:
    """A directory (with `children`) or a file (without) of a tree."""

    number: int
    size: int = 0
    modified: float = 0.0
    children: dict[bytes, Node] | None = None
    entries: list[bytes] = field(default_factory=list)  # a directory's listing as the kernel wants it, made when asked


# Reads `size` bytes at `offset` of a file; an OSError of its is the program's.
Read = Callable[[Node, int, int], bytes]


class Mount:
    """A mounted tree. `serve()` answers until it is unmounted."""

    def __init__(self, path: str, root: Node, read: Read, opened: Callable[[Node, int], None]) -> None:
        self.path = path
        self._read = read
        self._opened = opened  # told of each file that is opened (1) or closed (-1)
        self._nodes: dict[int, Node] = {}
        self._remember(root)
        self._fd = _mount(path)

    def _remember(self, node: Node) -> None:
        self._nodes[node.number] = node
        for child in (node.children or {}).values():
            self._remember(child)

    def serve(self) -> None:
        """Answer requests, in several threads, until the filesystem is unmounted."""
        threads = [threading.Thread(target=self._loop, daemon=True) for _ in range(_THREADS - 1)]
        # The first request must be answered before others are looked at.
        self._answer(os.read(self._fd, _READ_BYTES + 4096))
        for thread in threads:
            thread.start()
        self._loop()

    def unmount(self) -> None:
        """Take the mount away; programs that have files of it open keep nothing but errors."""
        unmount(self.path)

    def _loop(self) -> None:
        while True:
            try:
                request = os.read(self._fd, _READ_BYTES + 4096)
            except OSError as error:
                if error.errno in (errno.EINTR, errno.EAGAIN, errno.ENOENT):
                    continue  # ENOENT: the request was interrupted before we had it
                return  # ENODEV: unmounted
            self._answer(request)

    def _answer(self, request: bytes) -> None:
        _, opcode, unique, number, *_ = _IN.unpack_from(request)
        if opcode in (_FORGET, _BATCH_FORGET, _INTERRUPT):
            return
        body: bytes = b""
        code = 0
        try:
            body = self._do(opcode, number, memoryview(request)[_IN.size :])
        except OSError as error:
            code = -(error.errno or errno.EIO)
        except Exception:
            code = -errno.EIO
        try:
            os.writev(self._fd, [_OUT.pack(_OUT.size + len(body), code, unique), body])
        except OSError:
            pass  # nobody waits for it any more

    def _do(self, opcode: int, number: int, argument: memoryview) -> bytes:
        if opcode == _INIT:
            return self._init(argument)
        node = self._nodes.get(number)
        if node is None:
            raise OSError(errno.ENOENT, "")
        if opcode == _LOOKUP:
            child = (node.children or {}).get(bytes(argument[:-1]))
            if child is None:
                # Number 0 with a validity: the kernel remembers that there is nothing.
                return _ENTRY.pack(0, 0, _VALID_S, 0, 0, 0) + bytes(_ATTR.size)
            return _ENTRY.pack(child.number, 0, _VALID_S, _VALID_S, 0, 0) + _attributes(child)
        if opcode == _GETATTR:
            return _ATTR_OUT.pack(_VALID_S, 0, 0) + _attributes(node)
        if opcode == _OPEN:
            self._opened(node, 1)
            return _OPEN_OUT.pack(0, _KEEP_CACHE, 0)
        if opcode == _READ_OP:
            _, offset, size, *_ = _READ.unpack_from(argument)
            size = min(size, node.size - offset)
            return self._read(node, offset, size) if size > 0 else b""
        if opcode == _RELEASE:
            self._opened(node, -1)
            return b""
        if opcode == _OPENDIR:
            return _OPEN_OUT.pack(0, _KEEP_CACHE | _CACHE_DIR, 0)
        if opcode == _READDIR:
            _, offset, size, *_ = _READ.unpack_from(argument)
            return _some(_listing(node), offset, size)
        if opcode == _STATFS_OP:
            total = sum(one.size for one in self._nodes.values())
            return _STATFS.pack(-(-total // 4096), 0, 0, len(self._nodes), 0, 4096, 255, 4096, 0)
        if opcode in (_RELEASEDIR, _FLUSH, _DESTROY):
            return b""
        raise OSError(errno.ENOSYS, "")

    def _init(self, argument: memoryview) -> bytes:
        _, minor, ahead, flags = struct.unpack_from("=IIII", argument)
        wanted = (_ASYNC_READ | _PARALLEL_DIROPS | _MAX_PAGES) & flags
        return _INIT_OUT.pack(7, min(minor, 31), ahead, wanted, 64, 48, _READ_BYTES, 1, _READ_BYTES // 4096, 0, 0)


def _attributes(node: Node) -> bytes:
    mode = (stat.S_IFREG | 0o444) if node.children is None else (stat.S_IFDIR | 0o555)
    seconds = int(node.modified)
    part = int((node.modified - seconds) * 1e9)
    times = (seconds, seconds, seconds, part, part, part)
    links = 1 if node.children is None else 2
    size = node.size
    return _ATTR.pack(
        node.number, size, -(-size // 512), *times, mode, links, os.getuid(), os.getgid(), 0, _READ_BYTES, 0
    )


def _listing(node: Node) -> list[bytes]:
    if node.children is None:
        raise OSError(errno.ENOTDIR, "")
    if not node.entries:
        made = []
        for position, (name, child) in enumerate([(b".", node), (b"..", node), *node.children.items()], 1):
            kind = stat.S_IFREG >> 12 if child.children is None else stat.S_IFDIR >> 12
            entry = _DIRENT.pack(child.number, position, len(name), kind) + name
            made.append(entry + bytes(-len(entry) % 8))
        node.entries = made
    return node.entries


def _some(entries: list[bytes], first: int, size: int) -> bytes:
    taken: list[bytes] = []
    for entry in entries[first:]:
        size -= len(entry)
        if size < 0:
            break
        taken.append(entry)
    return b"".join(taken)


# -- mounting ----------------------------------------------------------------------------------------------------------


def check() -> None:
    """Raise `SandboxError`, with what to do, unless this host lets this user mount by FUSE."""
    import shutil

    if not os.path.exists("/dev/fuse"):
        raise SandboxError(
            'mode="lazy" needs FUSE, and this host has no /dev/fuse.',
            hint='Load it (modprobe fuse; for a container: --device /dev/fuse), or mount with mode="copy".',
        )
    if os.geteuid() != 0 and _helper(shutil.which) is None:
        raise SandboxError(
            'mode="lazy" needs FUSE, and only root can mount without fusermount3.',
            hint='apt-get install fuse3 (dnf install fuse3), or mount with mode="copy".',
        )
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        raise SandboxError(
            'mode="lazy" needs FUSE, and this host keeps /dev/fuse for others than this user.',
            hint='As most systems have it: chmod 666 /dev/fuse. Or mount with mode="copy".',
        )


def _helper(which: Callable[[str], str | None]) -> str | None:
    return which("fusermount3") or which("fusermount")


def _mount(path: str) -> int:
    """Mount at `path`; the descriptor to answer requests on."""
    check()
    if os.geteuid() != 0:
        return _mount_by_helper(path)
    try:
        fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise SandboxError(f"/dev/fuse can't be opened: {error.strerror}.", hint='Mount with mode="copy".') from None
    options = f"fd={fd},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()},allow_other,max_read={_READ_BYTES}"
    flags = _MS_RDONLY | _MS_NOSUID | _MS_NODEV
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"flowfn", path.encode(), b"fuse.flowfn", ctypes.c_ulong(flags), options.encode()):
        os.close(fd)
        raise SandboxError(
            f'mode="lazy" can\'t mount by FUSE here: {os.strerror(ctypes.get_errno())}.',
            hint='In a container it needs --cap-add SYS_ADMIN --device /dev/fuse; or mount with mode="copy".',
        )
    return fd


def _mount_by_helper(path: str) -> int:
    import array
    import shutil
    import subprocess

    helper = _helper(shutil.which)
    assert helper is not None
    ours, theirs = socket.socketpair()
    with ours, theirs:
        run = subprocess.run(
            [helper, "-o", "ro,nosuid,nodev,fsname=flowfn,subtype=flowfn", "--", path],
            env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno())},
            pass_fds=[theirs.fileno()],
            capture_output=True,
            text=True,
        )
        if run.returncode:
            raise SandboxError(
                f'mode="lazy" can\'t mount by FUSE here: {run.stderr.strip()}', hint='Mount with mode="copy".'
            )
        _, ancillary, _, _ = ours.recvmsg(1, socket.CMSG_SPACE(4))
    fds = array.array("i")
    fds.frombytes(ancillary[0][2][:4])
    os.set_inheritable(fds[0], False)
    return fds[0]


def unmount(path: str) -> None:
    """Take a mount away, also one whose server is gone. No error if there is none."""
    if os.geteuid() == 0:
        ctypes.CDLL(None, use_errno=True).umount2(path.encode(), _MNT_DETACH)
        return
    import shutil
    import subprocess

    if helper := _helper(shutil.which):
        subprocess.run([helper, "-u", "-z", "-q", "--", path], capture_output=True)
