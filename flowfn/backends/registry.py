"""Finding backends: entry points of the group `flowfn.backends`, loaded only when asked for."""

from __future__ import annotations

import sys
import threading
import weakref
from typing import Any

from flowfn.backends.base import Backend
from flowfn_runtime.errors import BackendUnavailable, ConfigError

GROUP = "flowfn.backends"
BUILT_IN = {  # known without reading every package's metadata
    "container": "flowfn.backends.container:ContainerBackend",
    "local": "flowfn.backends.local:LocalBackend",
    "slurm": "flowfn.backends.slurm:SlurmBackend",
    "ssh": "flowfn.backends.ssh:SshBackend",
}

_made: dict[Any, Backend] = {}
_lock = threading.RLock()
_left: weakref.WeakSet[Backend] = weakref.WeakSet()  # those that were closed, which a thread may be using still


def get(choice: Any = None) -> Backend:
    """The backend of that name, URL (`ssh://host`), configured name or options; a Backend object is returned as it is.

    None asks the configuration (`FLOW_BACKEND` and so on). Raises ConfigError for a name that nobody offers.
    """
    if isinstance(choice, Backend):
        return choice
    if (make := getattr(choice, "make_backend", None)) is not None:  # options of a backend, such as flow.Slurm(...)
        with _lock:
            if choice not in _made:
                _made[choice] = make()
            return _made[choice]
    from flowfn import config

    settings = config.load()
    name = choice if choice is not None else settings.backend
    if not isinstance(name, str):
        raise ConfigError(
            f"backend={choice!r} is a {type(choice).__name__}", hint="pass a backend's name or a Backend object"
        )
    with _lock:
        if name not in _made:
            options = dict(settings.backends.get(name, {}))
            kind = options.pop("type", name.partition("://")[0])
            if "://" in name:
                options["url"] = name
            try:
                made = _load(kind)
            except _Unknown:
                raise _unknown(kind, name if name in settings.backends else None) from None
            if options and isinstance(made, type):  # an entry point may name any function that makes one
                from flowfn.backends.options import check

                check(made, options, name)
            try:
                _made[name] = made(**options)
            except TypeError as error:
                raise ConfigError(f"backend {name!r}: {error}") from error
        return _made[name]


def names() -> list[str]:
    """The names of all backends that are installed."""
    from importlib.metadata import entry_points

    return sorted({entry.name for entry in entry_points(group=GROUP)} | set(BUILT_IN))


def kind(name: str) -> type[Backend]:
    """The class of the backends of that name."""
    try:
        loaded: type[Backend] = _load(name)
    except _Unknown:
        raise _unknown(name) from None
    return loaded


def _load(kind: str) -> Any:
    target = BUILT_IN.get(kind)
    if target is None:
        from importlib.metadata import entry_points

        found = list(entry_points(group=GROUP, name=kind))
        if not found:
            raise _Unknown(kind)
        target = found[0].value
    module, _, attribute = target.partition(":")
    from importlib import import_module

    try:
        return getattr(import_module(module), attribute)
    except ImportError as error:
        raise BackendUnavailable(
            f"backend {kind!r} can't be loaded: {error}", hint=f"pip install 'flowfn[{kind}]'"
        ) from error


class _Unknown(Exception):
    """Nobody offers backends of that name."""


def _unknown(kind: str, name: str | None = None) -> ConfigError:
    """What to say of a kind that nobody offers; `name`: of the backend that is configured to be of it."""
    from flowfn import config
    from flowfn.backends.options import meant

    if name is not None:
        said = f"is of type {kind!r}, which there is not" if kind != name else "has no type"
        return ConfigError(
            f"backend {name!r} {said}{meant(kind, names())}", hint=f"the types are: {', '.join(names())}"
        )
    known = sorted({*names(), *config.load().backends})
    return ConfigError(
        f"there is no backend {kind!r}{meant(kind, known)}", hint=f"installed or configured are: {', '.join(known)}"
    )


def close_all() -> None:
    """Close every backend that was made."""
    with _lock:
        for name, backend in list(_made.items()):
            backend.close()  # if this is interrupted, it can be closed again
            _left.add(backend)
            _made.pop(name, None)
    if (places := sys.modules.get("flowfn.places")) is not None:
        places.close_all()


def close_again(backend: Backend) -> None:
    """After a worker was started on a backend: if all were closed meanwhile, this one kept something since."""
    if backend in _left:
        backend.close()


def forget() -> None:
    """In a forked child: the backends are the parent's."""
    global _lock
    _made.clear()
    _lock = threading.RLock()
