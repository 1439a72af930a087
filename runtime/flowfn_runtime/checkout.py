"""The projects that were sent to this host: kept by content, laid out once, shared by all workers that run them."""

from __future__ import annotations

import os
from collections.abc import Callable

from . import kept, paths, project

KEEP_S = 7 * 86400.0  # a project that nobody used for so long may go


def store() -> str:
    """The directory of all of them."""
    return paths.private_dir(os.path.join(paths.cache(), "projects"))


def get(digest: str, fetch: Callable[[], None]) -> tuple[str, int]:
    """The directory where the snapshot of that digest is laid out, and a descriptor that keeps it there while open.

    `fetch` gets it into the store if it is not there.
    """
    root = store()
    laid_out = os.path.join(root, "checkouts")
    place = os.path.join(laid_out, digest)

    def make(place: str) -> None:
        if not os.path.exists(os.path.join(root, "trees", digest)):
            fetch()
        project.lay_out(digest, root, place)
        kept.drop_old(laid_out, KEEP_S)

    return place, kept.get(place, make)
