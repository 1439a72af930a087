"""Volumes as the client sees them: the configured project's, made, found, listed and deleted.

```python
volume = flow.create_volume(size_gb=100, name="imagenet")
pandas.read_csv("volume://imagenet/labels.csv")
```
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flowfn_runtime.data import volumes as _volumes
from flowfn_runtime.data.volumes import DEFAULT_SIZE_GB, Interface, Volume

from . import config

if TYPE_CHECKING:
    from flowfn_runtime.data.volumefs import VolumeFileSystem as VolumeFileSystem

__all__ = [
    "Volume",
    "commit_volume",
    "create_volume",
    "delete_volume",
    "get_volume",
    "list_volumes",
    "volume_usage_bytes",
]


def create_volume(
    size_gb: int = DEFAULT_SIZE_GB,
    *,
    name: str | None = None,
    interface: Interface = "block",
    region: str | None = None,
    project: str | None = None,
) -> Volume:
    """Make a new, empty volume.

    `size_gb` is 1 to 16384, in GB of 10^9 bytes: shown, and reported when it is exceeded, not enforced. `name` has 3 to
    64 of a-z, 0-9 and `-`; without one the volume is found by its id only. `interface` is `"block"` (one task at a
    time) or `"file"` (shared). `region` and `project` default to the configured ones. Raises `ValidationError`, and
    `VolumeError` if the project has a volume of that name.
    """
    settings = config.load()
    return _volumes.create(
        name,
        size_gb=size_gb,
        interface=interface,
        region=region or settings.region,
        project=project or settings.project,
    )


def get_volume(id_or_name: str, *, project: str | None = None) -> Volume:
    """The project's volume of this id or name; `VolumeNotFound` if there is none."""
    return _volumes.get(id_or_name, project or _project())


def list_volumes(*, project: str | None = None) -> list[Volume]:
    """The project's volumes, oldest first."""
    return _volumes.list_volumes(project or _project())


def delete_volume(id_or_name: str | Volume, *, project: str | None = None) -> None:
    """Delete a volume and all that is in it. Raises `VolumeInUse` while a call or task uses it."""
    if isinstance(id_or_name, Volume):
        project = project or id_or_name.project
        id_or_name = id_or_name.id
    _volumes.delete(id_or_name, project or _project())


def volume_usage_bytes(id_or_name: str | Volume, *, project: str | None = None) -> int:
    """The disk space that a volume's files take, in bytes; logs a warning if that is more than its size."""
    if isinstance(id_or_name, str):
        id_or_name = get_volume(id_or_name, project=project)
    return _volumes.check_size(id_or_name)


def commit_volume(id_or_name: str, *, project: str | None = None) -> bool:
    """Write what this host changed in a volume back to the bucket that holds it (`FLOW_VOLUMES`); False if nothing.

    It is done anyhow when the last user on this host is gone. Raises `VolumeConflict` if another host was first.
    """
    return _volumes.commit(id_or_name, project or _project())


def _project() -> str:
    return config.load().project


def __getattr__(name: str) -> Any:
    if name == "VolumeFileSystem":  # fsspec's entry point; imports fsspec, which the rest here does without
        from flowfn_runtime.data.volumefs import VolumeFileSystem

        return VolumeFileSystem
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
