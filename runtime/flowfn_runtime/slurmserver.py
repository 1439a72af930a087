"""Tasks as Slurm jobs for a client outside of the cluster: what `taskserver` does on a login node with `of="slurm"`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import flowfn_runtime

from . import paths, slurmsays
from .slurmtasks import Tasks
from .taskstate import State

if TYPE_CHECKING:
    from .bootstrap import Client


def _tasks() -> Tasks:
    return Tasks(paths.home())


def _nodes(client: Client, body: Any, format: str) -> tuple[Any, bytes]:
    return slurmsays.run("sinfo", "-h", "-N", "-a", "-o", format), b""


def _held(client: Client, body: Any, wanted: dict[str, Any]) -> tuple[Any, bytes]:
    os.environ.update(wanted["environ"])  # it says where volumes are
    return _tasks().held(wanted), b""


def _start(client: Client, body: Any, plan: dict[str, Any], there: str, **how: Any) -> tuple[Any, bytes]:
    def bring(store: str) -> None:
        from .bootstrap import fetch

        for digest in filter(None, [plan["code"], *plan["roots"]]):
            if not os.path.exists(os.path.join(store, "trees", digest)):
                fetch(client, digest, store)

    payload = bytes(body) if plan["call"] else None
    _tasks().start(plan, payload, runtime=_runtime, bring=bring, there=lambda: there, **how)
    return None, b""


def _runtime() -> str:
    """This runtime, where the compute nodes see it, too."""
    here = os.path.dirname(os.path.dirname(os.path.abspath(flowfn_runtime.__file__)))

    def copy(new: str) -> None:
        shutil.copytree(here, new, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)

    return paths.placed(os.path.join(paths.home(), "runtime", os.path.basename(here)), copy)


def _states(client: Client, body: Any, ids: list[str]) -> tuple[Any, bytes]:
    found = _tasks().states(ids)
    return {
        task_id: list(one) if isinstance(one, State) else {"message": one.message, "hint": one.hint}
        for task_id, one in found.items()
    }, b""


def _wait(client: Client, body: Any, id: str, state: str, timeout: float) -> tuple[Any, bytes]:
    _tasks().wait(id, state, timeout)
    return None, b""


def _more(client: Client, body: Any, id: str, offsets: dict[str, int], timeout: float) -> tuple[Any, bytes]:
    added, ended = _tasks().more(id, offsets, timeout)
    return [{name: len(piece) for name, piece in added.items()}, ended], b"".join(added.values())


def _read(client: Client, body: Any, id: str, name: str, offset: int) -> tuple[Any, bytes]:
    return None, _tasks().read(id, name, offset)


def _end_of(client: Client, body: Any, id: str, name: str, lines: int) -> tuple[Any, bytes]:
    return _tasks().end_of(id, name, lines), b""


def _cancel(client: Client, body: Any, id: str, reason: str) -> tuple[Any, bytes]:
    _tasks().cancel(id, reason)
    return None, b""


def _forget(client: Client, body: Any, ids: list[str]) -> tuple[Any, bytes]:
    _tasks().forget(ids)
    return None, b""


def _address(client: Client, body: Any, id: str) -> tuple[Any, bytes]:
    return _tasks().address(id), b""


DO: dict[str, Callable[..., tuple[Any, bytes]]] = {
    "nodes": _nodes,
    "held": _held,
    "start": _start,
    "states": _states,
    "wait": _wait,
    "more": _more,
    "read": _read,
    "end_of": _end_of,
    "cancel": _cancel,
    "forget": _forget,
    "address": _address,
}
