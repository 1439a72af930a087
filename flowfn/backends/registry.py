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
            url = name if "://" in name else options.pop("url", None)
            try:
                _made[name] = _load(kind)(**({"url": url} if url else {}), **options)
            except TypeError as error:
                raise ConfigError(f"backend {name!r}: {error}") from error
        return _made[name]


def names() -> list[str]:
    """The names of all backends that are installed."""
    from importlib.metadata import entry_points

    return sorted({entry.name for entry in entry_points(group=GROUP)} | set(BUILT_IN))


def kind(name: str) -> type[Backend]:
    """The class of the backends of that name."""
    loaded: type[Backend] = _load(name)
    return loaded


def _load(kind: str) -> Any:
    target = BUILT_IN.get(kind)
    if target is None:
        from importlib.metadata import entry_points

        found = list(entry_points(group=GROUP, name=kind))
        if not found:
            raise _unknown(kind)
        target = found[0].value
    module, _, attribute = target.partition(":")
    from importlib import import_module

    try:
        return getattr(import_module(module), attribute)
    except ImportError as error:
        raise BackendUnavailable(
            f"backend {kind!r} can't be loaded: {error}", hint=f"pip install 'flowfn[{kind}]'"
        ) from error


def _unknown(name: str) -> ConfigError:
    from difflib import get_close_matches

    from flowfn import config

    known = sorted({*names(), *config.load().backends})
    near = get_close_matches(name, known, 1)
    meant = f"; did you mean {near[0]!r}?" if near else ""
    return ConfigError(f"there is no backend {name!r}{meant}", hint=f"installed or configured are: {', '.join(known)}")


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
