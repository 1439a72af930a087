"""What a task is made of: `TaskConfig` and `VolumeSpec`, checked when they are made."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from flowfn_runtime.data.spec import DOCKER, Mount, normalise_target, parse_mounts
from flowfn_runtime.errors import ValidationError
from flowfn_runtime.gpu_request import describe, parse_gpu

from .retries import Retries, parse_retries

NAME = r"^[a-zA-Z0-9][a-zA-Z0-9._-]*$"
VOLUME_NAME = r"^[a-z0-9][a-z0-9-]*[a-z0-9]$"


class _Model(BaseModel):
    """A model whose mistakes are `ValidationError`s of ours, that name the field and what it accepts."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True, arbitrary_types_allowed=True)

    if not TYPE_CHECKING:  # type checkers are to see the fields, not **data

        def __init__(self, **data: Any) -> None:
            try:
                super().__init__(**data)
            except pydantic.ValidationError as error:
                raise _explain(type(self), error) from None

        def __setattr__(self, name: str, value: Any) -> None:
            """Checked as a whole, as if it had been made so; refused, it stays as it was."""
            given = {known: getattr(self, known) for known in self.model_fields_set}
            changed = type(self)(**{**given, name: value})
            self.__dict__.update(changed.__dict__)
            self.__pydantic_fields_set__.add(name)

        @classmethod
        def model_validate(cls, obj: Any, **_options: Any) -> Any:
            if isinstance(obj, cls):
                return obj
            if not isinstance(obj, dict):
                raise ValidationError(f"{cls.__name__}: a mapping of fields is wanted, not {type(obj).__name__}")
            return cls(**obj)


class VolumeSpec(_Model):
    """A volume of a task: by id, by name (found, or created if the project has none of that name), or ephemeral.

    A volume with neither `name` nor `volume_id` belongs to the task alone and is gone with it.
    """

    size_gb: int = Field(default=1, ge=1, le=16384, description="size of a volume that is created, in GB")
    name: str | None = Field(default=None, min_length=3, max_length=64, pattern=VOLUME_NAME)
    volume_id: str | None = Field(default=None, min_length=1)
    mount_path: str | None = Field(default=None, description="where the task sees it; /volumes/<name> unless given")
    interface: Literal["block", "file"] = Field(default="block", description="block: one task at a time; file: shared")
    iops: int | None = Field(default=None, ge=1, description="for providers that sell it; no effect on this machine")
    throughput_mb_s: int | None = Field(default=None, ge=1, description="as iops")
    create_if_missing: bool = Field(default=True, description="a name that the project lacks: create it, or refuse")
    region: str | None = Field(default=None, description="of a volume that is created; the task's unless given")

    @model_validator(mode="before")
    @classmethod
    def _accept_aliases(cls, data: Any) -> Any:
        if isinstance(data, dict) and "target" in data:
            if "mount_path" in data:
                raise ValueError("mount_path and target are two names of one field; give one")
            data = {("mount_path" if key == "target" else key): value for key, value in data.items()}
        return data

    @model_validator(mode="after")
    def _check(self) -> VolumeSpec:
        if self.name and self.volume_id:
            raise ValueError("give name or volume_id, not both")
        return self

    @property
    def target(self) -> str:
        """Where the task sees it."""
        return self.mount_path or f"/volumes/{self.name or self.volume_id or 'data'}"


Port = Annotated[int, Field(ge=1024, le=65535)]


class TaskConfig(_Model):
    """A task: a command and what it needs. Also the content of a job file (YAML).

    Raises `ValidationError` naming the field, the value and what is accepted.
    """

    name: str | None = Field(default=None, min_length=1, max_length=128, pattern=NAME)
    unique_name: bool = Field(default=True, description="append six hex digits to the name")
    command: str | list[str] | None = Field(
        default=None, description="shell lines, or a program and its arguments; None: stay up until cancelled"
    )
    backend: Any = Field(
        default=None, description='where it runs: "local", "ssh://host", "slurm", ...; the configured one unless given'
    )
    image: str | None = Field(default=None, description="container image, for backends that run containers")
    working_dir: str = "/workspace"
    env: dict[str, str] = Field(default_factory=dict, repr=False)
    volumes: list[VolumeSpec | dict[str, Any]] = Field(default_factory=list)
    data_mounts: Any = Field(default=None, description="as mounts= of submit: a source, {target: source}, or a list")
    instance_type: str | int | list[str] | None = Field(
        default=None, description="GPUs of each node: a100, a100:8, 8xh100, cpu; of a list the first that can be had"
    )
    min_gpu_memory_gb: int | None = Field(default=None, ge=1, le=1024)
    num_instances: int = Field(default=1, ge=1, le=100)
    region: str | None = None
    ports: list[Port] = Field(default_factory=list)
    priority: Literal["low", "med", "high"] = Field(default="med", description="for providers that have it")
    max_price_per_hour: float | None = Field(default=None, gt=0, description="for providers that bill")
    max_run_time_hours: float | None = Field(default=None, ge=0, le=168, description="0 or None: no limit")
    deadline_hours: float | None = Field(default=None, ge=1, le=168, description="for providers that schedule by it")
    upload_code: bool = Field(default=True, description="whether the project's files go along")
    code_root: str | None = Field(
        default=None, description="the project's directory; the working directory unless given"
    )
    retries: Retries | int = Field(default=0, description="how often a command that failed is started again, 0 to 10")
    ssh_keys: list[str] = Field(default_factory=list, description="for providers that rent machines")
    allocation_mode: Literal["spot", "reserved", "auto"] = Field(
        default="spot", description="for providers that rent machines"
    )
    reservation_id: str | None = Field(default=None, description="for providers that rent machines")
    distributed_mode: Literal["auto", "manual"] | None = Field(
        default=None, description="both: ranks are in the environment"
    )
    allow_docker_cache: bool = Field(
        default=False, description="lets a volume of a single-node task lie on /var/lib/docker"
    )
    depends_on: list[str] = Field(default_factory=list, description="ids of tasks that must complete first")

    @field_validator("command")
    @classmethod
    def _command_is_something(cls, command: str | list[str] | None) -> str | list[str] | None:
        if command is not None and not (command.strip() if isinstance(command, str) else command):
            raise ValueError("is empty; leave it out to have the task stay up until it is cancelled")
        if isinstance(command, str):
            import textwrap

            command = textwrap.dedent(command).strip("\n")
        if "\0" in (command if isinstance(command, str) else "".join(command or ())):
            raise ValueError("holds a NUL character")
        return command

    @field_validator("env", mode="before")
    @classmethod
    def _env_names(cls, env: Any) -> Any:
        if isinstance(env, dict):
            for name, value in env.items():
                # The message must not show a value: it may be a secret.
                if not isinstance(name, str) or not name or "=" in name or "\0" in name:
                    raise ValueError(f"{name!r} is no name of an environment variable")
                if not isinstance(value, str):
                    raise ValueError(f"the value of {name} must be a string, not {type(value).__name__}")
                if "\0" in value:
                    raise ValueError(f"the value of {name} holds a NUL character")
        return env

    @field_validator("volumes", mode="before")
    @classmethod
    def _volume_specs(cls, volumes: Any) -> Any:
        if isinstance(volumes, (VolumeSpec, dict)):
            volumes = [volumes]
        if not isinstance(volumes, (list, tuple)):
            return volumes
        specs = []
        for number, volume in enumerate(volumes):
            if isinstance(volume, str):
                name = volume.removeprefix("volume://")
                volume = {"volume_id" if name.startswith("vol_") else "name": name}
            if isinstance(volume, dict):
                try:
                    volume = VolumeSpec(**volume)
                except ValidationError as error:
                    raise ValueError(f"number {number + 1}: {error}") from None
            specs.append(volume)
        return specs

    @field_validator("retries", mode="before")
    @classmethod
    def _retries(cls, retries: Any) -> Retries:
        if isinstance(retries, dict):
            try:
                retries = Retries(**retries)
            except TypeError:
                known = "max_retries, initial_delay, backoff, max_delay, jitter"
                raise ValueError(f"the fields of retries are {known}; not {', '.join(map(str, retries))}") from None
        policy = parse_retries(retries) or Retries(0)
        if policy.max_retries > 10:
            raise ValueError("a task is retried 10 times at most")
        return policy

    @field_validator("instance_type")
    @classmethod
    def _instance_type(cls, gpu: Any) -> Any:
        parse_gpu(gpu, option="instance_type")
        return gpu

    @field_validator("ports")
    @classmethod
    def _ports_once(cls, ports: list[int]) -> list[int]:
        return sorted(set(ports))

    @field_validator("working_dir")
    @classmethod
    def _working_dir(cls, path: str) -> str:
        return normalise_target(path if path.startswith("/") else f"/workspace/{path}")

    @model_validator(mode="after")
    def _check_together(self) -> TaskConfig:
        targets: dict[str, str] = {}
        for volume in self.volume_specs():
            target = normalise_target(volume.target, allow_docker_cache=self.allow_docker_cache)
            _once(targets, target, volume.name or volume.volume_id or "an unnamed volume")
        for mount in self.mounts():
            _once(targets, mount.target, mount.source)
        if DOCKER in targets and self.num_instances > 1:
            raise ValueError(
                f"{DOCKER} can't be shared by {self.num_instances} nodes (allow_docker_cache is for one node); "
                "use BuildKit or registry caches"
            )
        return self

    def volume_specs(self) -> list[VolumeSpec]:
        """`volumes`, every one of which is a `VolumeSpec` by now."""
        return [volume for volume in self.volumes if isinstance(volume, VolumeSpec)]

    def gpu(self) -> str:
        """`instance_type` in its canonical form, for listings; "" for none."""
        requests = parse_gpu(self.instance_type, option="instance_type")
        return describe(requests) if requests else ""

    def retry_policy(self) -> Retries:
        """`retries` as a policy."""
        return parse_retries(self.retries) or Retries(0)

    def mounts(self) -> tuple[Mount, ...]:
        """What `data_mounts` says."""
        return parse_mounts(self.data_mounts, allow_docker_cache=self.allow_docker_cache)

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> TaskConfig:
        """Read a job file: the fields of `TaskConfig` at top level. Raises `ValidationError` naming the file."""
        return cls(**read_yaml(path))

    def to_yaml(self, path: str | os.PathLike[str]) -> None:
        """Write a job file that `from_yaml` reads back; with the values of `env`, so only the user can read it."""
        import yaml

        text = yaml.safe_dump(self.model_dump(mode="json", exclude_defaults=True), sort_keys=False)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            file.write(text)


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The fields that a job file gives. Raises `ValidationError` naming the file and the line."""
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValidationError(f"the job file {path} can't be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValidationError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValidationError(
            f"{path} is no job file: a mapping of fields is wanted",
            hint="A job file looks like this:\n    name: train\n    instance_type: a100\n    command: python train.py",
        )
    return content


def _once(targets: dict[str, str], target: str, what: str) -> None:
    if target in targets:
        raise ValueError(f"{targets[target]} and {what} have the same target {target}; give each its own mount_path")
    targets[target] = what


_PREFIX = re.compile(r"^Value error, ")


def _explain(model: type[BaseModel], error: pydantic.ValidationError) -> ValidationError:
    """All mistakes in one message, a line each; an unknown field with the nearest known one."""
    lines = []
    hint = None
    for problem in error.errors(include_url=False):
        where = ".".join(str(part) for part in problem["loc"])
        known = [*model.model_fields, *(["target"] if model is VolumeSpec else [])]
        if problem["type"] == "extra_forbidden":
            from difflib import get_close_matches

            near = get_close_matches(where, known, 1)
            lines.append(f"there is no field {where!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
            hint = f"The fields are {', '.join(known)}."
            continue
        text = _PREFIX.sub("", problem["msg"])
        if where in ("command",) or not where or where.split(".")[0] == "env":
            lines.append(f"{where}: {text}" if where else text)
        else:
            lines.append(f"{where}={_shown(problem.get('input'))}: {text}")
    return ValidationError(f"{model.__name__}: " + "\n  ".join(lines), hint=hint)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
