"""The one reader of configuration: environment, the project's `pyproject.toml`, the user's `FLOW_HOME/config.toml`.

The environment wins, then `[tool.flow]` of the nearest `pyproject.toml`, then the user's file:

```toml
# ~/.flowfn/config.toml                    # pyproject.toml: the same keys under [tool.flow]
backend = "local"
project = "vision"
gpus = "a100:4"                            # declares GPU slots where NVML finds none

[storage."s3://my-bucket"]                 # options for every URL that starts so
endpoint_url = "https://minio.example:9000"

[backends.cluster]                         # what `backend="cluster"` means
type = "slurm"
partition = "gpu"
```
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from flowfn_runtime import paths
from flowfn_runtime import settings as runtime
from flowfn_runtime.errors import ConfigError

if TYPE_CHECKING:
    from flowfn_runtime.data.spec import Mount

# Variable -> field of Config. Every one holds a plain string.
_VARIABLES = {
    "FLOW_BACKEND": "backend",
    "FLOW_GPUS": "gpus",
    "FLOW_PROJECT": "project",
    "FLOW_REGION": "region",
    "FLOW_STORE": "store",
    "FLOW_VOLUMES": "volumes",
}
# Besides, FLOW_STORAGE holds the table `storage` as JSON.
_STRINGS = frozenset(_VARIABLES.values())
_SERVERS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION")  # no secrets
_TABLES = frozenset({"storage", "backends"})
_PROJECT = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]{0,63}")


class Config(NamedTuple):
    """What the user configured; defaults where nothing was."""

    backend: str = "local"  # a built-in backend, a key of `backends`, or a URL such as ssh://user@host
    project: str = "default"  # whose volumes and tasks are seen
    gpus: str | None = None  # declared GPU slots, "a100:4,h100:2"; None asks NVML
    region: str | None = None  # where volumes and tasks are made unless they say otherwise
    store: str | None = None  # URL for payloads and results too big for the wire; None: under FLOW_HOME
    volumes: str | None = None  # URL prefix that holds the volumes; None: under FLOW_HOME
    storage: Mapping[str, Mapping[str, Any]] = MappingProxyType({})  # URL prefix -> storage options
    backends: Mapping[str, Mapping[str, Any]] = MappingProxyType({})  # name -> options, "type" among them

    def __repr__(self) -> str:
        # Storage and backend options may hold credentials.
        return f"Config(backend={self.backend!r}, project={self.project!r}, region={self.region!r}, gpus={self.gpus!r})"

    def storage_options(self, url: str) -> dict[str, Any]:
        """The options configured for `url`: those of the longest prefix that matches at a path boundary, over fsspec's
        own for the protocol."""
        from flowfn_runtime.data.credentials import fsspec_options

        protocol = url.partition("://")[0] if "://" in url else "file"
        return {**fsspec_options(protocol, os.environ), **runtime.options_for(url, self.storage)}

    def with_options(self, mount: Mount) -> Mount:
        """The mount with the options configured for its source, for a process that has no such configuration."""
        if not (configured := self.storage_options(mount.source)):
            return mount
        from dataclasses import replace

        return replace(mount, storage_options={**configured, **(mount.storage_options or {})})

    def data_environment(self, env: Mapping[str, str]) -> dict[str, str]:
        """Variables that tell a process elsewhere where buckets are, and the volumes and the store if they are in one.

        `env`: the variables of the call or task that uses them: they may say who asks there. Who this process is, it
        tells nobody by itself.
        """
        import json

        places = {"FLOW_STORE": self.store, "FLOW_VOLUMES": self.volumes}
        told = {name: url for name, url in places.items() if url and "://" in url and not url.startswith("file:")}
        if storage := {url: options for url in told.values() if (options := self.storage_options(url))}:
            told["FLOW_STORAGE"] = json.dumps(storage)
        servers = {name: os.environ[name] for name in _SERVERS if name in os.environ}
        return servers | told | ({name: env[name] for name in env if name.startswith("AWS_")} if told else {})


def load(*, cwd: str | None = None) -> Config:
    """Read the configuration as it is now.

    `cwd` is where the search for `pyproject.toml` starts; the working directory unless given. Raises `ConfigError`
    that names the file or variable, the key, and what is accepted.
    """
    merged: dict[str, Any] = {}
    for path, table in ((user_file(), False), (_project_file(cwd), True)):
        if path is not None:
            _merge(merged, _checked(_read(path, table), path))
    for variable, key in _VARIABLES.items():
        if value := os.environ.get(variable):
            merged[key] = value
    if storage := os.environ.get("FLOW_STORAGE"):
        _merge(merged, _checked({"storage": _json(storage)}, "FLOW_STORAGE"))
    project = merged.get("project", "default")
    if not _PROJECT.fullmatch(project):
        raise ConfigError(
            f"the project name {project!r} is not valid",
            hint="Use letters, digits, '.', '_' and '-', at most 64, beginning with a letter or digit.",
        )
    return Config(**merged)


def _json(text: str) -> Any:
    import json

    try:
        return json.loads(text)
    except ValueError:
        raise ConfigError(
            "FLOW_STORAGE is not valid JSON", hint='write {"s3://bucket": {"endpoint_url": "https://..."}}'
        ) from None


def user_file() -> str:
    """Path of the user's own configuration file, whether or not it exists."""
    return os.path.join(paths.home(), "config.toml")


def _project_file(cwd: str | None) -> str | None:
    try:
        directory = os.path.abspath(cwd or os.getcwd())
    except FileNotFoundError:  # the working directory was removed
        return None
    while True:
        candidate = os.path.join(directory, "pyproject.toml")
        if os.path.isfile(candidate):
            return candidate
        parent = os.path.dirname(directory)
        if parent == directory:
            return None
        directory = parent


_parsed: dict[str, tuple[tuple[int, int, int], dict[str, Any]]] = {}  # path -> (its identity, its content)


def _read(path: str, table: bool) -> dict[str, Any]:
    try:
        status = os.stat(path)
        identity = (status.st_mtime_ns, status.st_size, status.st_ino)
        if (known := _parsed.get(path)) and known[0] == identity:
            return known[1]
        with open(path, "rb") as file:
            raw = file.read()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror}") from None
    if table and b"flow" not in raw:  # most pyproject.toml say nothing of us: spare the parser
        content: dict[str, Any] = {}
    else:
        content = _parse(raw, path)
        if table:
            content = content.get("tool", {}).get("flow", {})
    _parsed[path] = (identity, content)
    return content


def read_toml(path: str) -> dict[str, Any]:
    """A file in that format, whoever's it is. Raises ConfigError."""
    with open(path, "rb") as file:
        return _parse(file.read(), path)


def _parse(raw: bytes, path: str) -> dict[str, Any]:
    import sys

    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(raw.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None


def _checked(content: dict[str, Any], path: str) -> dict[str, Any]:
    for key, value in content.items():
        if key in _STRINGS:
            if not isinstance(value, str) or not value:
                raise ConfigError(f"{path}: {key} is {value!r}; a non-empty string is wanted")
        elif key in _TABLES:
            if not isinstance(value, dict) or not all(isinstance(entry, dict) for entry in value.values()):
                raise ConfigError(
                    f"{path}: {key} is a table of tables", hint=f'Write it as [{key}."name"] key = value.'
                )
        else:
            from difflib import get_close_matches

            near = get_close_matches(key, sorted(_STRINGS | _TABLES), 1)
            raise ConfigError(
                f"{path}: there is no setting {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""),
                hint=f"The settings are {', '.join(sorted(_STRINGS | _TABLES))}.",
            )
    return content


def _merge(into: dict[str, Any], new: dict[str, Any]) -> None:
    for key, value in new.items():
        into[key] = {**into.get(key, {}), **value} if key in _TABLES else value


# What the runtime's code asks in this process.
runtime.project = lambda: load().project
runtime.volumes = lambda: load().volumes
runtime.store = lambda: load().store
runtime.storage = lambda url: load().storage_options(url)
