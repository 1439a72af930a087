"""The development shell: a task's environment, on the terminal of whoever asks."""

from __future__ import annotations

import shutil
import sys
from typing import Any

from flowfn_runtime.data.spec import DOCKER
from flowfn_runtime.errors import FlowError, ValidationError

from . import config as configuration
from .submit import run_here
from .taskconfig import TaskConfig

DOCKER_VOLUME = "flow-dev-docker"


def run_dev(command: str | None, fields: dict[str, Any], settings: configuration.Config) -> int:
    """Open a shell, or run `command`, where a task with these `TaskConfig` fields would run; returns the exit code."""
    if fields.get("backend") not in (None, "local"):
        raise ValidationError(f"backend={fields['backend']!r}: a development shell is on this host")
    shell = shutil.which("bash") or "/bin/sh"
    fields = {"name": "dev", **fields}
    volumes = list(fields.pop("volumes", None) or ())
    # Shared, so that a second shell doesn't wait for the first.
    volumes.append({"name": DOCKER_VOLUME, "mount_path": DOCKER, "size_gb": 100, "interface": "file"})
    if fields.get("num_instances", 1) == 1:
        fields |= {"volumes": volumes, "allow_docker_cache": True}
    config = TaskConfig(command=[shell, "-i"] if command is None else [shell, "-c", command], **fields)
    state, reason, code = run_here(config, settings=settings)
    if state == "cancelled":
        return 130  # Ctrl-C, as a shell says it
    if code is None:
        raise FlowError(f"the shell was not started: {reason}")
    sys.stdout.flush()
    return code
