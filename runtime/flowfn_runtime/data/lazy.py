"""`mode="lazy"`: a mount whose files are fetched, block by block, when they are read.

The filesystem is served by a process of its own (this module, run as a program). It lives as long as anybody has the
lease open, the writing end of a pipe: the sandbox inherits it, and when the last holder is gone, the server reads the
end of the pipe, unmounts and ends.
"""

from __future__ import annotations

import os
import pickle
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import IO, Any

from flowfn_runtime import paths
from flowfn_runtime.data import fuse
from flowfn_runtime.data.blocks import Blocks
from flowfn_runtime.data.cache import Cache
from flowfn_runtime.data.locks import NamedLocks, lease
from flowfn_runtime.data.model import Listing, Object
from flowfn_runtime.data.sources import Source, open_source
from flowfn_runtime.data.spec import redact
from flowfn_runtime.data.tree import plan
from flowfn_runtime.errors import DataError


@dataclass
class Served:
    """A lazy mount at `path`, there until `lease_fd` is closed here and in every process that inherited it."""

    path: str
    lease_fd: int = field(repr=False)

    def close(self) -> None:
        """Let go in this process. Safe to call twice."""
        fd, self.lease_fd = self.lease_fd, -1
        if fd >= 0:
            os.close(fd)


def serve(source: Source, *, mount_points: Sequence[str] = ()) -> Served:
    """Mount what `source` stands for now; nothing but its listing is fetched.

    `mount_points` are relative paths at which there must be directories. Raises `DataError`s, and `SandboxError` where
    the host has no FUSE.
    """
    import subprocess

    fuse.check()
    if source.recipe is None or not source.ranges:
        raise DataError(f"{redact(source.url)} can't be read lazily.", url=source.url, hint='Mount with mode="copy".')
    listing = source.listing()
    plan(listing)  # its errors are for the caller
    if any(object.size is None for object in listing.objects):
        raise DataError(
            f"{redact(source.url)} can't be read lazily: its server does not say how long it is.",
            url=redact(source.url),
            hint='Mount with mode="copy".',
        )
    runtime = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([runtime, os.environ.get("PYTHONPATH", "")])}
    watch, hold = os.pipe()
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(watch)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[watch],
            env=environment,
            start_new_session=True,
        )
        assert process.stdin and process.stdout
        with process.stdin, process.stdout:
            pickle.dump((source.recipe, _plain(listing), list(mount_points)), process.stdin, protocol=5)
            process.stdin.flush()
            process.wait()  # only the one that started the server; that is nobody's child, and ends with its lease
            try:
                path, failure = pickle.load(process.stdout)
            except EOFError:
                raise DataError(f"The server of {redact(source.url)} ended unexpectedly.") from None
        if failure is not None:
            raise failure
    except BaseException:
        os.close(hold)
        raise
    finally:
        os.close(watch)
    os.set_inheritable(hold, True)
    if listing.single:
        path = os.path.join(path, listing.objects[0].key[len(listing.base) :])
    return Served(path, hold)


def _plain(listing: Listing) -> tuple[Any, ...]:
    return listing.url, listing.base, listing.single, [tuple(object) for object in listing.objects]


class _Server:
    def __init__(self, source: Source, listing: Listing, mount_points: list[str]) -> None:
        from concurrent.futures import ThreadPoolExecutor

        self.cache = Cache()
        self.source = source
        self.locks_path = os.path.join(self.cache.root, "locks")
        self.objects: dict[int, Object] = {}
        self.root = self._tree(listing, mount_points)
        self.lock = threading.Lock()
        self.open: dict[int, tuple[Blocks, int]] = {}
        self.pool = ThreadPoolExecutor(8)
        folder = paths.private_dir(os.path.join(self.cache.root, "lazy"))
        _sweep(folder)
        self.folder = os.path.join(folder, os.urandom(8).hex())
        os.mkdir(self.folder, 0o700)
        self.lease = lease(os.path.join(self.folder, "lease"), create=True)
        self.path = os.path.join(self.folder, "tree")
        os.mkdir(self.path)
        self.mount = fuse.Mount(self.path, self.root, self.read, self.opened)

    def _tree(self, listing: Listing, mount_points: list[str]) -> fuse.Node:
        tree = plan(listing)
        root = fuse.Node(1, children={})
        number = 1
        folders = {"": root}

        def folder(path: str) -> fuse.Node:
            nonlocal number
            if path not in folders:
                parent, _, name = path.rpartition("/")
                number += 1
                made = folders[path] = fuse.Node(number, children={})
                children = folder(parent).children
                assert children is not None
                children[name.encode()] = made
            return folders[path]

        for path in [*tree.directories, *mount_points]:
            folder(path)
        for path, object in tree.files:
            parent, _, name = path.rpartition("/")
            number += 1
            node = fuse.Node(number, object.size or 0, object.modified or 0.0)
            children = folder(parent).children
            assert children is not None
            children[name.encode()] = node
            self.objects[number] = object
        return root

    def opened(self, node: fuse.Node, change: int) -> None:
        """A file was opened or closed; its blocks are open as long as the file is."""
        with self.lock:
            blocks, count = self.open.get(node.number, (None, 0))
            if blocks is None:
                # Locks of an open file of its own: they exclude other threads' as well as other processes'.
                blocks = Blocks(self.cache, self.source, self.objects[node.number], NamedLocks(self.locks_path))
            count += change
            if count > 0:
                self.open[node.number] = (blocks, count)
                return
            self.open.pop(node.number, None)
        blocks.close()

    def read(self, node: fuse.Node, offset: int, size: int) -> bytes:
        with self.lock:
            blocks, _ = self.open[node.number]
        return blocks.read(offset, size, self.pool.submit)

    def run(self, watch: int) -> None:
        threading.Thread(target=self._unmount_with_lease, args=(watch,), daemon=True).start()
        self.mount.serve()  # until it is unmounted
        _remove(self.folder)

    def _unmount_with_lease(self, watch: int) -> None:
        os.read(watch, 1)
        self.mount.unmount()


def _sweep(folder: str) -> None:
    """Take away what servers that were killed have left."""
    for entry in os.scandir(folder):
        fd = lease(os.path.join(entry.path, "lease"), exclusive=True)
        if fd is not None:
            fuse.unmount(os.path.join(entry.path, "tree"))
            _remove(entry.path)
            os.close(fd)


def _remove(folder: str) -> None:
    # Never a recursive removal: below could be a mount that did not go away.
    for name, remove in (("tree", os.rmdir), ("lease", os.unlink), ("", os.rmdir)):
        try:
            remove(os.path.join(folder, name))
        except OSError:
            pass


def _main(watch: int, stdin: IO[bytes], stdout: IO[bytes]) -> None:
    recipe, (url, base, single, objects), mount_points = pickle.load(stdin)
    if os.fork():
        os._exit(0)
    try:
        listing = Listing(url, base, single, tuple(Object(*object) for object in objects))
        server = _Server(open_source(*recipe), listing, mount_points)
    except BaseException as error:
        pickle.dump((None, error), stdout)
        stdout.flush()
        return
    pickle.dump((server.path, None), stdout)
    stdout.flush()
    # The pipe to the parent must not stay open: the parent may wait for its end.
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.close(null)
    server.run(watch)


if __name__ == "__main__":
    _main(int(sys.argv[1]), sys.stdin.buffer, sys.stdout.buffer)
    os._exit(0)
