"""The name under which scripts written for the Flow SDK import flowfn: `from flow import Flow, TaskConfig, VolumeSpec`.

Everything here is flowfn's own, looked up when it is first asked for.
"""

from __future__ import annotations

import flowfn

TYPE_CHECKING = False  # as in flowfn: importing `typing` would cost more than all of this module

if TYPE_CHECKING:
    from typing import Any

    from flowfn import *  # noqa: F403

# Modules of the original that scripts import from, and where their names live here.
_MODULES = {"errors": "flowfn_runtime.errors"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        import importlib

        return importlib.import_module(_MODULES[name])
    try:
        return getattr(flowfn, name)
    except AttributeError:
        raise AttributeError(f"module 'flow' has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*dir(flowfn), *_MODULES})
