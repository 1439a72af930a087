"""What a volume is, and what one may be asked to be. Pure."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ..errors import ValidationError

Interface = Literal["block", "file"]

DEFAULT_SIZE_GB = 100
MAX_SIZE_GB = 16384
ID_PREFIX = "vol_"  # no name can begin so: names hold no underscore

_NAME = re.compile(r"[a-z0-9][a-z0-9-]*[a-z0-9]")


@dataclass(frozen=True)
class Volume:
    """Named, persistent, read-write storage of a project."""

    id: str  # "vol_" and 16 hex digits
    project: str
    name: str | None  # None: unnamed, found by its id only
    size_gb: int  # what was asked for; a breach is reported, not enforced
    interface: Interface  # "block": one task at a time; "file": shared
    region: str | None  # None: anywhere
    created_at: float  # seconds since the epoch
    path: str  # the directory of its data on this host

    @property
    def label(self) -> str:
        """Its name, or its id where it has none: for messages."""
        return self.name or self.id

    @property
    def url(self) -> str:
        """`volume://<name or id>`."""
        return f"volume://{self.label}"

    def to_dict(self) -> dict[str, Any]:
        """The fields, JSON-able."""
        return asdict(self)


def check_name(name: str) -> str:
    """Return `name` if a volume can be called so, else raise `ValidationError`."""
    if not 3 <= len(name) <= 64 or not _NAME.fullmatch(name):
        raise ValidationError(
            f"a volume can't be named {name!r}",
            hint="use 3 to 64 of a-z, 0-9 and '-', beginning and ending with a letter or digit",
        )
    return name


def is_id(id_or_name: str) -> bool:
    """True if this is a volume's id, False if it is a name."""
    return id_or_name.startswith(ID_PREFIX)


def check_properties(size_gb: int, interface: str, region: str | None, project: str) -> None:
    """Raise `ValidationError` for a volume that can't be."""
    if isinstance(size_gb, bool) or not isinstance(size_gb, int) or not 1 <= size_gb <= MAX_SIZE_GB:
        raise ValidationError(f"size_gb={size_gb!r}: a volume has 1 to {MAX_SIZE_GB} GB, as a whole number")
    if interface not in ("block", "file"):
        raise ValidationError(f"interface={interface!r}: it is 'block' (one task at a time) or 'file' (shared)")
    if region is not None and not region.strip():
        raise ValidationError("region='': name a region, or leave it out")
    if not project:
        raise ValidationError("project='': a volume belongs to a project", hint="leave it out for 'default'")
