"""What is configured, as far as the runtime asks: here by variables of the environment alone.

The client, which reads files too, puts answers of its own in place of these functions when it is imported. What it
starts elsewhere gets them as variables.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

UPLOAD_LOCAL = "FLOW_UPLOAD_LOCAL"  # set where the client does not see the files: those in results go to the store
DEFAULT_PROJECT = "default"


def _project() -> str:
    return os.environ.get("FLOW_PROJECT") or DEFAULT_PROJECT


def _volumes() -> str | None:
    return os.environ.get("FLOW_VOLUMES")


def _store() -> str | None:
    return os.environ.get("FLOW_STORE")


def _storage(url: str) -> Mapping[str, Any]:
    if not (text := os.environ.get("FLOW_STORAGE")):
        return {}
    import json

    return options_for(url, json.loads(text))


project: Callable[[], str] = _project  # whose volumes and tasks are meant where none is named
volumes: Callable[[], str | None] = _volumes  # URL prefix of the bucket that holds the volumes; None: they lie here
store: Callable[[], str | None] = _store  # URL for what is too big for the wire; None: it lies here
storage: Callable[[str], Mapping[str, Any]] = _storage  # storage options of a URL


def options_for(url: str, storage: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The storage options of `url` in a table by prefix: those of the longest one that matches at a path boundary."""
    best = ""
    for prefix in storage:
        bare = prefix.rstrip("/")
        whole = url in (prefix, bare) or url.startswith(bare + "/") or prefix.endswith("://")
        if whole and url.startswith(bare) and len(prefix) > len(best):
            best = prefix
    return dict(storage[best]) if best else {}
