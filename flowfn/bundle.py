"""The runtime as something to send: a zip of the packages that every worker needs, named by its content.

A host, container image or cluster node needs nothing but Python of the same minor version; what runs there is this
client's own version of the runtime, so the two sides never differ.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import sys
from collections.abc import Iterator
from functools import lru_cache

from flowfn_runtime import paths

# The client is among them: modules of the user's project that travel by name say `import flowfn`.
PACKAGES = ["flowfn_runtime", "flowfn", "flow", "cloudpickle", "tblib"]
if sys.version_info < (3, 11):
    PACKAGES.append("tomli")


class Bundle:
    """The runtime: its name, and its files."""

    def __init__(self, files: list[tuple[str, bytes]]) -> None:
        digest = hashlib.sha256()
        for name, content in files:
            digest.update(f"{len(name)} {name} {len(content)} ".encode() + content)
        self.digest = digest.hexdigest()[:32]  # of all names and contents: where it is kept on the other side
        self._files = files
        self._zip = b""

    def pack(self) -> bytes:
        """The zip; made at the first use, since most hosts have it."""
        if not self._zip:
            import zipfile

            out = io.BytesIO()
            with zipfile.ZipFile(out, "w") as archive:
                for name, content in self._files:
                    archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
            self._zip = out.getvalue()
        return self._zip

    def place(self, directory: str) -> str:
        """See that the files are in a directory of their own below this one; its path."""
        import zipfile

        return paths.placed(
            os.path.join(directory, self.digest), lambda new: zipfile.ZipFile(io.BytesIO(self.pack())).extractall(new)
        )


@lru_cache(maxsize=1)
def bundle() -> Bundle:
    """The runtime of this process, read once: what is edited meanwhile counts for the next process."""
    return Bundle(sorted(_files()))


def _files() -> Iterator[tuple[str, bytes]]:
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        for root in (spec.submodule_search_locations or ()) if spec else ():
            for directory, below, names in os.walk(root):
                below[:] = [name for name in below if name != "__pycache__"]
                inside = os.path.relpath(directory, os.path.dirname(root))
                for name in names:
                    if name.endswith(".py"):
                        with open(os.path.join(directory, name), "rb") as file:
                            yield f"{inside}/{name}", file.read()
