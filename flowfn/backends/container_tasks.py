"""Tasks in containers: a supervisor of this host runs them, as it runs all tasks here, and a container is the box.

So a task in a container is in the register, waits for its volumes and GPUs, and is cancelled like any other. The
container is removed when the task has ended, however it does.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from flowfn.backends.jobs import starting
from flowfn.bundle import bundle
from flowfn_runtime import paths
from flowfn_runtime.errors import ResourceUnavailable, ValidationError

if TYPE_CHECKING:
    from flowfn.backends.container import ContainerBackend
    from flowfn.plan import Draft


def box(backend: ContainerBackend, draft: Draft) -> dict[str, Any]:
    """What the supervisor is told of the engine, see `flowfn_runtime.taskcontainer`. Pulls or builds the image."""
    wanted = draft.wanted
    backend.engine.be_sure()  # the task starts without us
    facts = backend.engine.facts()
    host = backend.network == "host"
    if wanted["nodes"] > 1 and not host:
        raise ValidationError(
            f"num_instances={wanted['nodes']}: containers with networks of their own can't meet",
            hint='configure the backend with network = "host"',
        )
    if wanted["memory_bytes"] and "memory" not in facts.limits:
        raise ResourceUnavailable(
            f"memory=: {backend.engine.name} can't limit the memory of a task here (the host's cgroups don't allow it)"
        )
    image = backend.images.get(draft.image, backend.image)
    runtime = bundle().place(os.path.join(paths.cache(), "runtime"))
    return {
        "engine": backend.engine.command,
        "run": backend.task_words(),
        "image": image,
        "call": starting("taskcall", runtime, python=backend.python),
        "docker": facts.docker,
        "publish": not host,
    }
