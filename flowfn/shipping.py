"""What a worker on another machine is told and sent before it starts, and the answers to what it asks for meanwhile.

All of it goes over the worker's own stream, in SETUP frames: resources to enforce, environment and secrets, mounts, the
image, and the project's files as digests of which the other side asks for those that it lacks.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from flowfn_runtime import wire

if TYPE_CHECKING:
    from flowfn.spec import FunctionSpec
    from flowfn.userproject import Code
    from flowfn_runtime.project import Snapshot

CHUNK_BYTES = 1 << 20


class Launch:
    """How a worker is to be started on the other side."""

    __slots__ = ("roots", "setup")

    def __init__(self, setup: dict[str, Any], roots: tuple[Snapshot, ...] = ()) -> None:
        self.setup = setup  # JSON, see `flowfn_runtime.bootstrap`; holds secrets
        self.roots = roots

    def send(self, stream: wire.Stream) -> None:
        """Begin: say what is wanted."""
        stream.send(wire.SETUP, meta=json.dumps(self.setup).encode())

    def frame(self) -> bytes:
        """What `send` sends."""
        nowhere = wire.Stream(-1, -1)
        nowhere.send(wire.SETUP, meta=json.dumps(self.setup).encode(), later=True)
        return nowhere.held

    def newer(self) -> Launch | None:
        """The same with the project as it is now, if it has changed since."""
        if not self.roots:
            return None
        from flowfn import userproject

        now = _with_project(self.setup, userproject.code())
        return now if now.roots != self.roots else None

    def answer(self, stream: wire.Stream, asked: dict[str, Any]) -> None:
        """Send what the other side lacks of the project."""
        import zlib

        from flowfn_runtime import project

        root = next(root for root in self.roots if root.digest == asked["project"])
        if "missing" not in asked:
            stream.send(wire.SETUP, body=zlib.compress(root.manifest(), 1))  # it is said anew after each change
            return
        wanted = set(asked["missing"])
        skip = {entry.digest for entry in root.files if entry.digest not in wanted}
        out = _Chunks(stream)
        project.pack(root, out, skip=skip, manifest=False)
        out.end()


class _Chunks(io.BytesIO):
    """A file that is written to a stream, as SETUP frames; an empty one is its end."""

    def __init__(self, stream: wire.Stream) -> None:
        super().__init__()
        self._stream = stream
        self._kept = bytearray()

    def write(self, data: Any) -> int:
        self._kept += data
        if len(self._kept) >= CHUNK_BYTES:
            self._send()
        return len(data)

    def _send(self) -> None:
        self._stream.send(wire.SETUP, body=bytes(self._kept))
        self._kept.clear()

    def end(self) -> None:
        if self._kept:
            self._send()
        self._stream.send(wire.SETUP)


def launch(
    spec: FunctionSpec,
    *,
    enforce: Collection[str] = ("cpu", "memory", "gpu"),
    environ: dict[str, str] | None = None,
    project: bool = True,
    sandbox: bool = True,
    image: Any = None,
) -> Launch:
    """What a worker of this spec needs on another machine.

    `enforce`: the limits that the runtime there sees to; a backend whose engine does it leaves them out. `environ`:
    more variables, of the backend's, which count while data is staged, too. `project`: whether the user's files go
    along. `sandbox`: whether mounts get a filesystem made by the runtime; False: the program is started where its
    mounts are in place already, and `mounts` is not told. `image`: what to build a virtual environment of there
    (`flow.Image`).
    """
    from flowfn import config

    settings = config.load()
    request: dict[str, Any] = {}
    if spec.memory and "memory" in enforce:
        request["memory"] = spec.memory
    if spec.cpu and "cpu" in enforce:
        request["cpus"] = spec.cpu
    if spec.gpu and "gpu" in enforce:
        request["gpus"] = list(map(str, spec.gpu))
    env = {**(environ or {}), **spec.environment(os.environ)}
    setup: dict[str, Any] = {
        "request": request,
        "env": env,
        "environ": {**(environ or {}), **settings.data_environment(env)} if sandbox else {},
        "project_name": settings.project,
        "mounts": [settings.with_options(mount).to_dict() for mount in spec.mounts] if sandbox else [],
        "argv0": os.path.basename(sys.argv[0]) if sys.argv else "",
    }
    if image is not None:
        setup["image"] = image.to_dict()
    if not project:
        return Launch(setup)
    from flowfn import userproject

    return _with_project(setup, userproject.code(ahead=True))


def _with_project(setup: dict[str, Any], code: Code) -> Launch:
    digests = [root.digest for root in code.roots]
    return Launch({**setup, "roots": digests, "sys_path": code.sys_path, "cwd": code.cwd}, code.roots)
