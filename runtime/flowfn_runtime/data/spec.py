"""What is mounted where: `Mount`, and every way to write one. Pure: no file, network or host is looked at.

A mount's target is an absolute path of the worker's or task's own filesystem. Targets that would hide the system or
the runtime are refused here by name, however they are spelled; what only the host can know (its symbolic links, where
its Python lives) is checked by `conceals` when the mount is staged.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flowfn_runtime.errors import ValidationError

MODES = ("copy", "lazy")

# Nothing may be mounted on these, below them, or on a directory that holds one of them.
SYSTEM = (
    "/bin",
    "/boot",
    "/dev",
    "/etc",
    "/lib",
    "/lib32",
    "/lib64",
    "/libexec",
    "/libx32",
    "/nix",
    "/proc",
    "/run",
    "/sbin",
    "/sys",
    "/usr",
    "/var/run",
    "/var/lock",
)
DOCKER = "/var/lib/docker"

ACCEPTED_TARGETS = "an absolute path such as /data, /mnt/train, /volumes/models or /home/me/data"
ACCEPTED_SOURCES = (
    "a URL (s3://bucket/prefix, gs://, az://, https://, hf://, file://), a path, volume://name, a flow.Mount, "
    "or a volume as a mapping with a name or volume_id"
)

_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.\-]*(?:::[A-Za-z0-9+.\-]+)*)://")
_ALMOST_URL = re.compile(r"^(s3a?|gs|gcs|az|abfss?|https?|hf|volume|file):/?(?!/)", re.IGNORECASE)
# Options that carry no secret: only their values are ever shown or stored.
_PUBLIC_OPTIONS = frozenset(
    [
        *("anon", "anonymous", "skip_signature", "profile", "requester_pays", "region", "region_name", "use_ssl"),
        *("endpoint", "endpoint_url", "account_name", "project", "revision", "block_size", "default_block_size"),
        *("name", "interface", "size_gb"),
    ]
)


@dataclass(frozen=True)
class Mount:
    """A data source at a path of the worker's or task's filesystem.

    `source` is any fsspec URL, a plain path, or `volume://name`; `target` an absolute path. `read_only` defaults to
    True, for volumes to False; only volumes and local paths can be writable. `mode="copy"` stages the data into the
    host's cache before the start, `mode="lazy"` fetches blocks when they are read. `storage_options` go to the source's
    filesystem as fsspec names them (`key`, `secret`, `endpoint_url`, `anon`, ...); for a volume they say how it is
    created if it is missing (`size_gb`, `interface`, `region`). Raises `ValidationError` for anything else.
    """

    source: str
    target: str
    read_only: bool | None = field(default=None, kw_only=True)
    mode: str = field(default="copy", kw_only=True)
    # Not part of the hash (a dict has none), and shown without secrets.
    storage_options: Mapping[str, Any] | None = field(default=None, kw_only=True, hash=False)

    def __post_init__(self) -> None:
        # Whether a volume may lie on Docker's directory is for parse_mounts, which knows the flag.
        target = normalise_target(self.target, allow_docker_cache=str(self.source).startswith("volume://"))
        source = normalise_source(self.source, target)
        if self.mode not in MODES:
            raise ValidationError(
                f"The mount at {target} has mode={self.mode!r}.", hint='mode is "copy" (staged) or "lazy" (on demand).'
            )
        if self.storage_options is not None and not isinstance(self.storage_options, Mapping):
            raise ValidationError(f"storage_options of the mount at {target} must be a mapping of option to value.")
        scheme = scheme_of(source)
        writable_kind = scheme in ("volume", "file")
        read_only = self.read_only
        if read_only is None:
            read_only = scheme != "volume"
        elif read_only not in (True, False):
            raise ValidationError(f"read_only of the mount at {target} must be True or False, not {read_only!r}.")
        elif not read_only and not writable_kind:
            raise ValidationError(
                f"The mount at {target} can't be writable: {redact(source)} is not a volume or a local path.",
                hint="Write results with flow.Output(url), or mount a volume://name.",
            )
        if self.mode == "lazy" and writable_kind:
            raise ValidationError(
                f"The mount at {target} can't be lazy: {redact(source)} is on this host already.",
                hint='mode="lazy" is for buckets and other remote sources.',
            )
        set_ = object.__setattr__
        set_(self, "target", target)
        set_(self, "source", source)
        set_(self, "read_only", bool(read_only))
        set_(self, "storage_options", dict(self.storage_options) if self.storage_options else None)

    @property
    def scheme(self) -> str:
        """The source's URL scheme; `file` for a plain path."""
        return scheme_of(self.source)

    def __repr__(self) -> str:
        shown = f"Mount({redact(self.source)!r}, {self.target!r}, read_only={self.read_only}, mode={self.mode!r}"
        if self.storage_options:
            shown += f", storage_options={public_options(self.storage_options)!r}"
        return shown + ")"

    def to_dict(self, *, secrets: bool = True) -> dict[str, Any]:
        """As plain values for JSON. With `secrets=False` fit to be stored or shown: secret options are left out."""
        options: Mapping[str, Any] | None = self.storage_options
        if options and not secrets:
            options = {name: value for name, value in options.items() if name in _PUBLIC_OPTIONS}
        return {
            "source": self.source if secrets else redact(self.source),
            "target": self.target,
            "read_only": self.read_only,
            "mode": self.mode,
            "storage_options": dict(options) if options else None,
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Mount:
        """The inverse of `to_dict`."""
        unknown = set(value) - {"source", "target", "read_only", "mode", "storage_options"}
        if unknown or "source" not in value or "target" not in value:
            raise ValidationError(
                f"A mount has the fields source, target, read_only, mode and storage_options, not {sorted(value)}."
            )
        return cls(
            value["source"],
            value["target"],
            read_only=value.get("read_only"),
            mode=value.get("mode", "copy"),
            storage_options=value.get("storage_options"),
        )


def parse_mounts(value: object, *, allow_docker_cache: bool = False) -> tuple[Mount, ...]:
    """The mounts that `value` names, in its order; `()` for None.

    `value` is a source (`"s3://bucket/prefix"` is mounted at /data, one volume at /volumes, anything else at
    /mnt/<last name>), a `Mount`, a mapping `{target: source | Mount | volume mapping}`, or a list of sources,
    `"target=source"` strings and `Mount`s. `allow_docker_cache` lets a volume lie on /var/lib/docker. Raises
    `ValidationError`, which names the target and says what is accepted.
    """
    mounts: list[Mount] = []
    if value is None:
        return ()
    if isinstance(value, Mapping) and not _is_volume_mapping(value):
        mounts.extend(_mount(source, target, allow_docker_cache) for target, source in value.items())
    elif isinstance(value, (list, tuple, set, frozenset)):
        mounts.extend(_listed(item, allow_docker_cache) for item in value)
    else:
        mounts.append(_listed(value, allow_docker_cache))
    seen: dict[str, Mount] = {}
    for mount in mounts:
        if other := seen.get(mount.target):
            raise ValidationError(
                f"Two mounts have the target {mount.target}: {redact(other.source)} and {redact(mount.source)}.",
                hint='Give each its own target: {"/train": "s3://...", "/val": "s3://..."} or "target=source".',
            )
        seen[mount.target] = mount
    return tuple(mounts)


def normalise_target(target: object, *, allow_docker_cache: bool = False) -> str:
    """`target` in its one spelling: absolute, no `..`, no `//`, no slash at the end. Raises `ValidationError`."""
    if isinstance(target, os.PathLike):
        target = os.fspath(target)
    if not isinstance(target, str) or not target.startswith("/") or "\0" in target:
        raise ValidationError(f"The mount target {target!r} is not {ACCEPTED_TARGETS}.")
    # normpath keeps two leading slashes, which POSIX leaves to the system; Linux ignores them.
    normal = "/" + posixpath.normpath(target).lstrip("/")
    protected = SYSTEM if normal == DOCKER and allow_docker_cache else (*SYSTEM, DOCKER)
    for system in protected:
        if within(normal, system) or within(system, normal):
            spelled = "" if normal == target else f" (spelled {target!r})"
            what = f"holds {system}" if within(system, normal) and system != normal else f"is part of {system}"
            raise ValidationError(
                f"The mount target {normal}{spelled} is restricted: it {what}, which the system or the runtime needs.",
                hint=f"Choose {ACCEPTED_TARGETS}."
                + (" With allow_docker_cache=True a volume may lie on it." if normal == DOCKER else ""),
            )
    return normal


def conceals(target: str, needed: Iterable[str]) -> str | None:
    """The first of the paths `needed` that a mount at `target` would hide, or None. All are absolute and normal."""
    return next((path for path in needed if within(path, target)), None)


def within(path: str, directory: str) -> bool:
    """Whether `path` is `directory` or lies below it; both absolute and normal."""
    return path == directory or directory == "/" or path.startswith(directory + "/")


def scheme_of(source: str) -> str:
    """The scheme of a URL in lower case; `file` for a plain path."""
    match = _SCHEME.match(source)
    return match.group(1).lower() if match else "file"


def is_url(source: str) -> bool:
    """Whether `source` is written as a URL, not as a plain path."""
    return _SCHEME.match(source) is not None


def check_path(path: str) -> None:
    """Raise `ValidationError` for what is no path but a URL with a slash too few, such as `s3:/bucket`."""
    if match := _ALMOST_URL.match(path):
        raise ValidationError(
            f"{path!r} is neither a URL nor a path.", hint=f"Did you mean {match[1]}://{path[match.end() :]}?"
        )


def redact(url: str) -> str:
    """`url` fit to be shown: without a password, and without the query of a signed or tokened URL."""
    match = _SCHEME.match(url)
    if match is None:
        return url
    rest = url[match.end() :]
    authority, slash, tail = rest.partition("/")
    if "@" in authority:
        authority = "***@" + authority.rpartition("@")[2]
    if match.group(1).lower() in ("http", "https") and "?" in tail:
        tail = tail.partition("?")[0] + "?***"
    return match.group(0) + authority + slash + tail


def public_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """`options` fit to be shown: only values that are known to carry no secret, `***` for the rest."""
    return {name: value if name in _PUBLIC_OPTIONS else "***" for name, value in options.items()}


def default_target(source: str) -> str:
    """Where a source without a target is mounted."""
    scheme = scheme_of(source)
    if scheme in ("s3", "s3a"):
        return "/data"
    if scheme == "volume":
        return "/volumes"
    match = _SCHEME.match(source)
    path = source[match.end() :] if match else source
    name = posixpath.basename(path.partition("?")[0].rstrip("/"))
    if name in ("", ".", ".."):
        raise ValidationError(
            f"The mount source {source!r} has no name to make a target of.", hint='Name one: {"/data": source}.'
        )
    return f"/mnt/{name}"


def normalise_source(source: object, target: str) -> str:
    """`source` as a string; plain paths absolute (from the working directory of whoever writes the mount)."""
    # A reference (flow.Dir, flow.File) is os.PathLike too, but its path is where it is staged.
    if isinstance(url := getattr(source, "url", None), str):
        source = url
    elif isinstance(source, os.PathLike):
        source = os.fspath(source)
    if not isinstance(source, str) or not source or "\0" in source:
        raise ValidationError(f"The mount at {target} has the source {source!r}, which is not {ACCEPTED_SOURCES}.")
    match = _SCHEME.match(source)
    if match is None:
        check_path(source)
        return os.path.abspath(os.path.expanduser(source))
    scheme, rest = match.group(1).lower(), source[match.end() :]
    if scheme == "file":
        if not rest.startswith("/"):
            raise ValidationError(f"The mount at {target} has the source {source!r}.", hint="Write file:///path.")
    elif not rest.strip("/"):
        raise ValidationError(
            f"The mount at {target} has the source {source!r}, which names no bucket, host or volume."
        )
    elif scheme == "volume" and not re.fullmatch(r"[A-Za-z0-9][\w.\-]*(/.*)?", rest):
        raise ValidationError(
            f"The mount at {target} has the source {source!r}.", hint="Write volume://name, or volume://vol_<id>."
        )
    return scheme + "://" + rest


def _mount(source: object, target: object, allow_docker_cache: bool) -> Mount:
    normal = normalise_target(target, allow_docker_cache=allow_docker_cache)
    if isinstance(source, Mount):
        return Mount(
            source.source,
            normal,
            read_only=source.read_only,
            mode=source.mode,
            storage_options=source.storage_options,
        )
    if isinstance(source, Mapping):
        return _volume(source, normal)
    return Mount(source, normal)  # type: ignore[arg-type]  # __post_init__ checks what it is given


def _listed(item: object, allow_docker_cache: bool) -> Mount:
    if isinstance(item, Mount):
        return _mount(item, item.target, allow_docker_cache)
    if isinstance(item, Mapping):
        target = item.get("mount_path") or item.get("target")
        if target is None:
            target = f"/volumes/{item['name']}" if item.get("name") else "/volumes"
        return _mount(item, target, allow_docker_cache)
    if isinstance(item, str):
        target, equals, source = item.partition("=")
        # `/data/year=2024` is a path, `/data=s3://b/year=2024` a target and its source.
        if equals and not is_url(target) and (is_url(source) or source.startswith(("/", "./", "../", "~"))):
            return _mount(source, target, allow_docker_cache)
    source = normalise_source(item, "its default target")
    return Mount(source, default_target(source))


def _is_volume_mapping(value: Mapping[Any, Any]) -> bool:
    return (
        bool(value)
        and not any(isinstance(key, str) and key.startswith("/") for key in value)
        and ("name" in value or "volume_id" in value)
    )


def _volume(value: Mapping[Any, Any], target: str) -> Mount:
    if "source" in value:
        return Mount.from_dict({**value, "target": target})
    name = value.get("volume_id") or value.get("name")
    if not isinstance(name, str):
        raise ValidationError(f"The volume at {target} has neither a name nor a volume_id.")
    options = {key: value[key] for key in ("size_gb", "region", "interface") if value.get(key) is not None}
    return Mount(f"volume://{name}", target, read_only=value.get("read_only"), storage_options=options or None)
