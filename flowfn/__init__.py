"""flowfn: run a Python function on the machine that has the GPU and the data.

```python
import flowfn as flow

@flow.function(gpu="a100:4", mounts={"/train": "s3://datasets/train"})
def train(lr: float) -> float: ...

loss = train.remote(0.1)
```
"""

from __future__ import annotations

import sys
from types import ModuleType

TYPE_CHECKING = False  # importing `typing` would cost more than all of this module

if TYPE_CHECKING:
    from typing import Any

    from flowfn.backends.base import Backend as Backend
    from flowfn.client import Flow as Flow
    from flowfn.client import invoke as invoke
    from flowfn.client import invoke_async as invoke_async
    from flowfn.client import run as run
    from flowfn.executor import Executor as Executor
    from flowfn.function import function as function
    from flowfn.future import Future as Future
    from flowfn.handle import Function as Function
    from flowfn.image import Image as Image
    from flowfn.map import Map as Map
    from flowfn.pools import shutdown as shutdown
    from flowfn.references import Dir as Dir
    from flowfn.references import File as File
    from flowfn.references import Output as Output
    from flowfn.references import Partition as Partition
    from flowfn.references import StagedPath as StagedPath
    from flowfn.references import files as files
    from flowfn.references import partitions as partitions
    from flowfn.references import upload as upload
    from flowfn.retries import Retries as Retries
    from flowfn.shared import Shared as Shared
    from flowfn.shared import put as put
    from flowfn.slurm_options import Slurm as Slurm
    from flowfn.task import Task as Task
    from flowfn.taskconfig import TaskConfig as TaskConfig
    from flowfn.taskconfig import VolumeSpec as VolumeSpec
    from flowfn.volumes import Volume as Volume
    from flowfn.volumes import create_volume as create_volume
    from flowfn.volumes import delete_volume as delete_volume
    from flowfn.volumes import get_volume as get_volume
    from flowfn.volumes import list_volumes as list_volumes
    from flowfn_runtime.data.spec import Mount as Mount
    from flowfn_runtime.errors import BackendError as BackendError
    from flowfn_runtime.errors import BackendUnavailable as BackendUnavailable
    from flowfn_runtime.errors import CacheFull as CacheFull
    from flowfn_runtime.errors import CallCancelled as CallCancelled
    from flowfn_runtime.errors import CallError as CallError
    from flowfn_runtime.errors import ConfigError as ConfigError
    from flowfn_runtime.errors import DataAccessDenied as DataAccessDenied
    from flowfn_runtime.errors import DataChanged as DataChanged
    from flowfn_runtime.errors import DataError as DataError
    from flowfn_runtime.errors import DataNotFound as DataNotFound
    from flowfn_runtime.errors import DataUnavailable as DataUnavailable
    from flowfn_runtime.errors import FlowError as FlowError
    from flowfn_runtime.errors import FunctionTimeout as FunctionTimeout
    from flowfn_runtime.errors import NameConflict as NameConflict
    from flowfn_runtime.errors import OutOfMemory as OutOfMemory
    from flowfn_runtime.errors import ProtocolError as ProtocolError
    from flowfn_runtime.errors import RemoteError as RemoteError
    from flowfn_runtime.errors import ResourceUnavailable as ResourceUnavailable
    from flowfn_runtime.errors import SandboxError as SandboxError
    from flowfn_runtime.errors import SerializationError as SerializationError
    from flowfn_runtime.errors import TaskError as TaskError
    from flowfn_runtime.errors import TaskFailed as TaskFailed
    from flowfn_runtime.errors import TaskNotFound as TaskNotFound
    from flowfn_runtime.errors import ValidationError as ValidationError
    from flowfn_runtime.errors import VersionMismatch as VersionMismatch
    from flowfn_runtime.errors import VolumeConflict as VolumeConflict
    from flowfn_runtime.errors import VolumeError as VolumeError
    from flowfn_runtime.errors import VolumeInUse as VolumeInUse
    from flowfn_runtime.errors import VolumeNotFound as VolumeNotFound
    from flowfn_runtime.errors import WorkerLost as WorkerLost

__version__ = "0.1.0"

_WHERE = {
    "flowfn.backends.base": ["Backend"],
    "flowfn.client": ["Flow", "invoke", "invoke_async", "run"],
    "flowfn.executor": ["Executor"],
    "flowfn.function": ["function"],
    "flowfn.future": ["Future"],
    "flowfn.handle": ["Function"],
    "flowfn.image": ["Image"],
    "flowfn.map": ["Map"],
    "flowfn.pools": ["shutdown"],
    "flowfn.references": ["Dir", "File", "Output", "Partition", "StagedPath", "files", "partitions", "upload"],
    "flowfn.shared": ["Shared", "put"],
    "flowfn.slurm_options": ["Slurm"],
    "flowfn.retries": ["Retries"],
    "flowfn.task": ["Task"],
    "flowfn.taskconfig": ["TaskConfig", "VolumeSpec"],
    "flowfn.volumes": ["Volume", "create_volume", "delete_volume", "get_volume", "list_volumes"],
    "flowfn_runtime.data.spec": ["Mount"],
}
_MODULES = {name: module for module, names in _WHERE.items() for name in names}
_ERRORS = (
    "FlowError",
    "ConfigError",
    "ValidationError",
    "BackendError",
    "BackendUnavailable",
    "ResourceUnavailable",
    "VersionMismatch",
    "ProtocolError",
    "SandboxError",
    "CallError",
    "SerializationError",
    "WorkerLost",
    "OutOfMemory",
    "FunctionTimeout",
    "CallCancelled",
    "RemoteError",
    "DataError",
    "DataNotFound",
    "DataAccessDenied",
    "DataChanged",
    "DataUnavailable",
    "CacheFull",
    "VolumeError",
    "VolumeNotFound",
    "VolumeInUse",
    "VolumeConflict",
    "TaskError",
    "TaskNotFound",
    "TaskFailed",
    "NameConflict",
)
_MODULES.update(dict.fromkeys(_ERRORS, "flowfn_runtime.errors"))

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    module = _MODULES.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(module), name)
    return value


class _Package(ModuleType):
    """Keeps `flowfn.function` the decorator: importing the submodule of that name would put itself in its place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _MODULES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __reduce__(self) -> Any:
        # cloudpickle knows plain modules only; functions of scripts refer to this one.
        from importlib import import_module

        return import_module, (__name__,)


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
