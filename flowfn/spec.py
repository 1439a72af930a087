"""What a function asks for: resources, environment, mounts, retries. Pure: it reads no file, device or environment.

Every option of `@flow.function` is checked here, when the function is decorated; what is wrong raises
`ValidationError`, which names the option, the value, and what is accepted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from flowfn_runtime.errors import ValidationError
from flowfn_runtime.gpu_request import GpuRequest, parse_gpu

if TYPE_CHECKING:
    from flowfn.retries import Retries, parse_retries
    from flowfn_runtime.data.spec import Mount, parse_mounts

__all__ = [
    "Environment",
    "FunctionSpec",
    "GpuRequest",
    "Mount",
    "Resources",
    "Retries",
    "parse_cpu",
    "parse_gpu",
    "parse_memory",
    "parse_mounts",
    "parse_retries",
    "parse_timeout",
]


def __getattr__(name: str) -> Any:
    # Only functions that have mounts or retries pay for importing them.
    if name in ("Mount", "parse_mounts"):
        from flowfn_runtime.data import spec

        return getattr(spec, name)
    if name in ("Retries", "parse_retries"):
        from flowfn import retries

        return getattr(retries, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_MEMORY_ACCEPTED = 'a size with its unit, "32GiB" or "512MB", or a number of bytes'
_LEAST_MEMORY = 2**20  # less than this is a forgotten unit: no Python runs in it
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_memory(value: object, *, option: str = "memory") -> int | None:
    """A size in bytes. `"GiB"` and `"Gi"` are 2^30, `"GB"` and `"G"` are 10^9; a number is bytes. None stays None."""
    if value is None:
        return None
    size: float | None = None
    if isinstance(value, int) and not isinstance(value, bool):
        size = value
    elif isinstance(value, str):
        match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)\s*([kmgt]?i?)b?", value.strip().lower(), re.ASCII)
        if match and match[2] in _UNITS:
            size = float(match[1]) * _UNITS[match[2]]
    if size is None:
        raise ValidationError(f"{option}={value!r} is no amount of memory; accepted: {_MEMORY_ACCEPTED}")
    if size < _LEAST_MEMORY:
        raise ValidationError(
            f"{option}={value!r} is {size:g} bytes, too little for any process; accepted: {_MEMORY_ACCEPTED}",
            hint=f'for GiB write {option}="{size:g}GiB"' if 0 < size < 4096 else None,
        )
    return int(size)


def parse_cpu(value: object, *, option: str = "cpu") -> float | None:
    """A number of cores, which need not be whole. None stays None."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 4096:
        raise ValidationError(f"{option}={value!r} is no number of cores; accepted: a number above 0, such as 4 or 0.5")
    return float(value)


def parse_timeout(value: object, *, option: str = "timeout", zero: bool = False) -> float | None:
    """A duration in seconds: a number, a `timedelta`, or `"90s"`, `"10m"`, `"2h"`, `"1d"`. None: no limit.

    `zero` says whether a duration of nothing is accepted.
    """
    if value is None:
        return None
    seconds: float | None = None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        seconds = value
    elif isinstance(value, str):
        if match := re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*([smhd])", value.strip().lower(), re.ASCII):
            seconds = float(match[1]) * _SECONDS[match[2]]
    elif callable(total := getattr(value, "total_seconds", None)):  # a timedelta, without importing datetime
        seconds = total()
    if seconds is None or not (seconds > 0 or (zero and seconds == 0)) or seconds > 1e10:
        least = "0 or more" if zero else "more than 0"
        raise ValidationError(
            f"{option}={value!r} is no duration; accepted: seconds ({least}), a timedelta, or text such as "
            '"90s", "10m", "2h", "1d"'
        )
    return float(seconds)


class Environment(Mapping[str, str]):
    """Environment variables: an immutable mapping that shows no value in its repr, for any may be a credential."""

    __slots__ = ("_items",)

    def __init__(self, items: Mapping[str, str] | None = None) -> None:
        self._items = dict(items or {})

    def __getitem__(self, name: str) -> str:
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(frozenset(self._items.items()))

    def __eq__(self, other: object) -> bool:
        return self._items == other._items if isinstance(other, Environment) else NotImplemented

    def __repr__(self) -> str:
        return f"Environment({', '.join(f'{name}=***' for name in self._items)})"


class Resources(NamedTuple):
    """What a worker is given. Empty or None: whatever is there."""

    gpu: tuple[GpuRequest, ...] = ()  # fallbacks, the most wanted first
    cpu: float | None = None  # cores: decides threads and affinity
    memory_bytes: int | None = None  # of the worker and all it starts; enforced


class _Options(NamedTuple):  # not a dataclass: importing that is a tenth of the way to a decorated function
    gpu: tuple[GpuRequest, ...] = ()
    cpu: float | None = None
    memory: int | None = None  # bytes
    mounts: tuple[Mount, ...] = ()
    env: Environment = Environment()
    secrets: tuple[str, ...] | Environment = ()  # names to take from the client's environment, or names and values
    timeout: float | None = None  # seconds an attempt
    retries: Retries | None = None
    image: Any = None
    max_workers: int | None = None  # None: as many as there are GPU slots, or cores
    idle_timeout: float | None = None  # seconds; None: the pool's default
    backend: Any = None  # a name or a Backend; None: the configured one
    name: str | None = None


class FunctionSpec(_Options):
    """Every option of `@flow.function`, parsed. Made by `from_options`, which checks; the constructor does not."""

    @classmethod
    def from_options(cls, **options: Any) -> FunctionSpec:
        """The spec that `options` (as the user wrote them) mean. Raises ValidationError."""
        return cls(**_parse_options(options))

    def replace(self, **options: Any) -> FunctionSpec:
        """This spec with some options (as the user wrote them) set anew. Raises ValidationError."""
        return self._replace(**_parse_options(options))

    @property
    def resources(self) -> Resources:
        return Resources(gpu=self.gpu, cpu=self.cpu, memory_bytes=self.memory)

    def environment(self, client_environ: Mapping[str, str]) -> Environment:
        """The variables that a worker gets: `env`, and the secrets, whose names are looked up in `client_environ`.

        Raises ValidationError that names the secrets that are not set there.
        """
        if isinstance(self.secrets, Environment):
            return Environment({**self.env, **self.secrets})
        if missing := [name for name in self.secrets if name not in client_environ]:
            raise ValidationError(
                f"secrets={list(self.secrets)!r}: {', '.join(missing)} not set in this process's environment",
                hint=f"export {missing[0]}=..., or pass secrets={{{missing[0]!r}: value}}",
            )
        return Environment({**self.env, **{name: client_environ[name] for name in self.secrets}})

    @cached_property
    def shape(self) -> Shape:
        """Key of what decides which workers may run the call: calls of one shape share workers."""
        backend, image = _hashable(self.backend), _hashable(self.image)
        pool = (backend, self.max_workers, self.idle_timeout)
        return Shape((self.resources, self.env, self.secrets, self.mounts, image, *pool))


class Shape:
    """A hashable key that shows nothing of what it was made of."""

    __slots__ = ("_hash", "_parts")

    def __init__(self, parts: tuple[Any, ...]) -> None:
        self._parts = parts
        self._hash = hash(parts)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Shape) and self._hash == other._hash and self._parts == other._parts

    def __reduce__(self) -> Any:
        return Shape, (self._parts,)  # the hash of text is another one in another process

    def __repr__(self) -> str:
        return f"<shape {self._hash & 0xFFFFFFFF:08x}>"


def _parse_options(options: Mapping[str, Any]) -> dict[str, Any]:
    parsed = {}
    for option, value in options.items():
        parse = _PARSERS.get(option)
        if parse is None:
            import difflib

            near = difflib.get_close_matches(option.lower(), _PARSERS, n=1, cutoff=0.5)
            raise ValidationError(
                f"{option}={_shown(option, value)} is no option of a function; accepted: {', '.join(_PARSERS)}",
                hint=f"did you mean {near[0]}=?" if near else None,
            )
        parsed[option] = parse(value)
    return parsed


def _parse_mounts(value: Any) -> tuple[Mount, ...]:
    if value is None:
        return ()
    from flowfn_runtime.data.spec import parse_mounts

    return parse_mounts(value)


def _parse_retries(value: Any) -> Retries | None:
    if value is None:
        return None
    from flowfn.retries import parse_retries

    return parse_retries(value)


def _parse_env(value: Any, option: str = "env") -> Environment:
    if value is None or isinstance(value, Environment):
        return value or Environment()
    if not isinstance(value, Mapping):
        raise ValidationError(
            f"{option}={_shown(option, value)} is no mapping; accepted: names and values as text, "
            f'{option}={{"NAME": "value"}}'
        )
    for name, text in value.items():
        _check_variable(name, option)
        if not isinstance(text, str) or "\0" in text:  # the value stays out of the message: it may be a secret
            what = "holds a NUL byte" if isinstance(text, str) else f"is of type {type(text).__name__}"
            raise ValidationError(
                f"{option}: the value of {name!r} {what}; accepted: text",
                hint=f'write {option}={{{name!r}: "..."}}',
            )
    return Environment(value)


def _parse_secrets(value: Any) -> tuple[str, ...] | Environment:
    if value is None:
        return ()
    if isinstance(value, Mapping):
        return _parse_env(value, "secrets")
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, (list, tuple, set, frozenset)):
        raise ValidationError(
            f"secrets: {type(value).__name__} is neither names nor a mapping; accepted: names of environment variables "
            'to pass along, secrets=["HF_TOKEN"], or names and values, secrets={"HF_TOKEN": value}'
        )
    for name in names:
        _check_variable(name, "secrets")
    return tuple(sorted(set(names)))


def _check_variable(name: object, option: str) -> None:
    # Looser than a shell: an environment takes any name without "=" and NUL. But secrets=["NAME=value"] and
    # secrets=[value] are mistakes that would show the value, so such a name is described, not shown.
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.\-]*", name, re.ASCII) or len(name) > 255:
        raise ValidationError(
            f"{option}: one of the names is no name of an environment variable; accepted: letters, digits and _, "
            "such as HF_TOKEN"
        )


def _parse_max_workers(value: Any) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise _wrong("max_workers", value, "a whole number, 1 or more")
    return value


def _parse_name(value: Any) -> str | None:
    if value is not None and (
        not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,127}", value, re.ASCII)
    ):
        raise _wrong("name", value, 'letters, digits, "_", "-" and ".", at most 128, not starting with "-" or "."')
    return value


def _parse_backend(value: Any) -> Any:
    if value is None or (isinstance(value, str) and value.strip()):
        return value.strip() if value else None
    options = hasattr(value, "make_backend")  # which may be a named tuple
    if not options and isinstance(value, (str, bytes, int, float, list, tuple, dict, set)):
        raise _wrong("backend", value, 'the name of a backend, such as "local", or a backend object')
    return value


def _parse_image(value: Any) -> Any:
    if (isinstance(value, str) and not value.strip()) or isinstance(value, (bytes, int, float, list, tuple, set)):
        raise _wrong("image", value, 'a reference such as "docker.io/library/python:3.12", or an image object')
    return value


_PARSERS: dict[str, Callable[[Any], Any]] = {
    "gpu": parse_gpu,
    "cpu": parse_cpu,
    "memory": parse_memory,
    "mounts": _parse_mounts,
    "env": _parse_env,
    "secrets": _parse_secrets,
    "timeout": parse_timeout,
    "retries": _parse_retries,
    "image": _parse_image,
    "max_workers": _parse_max_workers,
    "idle_timeout": lambda value: parse_timeout(value, option="idle_timeout", zero=True),
    "backend": _parse_backend,
    "name": _parse_name,
}


def _wrong(option: str, value: object, accepted: str) -> ValidationError:
    return ValidationError(f"{option}={value!r} is not accepted; accepted: {accepted}")


def _shown(option: str, value: object) -> str:
    """The value for a message, unless it may hold a credential: an unknown option may be a misspelt `secrets=`."""
    plain = isinstance(value, (int, float, str)) and not any(s in option.lower() for s in ("env", "secret", "token"))
    return repr(value) if plain else f"<{type(value).__name__}>"


def _hashable(value: Any) -> Any:
    """`value` if it can be a key, else its identity."""
    try:
        hash(value)
    except TypeError:
        return _Same(value)
    return value


class _Same:
    """Equal to itself only. Keeps the object, so that its id is not used again meanwhile."""

    __slots__ = ("_value",)

    def __init__(self, value: object) -> None:
        self._value = value

    def __hash__(self) -> int:
        return id(self._value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._value is other._value
