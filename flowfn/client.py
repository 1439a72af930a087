"""`Flow`, the client, and the module-level `run` and `invoke`, which are its methods on a client of their own."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from flowfn_runtime import taskdb
from flowfn_runtime.errors import ConfigError, TaskError, ValidationError

from . import config as configuration
from . import places
from .task import Task

if TYPE_CHECKING:
    from flowfn_runtime.data.volumes import Volume

    # pydantic, which it is made of, takes longer to import than all the rest: only who needs it pays for it.
    from .taskconfig import TaskConfig


class Flow:
    """A client: submits tasks, and finds tasks and volumes of its project.

    ```python
    with Flow() as client:
        task = client.submit("python train.py", gpu="a100", mounts="s3://my-bucket/dataset")
        print(task.wait().exit_code, task.logs())
    ```

    `config` replaces the configuration that is read from the environment and files; `project` sets the project alone.
    It holds nothing open: closing it, and the end of the `with` block, leave tasks running.
    """

    def __init__(
        self, config: configuration.Config | None = None, auto_init: bool = False, *, project: str | None = None
    ) -> None:
        del auto_init  # nothing has to be set up
        if config is not None and not isinstance(config, configuration.Config):
            raise ConfigError(f"Flow(config=...) takes a flowfn.config.Config, not {type(config).__name__}")
        self.config = config or configuration.load()
        if project is not None:
            self.config = self.config._replace(project=project)

    def __enter__(self) -> Flow:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Nothing needs to be closed; tasks run on."""

    def __repr__(self) -> str:
        return f"Flow(project={self.config.project!r}, backend={self.config.backend!r})"

    # -- tasks

    def submit(
        self,
        command: str | list[str] | None,
        *,
        gpu: str | int | list[str] | None = None,
        mounts: Any = None,
        data: Any = None,
        env: Mapping[str, str] | None = None,
        instance_type: str | None = None,
        wait: bool = False,
        **fields: Any,
    ) -> Task:
        """Submit a command; returns at once, unless `wait`.

        `gpu` (or `instance_type`): `"a100"`, `"a100:4"`, `"8xh100"`. `mounts` (or `data`): a source, which appears at
        /data (buckets), /volumes (a volume) or /mnt/<name>, or a mapping of target to source. `env`: variables, of
        which credentials also stage the data. Further `fields` are `TaskConfig`'s. Raises `ValidationError`,
        `ResourceUnavailable`, `VolumeNotFound` and others before anything is started.
        """
        if mounts is not None and data is not None:
            raise ValidationError("mounts= and data= are two names of one option; give one")
        if gpu is not None and instance_type is not None:
            raise ValidationError("gpu= and instance_type= are two names of one option; give one")
        from .taskconfig import TaskConfig

        if isinstance(command, TaskConfig):
            raise ValidationError("submit takes a command, and was given a TaskConfig", hint="pass it to run")
        _merge_mounts(fields, mounts if mounts is not None else data)
        wanted = gpu if gpu is not None else instance_type
        if wanted is not None:
            fields["instance_type"] = wanted
        if env is not None:
            fields["env"] = dict(env)
        return self._start(TaskConfig(command=command, **_task_ids(fields)), wait)

    def run(
        self,
        task: TaskConfig | str | list[str] | os.PathLike[str],
        wait: bool = False,
        mounts: Any = None,
        *,
        data_mounts: Any = None,
        wait_until: Literal["submitted", "running", "terminal"] | None = None,
        max_wait_seconds: float | None = None,
        **fields: Any,
    ) -> Task:
        """Run a `TaskConfig`, a job file (a path that ends in .yaml or .yml), or a command (shell lines, or a list).

        Returns when the task is submitted; with `wait` when it has ended; `wait_until` says it more finely, and
        `max_wait_seconds` for how long at most (`TimeoutError`). `check` says whether a task would be accepted.
        """
        extra = mounts if mounts is not None else data_mounts
        config = config_of(task, **fields) if extra is None else config_of(task, data_mounts=extra, **fields)
        started = self._start(config, wait or wait_until == "terminal", max_wait_seconds)
        if wait_until == "running":
            started.wait_started(max_wait_seconds)
        return started

    def check(self, task: TaskConfig | str | list[str] | os.PathLike[str], **fields: Any) -> TaskConfig:
        """What `run` would run, if it would be accepted; else raises what `run` would raise. Nothing is started."""
        from .submit import check

        config = config_of(task, **fields)
        check(config, self.config)
        return config

    def _start(self, config: TaskConfig, wait: bool, timeout: float | None = None) -> Task:
        from .submit import submit

        task = Task(taskdb.get(submit(config, settings=self.config, backend=config.backend)))
        return task.wait(timeout) if wait else task

    def invoke(
        self,
        module_path: str | os.PathLike[str],
        function_name: str,
        args: Iterable[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """Run a function of a file as a task, and return its value or raise its exception. See `flow.invoke`."""
        task = self.invoke_async(module_path, function_name, args, kwargs, **options)
        try:
            return task.result()
        except KeyboardInterrupt:
            task.cancel("the client that waited for it was interrupted")
            raise

    def invoke_async(
        self,
        module_path: str | os.PathLike[str],
        function_name: str,
        args: Iterable[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        *,
        gpu: str | int | list[str] | None = None,
        retries: Any = 0,
        retry_delay: float = 1.0,
        retry_backoff: float = 2.0,
        max_result_size: int | None = None,
        mounts: Any = None,
        data: Any = None,
        **fields: Any,
    ) -> Task:
        """Like `invoke`, but returns the `Task` at once; its `result()` is the function's value or exception."""
        from .durable import submit_file
        from .retries import Retries
        from .taskconfig import TaskConfig

        del max_result_size  # results have no limit
        if isinstance(retries, int) and not isinstance(retries, bool) and retries > 0:
            retries = Retries(retries, initial_delay=retry_delay, backoff=retry_backoff)
        if gpu is not None:
            fields["instance_type"] = gpu
        _merge_mounts(fields, mounts if mounts is not None else data)
        config = TaskConfig(retries=retries, **_task_ids(fields))
        return submit_file(module_path, function_name, args or (), kwargs or {}, config, self.config)

    def get_task(self, task_id: str) -> Task:
        """The project's task of this id (or beginning of an id, or name); else `TaskNotFound`."""
        return Task(taskdb.find(task_id, self.config.project))

    def list_tasks(self, status: str | Iterable[str] | None = None, limit: int | None = 10) -> list[Task]:
        """The project's newest tasks, newest first; only those in a state, or one of several, if `status` says so."""
        states = [status] if isinstance(status, str) else list(status or ())
        for state in states:
            if state not in taskdb.STATES:
                raise ValidationError(f"status={state!r}: the states of a task are {', '.join(taskdb.STATES)}")
        places.look(self.config.project)
        return [Task(row) for row in taskdb.list_tasks(self.config.project, states=states, limit=limit)]

    def status(self, task_id: str) -> str:
        """A task's state: pending, running, completed, failed or cancelled."""
        return self.get_task(task_id).status

    def cancel(self, task_id: str) -> None:
        """Cancel a task. It has ended when its `status` says so."""
        self.get_task(task_id).cancel()

    def logs(
        self, task_id: str, follow: bool = False, tail: int | None = 100, stderr: bool = False
    ) -> str | Iterator[str]:
        """What a task wrote: a string, or with `follow` an iterator of lines."""
        task = self.get_task(task_id)
        return task.logs(True, tail, stderr) if follow else task.logs(False, tail, stderr)

    def delete_tasks(self, *tasks: Task | str) -> None:
        """Forget tasks that have ended: their logs, results and code go. Raises `TaskError` if one is active."""
        found = [task if isinstance(task, Task) else self.get_task(task) for task in tasks]
        for task in found:
            if not task.is_terminal:
                raise TaskError(f"task {task.name} is {task.status}", hint=f"End it first: flow cancel {task.name}")
        places.remove([task._row for task in found])

    def shell(self, task_id: str, command: str | None = None, node: int | None = None) -> int:
        """Run a shell, or a command, inside of a running task; returns its exit code."""
        return self.get_task(task_id).shell(command, node or 0)

    def dev(self, command: str | None = None, **fields: Any) -> int:
        """An interactive shell (or one command) in a task's environment; returns its exit code.

        The project's files are in the working directory, and /var/lib/docker persists. `fields` as of `submit`.
        """
        from .dev import run_dev

        if "gpu" in fields:
            fields["instance_type"] = fields.pop("gpu")
        _merge_mounts(fields, fields.pop("mounts", None))
        return run_dev(command, fields, self.config)

    # -- volumes

    def create_volume(
        self,
        size_gb: int,
        name: str | None = None,
        interface: Literal["block", "file"] = "block",
        region: str | None = None,
    ) -> Volume:
        """The project's volume of this name, created if there is none; without a name a new one.

        A `block` volume belongs to one task at a time, a `file` volume is shared.
        """
        from flowfn_runtime.data import volumes

        region = region or self.config.region
        project = self.config.project
        if name is None:
            return volumes.create(size_gb=size_gb, interface=interface, region=region, project=project)
        return volumes.find_or_create(name, size_gb=size_gb, interface=interface, region=region, project=project)

    def list_volumes(self, limit: int | None = 100) -> list[Volume]:
        """The project's volumes, oldest first."""
        from flowfn_runtime.data import volumes

        return volumes.list_volumes(self.config.project)[:limit]

    def delete_volume(self, volume_id: str) -> bool:
        """Delete a volume, by id or name, with all that is in it. Raises `VolumeInUse`, `VolumeNotFound`."""
        from flowfn_runtime.data import volumes

        volumes.delete(volume_id, self.config.project)
        return True

    def mount_volume(self, volume_id: str, task_id: str, mount_point: str | None = None) -> None:
        """Not possible here: a task has its mounts from its start on. Raises `ValidationError` that says what to do."""
        del mount_point
        raise ValidationError(
            f"volume {volume_id} can't be mounted into task {task_id}, which was started without it",
            hint="Name it when the task is submitted: mounts={'/data': 'volume://name'}.",
        )

    def find_instances(self, requirements: Mapping[str, Any] | None = None, limit: int = 10) -> list[dict[str, Any]]:
        """The GPUs of this host that fit `requirements` (`instance_type`, `min_gpu_memory_gb`)."""
        from flowfn_runtime import gpus
        from flowfn_runtime.gpu_request import parse_gpu

        wanted = dict(requirements or {})
        requests = parse_gpu(wanted.get("instance_type") or "any", option="instance_type")
        memory = wanted.get("min_gpu_memory_gb") or 0
        found = [
            {"index": gpu.index, "model": gpu.model, "memory_gb": round(gpu.memory_bytes / 1e9, 1), "uuid": gpu.uuid}
            for gpu in gpus.inventory(self.config.gpus).gpus
            if gpu.memory_bytes >= memory * 0.95e9 and any(r.fits(gpu.model, gpu.memory_bytes) for r in requests)
        ]
        return found[:limit]

    @property
    def volumes(self) -> _Volumes:
        """The same as `create_volume`, `list_volumes` and so on: `client.volumes.create(...)`."""
        return _Volumes(self)


class _Volumes:
    def __init__(self, client: Flow) -> None:
        self._client = client
        self.create = client.create_volume
        self.delete = client.delete_volume
        self.list = client.list_volumes

    def get(self, volume_id: str) -> Volume:
        """The project's volume of this id or name; else `VolumeNotFound`."""
        from flowfn_runtime.data import volumes

        return volumes.get(volume_id, self._client.config.project)


def run(task: TaskConfig | str | list[str] | os.PathLike[str], wait: bool = False, **fields: Any) -> Task:
    """Run a `TaskConfig`, a job file or a command; `fields` are `TaskConfig`'s. See `Flow.run`.

    ```python
    task = flow.run(TaskConfig(command="python train.py", volumes=[{"name": "data", "mount_path": "/data"}]))
    ```
    """
    return Flow().run(task, wait, **fields)


def invoke(
    module_path: str | os.PathLike[str],
    function_name: str,
    args: Iterable[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Run a function of a file as a task, and return what it returns.

    Arguments that are URLs of buckets (`s3://...`) are staged: the function gets a readable path, a `str` with the
    attribute `url`. Any value that can be pickled comes back, of any size; an exception is raised here as it was there.
    `options` are those of `Flow.submit`, and `retries`, `retry_delay`, `retry_backoff`. A missing file or function is a
    `ValidationError` before anything starts.

    ```python
    total = invoke("process.py", "analyze_data", args=["s3://bucket/input.csv"], gpu="a100")
    ```
    """
    return Flow().invoke(module_path, function_name, args, kwargs, **options)


def invoke_async(
    module_path: str | os.PathLike[str],
    function_name: str,
    args: Iterable[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> Task:
    """Like `invoke`, but returns the task at once; `task.result()` gives the value."""
    return Flow().invoke_async(module_path, function_name, args, kwargs, **options)


def config_of(task: TaskConfig | str | list[str] | os.PathLike[str], **fields: Any) -> TaskConfig:
    """The configuration that `task` means; `fields` win over what a job file says."""
    from .taskconfig import TaskConfig, read_yaml

    fields = _task_ids(fields)
    if "gpu" in fields:
        fields["instance_type"] = fields.pop("gpu")
    if (mounts := fields.pop("mounts", None)) is not None:
        fields["data_mounts"] = mounts
    if isinstance(task, TaskConfig):
        if not fields:
            return task
        given = {name: getattr(task, name) for name in task.model_fields_set}
        return TaskConfig(**{**given, **fields})
    if not isinstance(task, list) and is_job_file(task):
        return TaskConfig(**{**read_yaml(task), **fields})
    if not isinstance(task, (str, list)):
        raise ValidationError(f"run takes a TaskConfig, a command or a job file (.yaml), not {task!r}")
    return TaskConfig(command=task, **fields)


def is_job_file(task: object) -> bool:
    """Whether it names a job file: a path that ends in .yaml or .yml."""
    text = os.fspath(task) if isinstance(task, (str, os.PathLike)) else ""
    return isinstance(text, str) and "\n" not in text and Path(text).suffix in (".yaml", ".yml") and " " not in text


def _merge_mounts(fields: dict[str, Any], mounts: Any) -> None:
    if mounts is None:
        return
    if "data_mounts" in fields:
        raise ValidationError("mounts= and data_mounts= are two names of one option; give one")
    fields["data_mounts"] = mounts


def _task_ids(fields: dict[str, Any]) -> dict[str, Any]:
    """`depends_on` takes tasks as well as their ids."""
    if "depends_on" in fields:
        wanted = fields["depends_on"]
        wanted = [wanted] if isinstance(wanted, (str, Task)) else list(wanted or ())
        fields = {**fields, "depends_on": [t.task_id if isinstance(t, Task) else t for t in wanted]}
    return fields
