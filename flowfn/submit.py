"""From a `TaskConfig` to a task that belongs to nobody: on this host, or at the place where its backend runs tasks."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any

from flowfn_runtime import paths, project, taskstart
from flowfn_runtime.tasksql import explain

from . import config as configuration
from .plan import Call, Draft, draft, keep_code

if TYPE_CHECKING:
    from .backends.base import Backend
    from .taskconfig import TaskConfig


def submit(
    task: TaskConfig,
    *,
    settings: configuration.Config | None = None,
    call: Call | None = None,
    backend: Any = None,
) -> str:
    """Start a task; returns its id. It belongs to nobody then: it runs on when this process ends.

    Raises `ValidationError`, `VolumeNotFound`, `ResourceUnavailable`, `NameConflict`, `SandboxError`, `TaskError` or
    `BackendUnavailable` before anything is started.
    """
    settings = settings or configuration.load()
    chosen = backend_of(backend, settings)
    jobs = chosen.jobs() if chosen is not None else None
    _refuse_read_only_home()
    if jobs is not None:
        from . import places

        made = draft(task, settings, call, here=False)
        return places.start(jobs.choose(made), made)
    with project.guarded(taskstart.code_store()):  # until the register knows that the task needs what is kept there
        made = _made_here(task, settings, call, chosen)
        keep_code(made)
        return taskstart.start(made.wanted, made.payload, gpus=settings.gpus)


def check(task: TaskConfig, settings: configuration.Config) -> None:
    """Raise whatever `submit` would raise on account of the task; nothing is made.

    What only another machine can say is not asked.
    """
    chosen = backend_of(task.backend, settings)
    jobs = chosen.jobs() if chosen is not None else None
    if jobs is None:
        taskstart.check(_made_here(task, settings, None, chosen).wanted, gpus=settings.gpus)
    else:
        jobs.check(draft(task, settings, None, here=False))


def backend_of(backend: Any, settings: configuration.Config) -> Backend | None:
    """The backend that was chosen (None: the configured one); None: this host, as it is."""
    choice = backend if backend is not None else settings.backend
    if choice == "local":
        return None
    from .backends import registry

    return registry.get(choice)


def _made_here(task: TaskConfig, settings: configuration.Config, call: Call | None, backend: Backend | None) -> Draft:
    """A task of this host, in the box of its backend."""
    if backend is None or backend.name == "local":
        return draft(task, settings, call, here=True)
    made = draft(task, settings, call, here=False)
    made.wanted["backend"] = backend.name
    made.wanted["box"] = backend.box(made)
    return made


def run_here(task: TaskConfig, *, settings: configuration.Config) -> tuple[str, str, int | None]:
    """Run a task in this process, on this process's terminal: its state, why, and its exit code."""
    from flowfn_runtime.supervisor import Supervisor

    _refuse_read_only_home()
    with project.guarded(taskstart.code_store()):
        made = draft(task, settings, None, here=True)
        keep_code(made)
        spec = taskstart.complete(made.wanted, gpus=settings.gpus)
        directory, lock = taskstart.register(spec, None)
    if settings.gpus:
        os.environ["FLOW_GPUS"] = settings.gpus
    ended = Supervisor(directory, lock, spec, terminal=True).run()
    return ended.state, ended.reason, ended.exit_code


def _refuse_read_only_home() -> None:
    home = paths.home()
    if os.path.exists(home) and not os.access(home, os.W_OK):
        raise explain(PermissionError(errno.EACCES, "no permission to write, or a read-only file system", home))
