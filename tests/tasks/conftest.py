from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flowfn.client import Flow
from flowfn.task import Task


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project, which is the working directory."""
    root = tmp_path / "project"
    root.mkdir()
    monkeypatch.chdir(root)
    monkeypatch.setenv("PATH", f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}")
    return root


@pytest.fixture
def client(project: Path) -> Iterator[Flow]:
    """A client in that project; what it leaves behind is ended."""
    with Flow() as flow:
        yield flow
        for task in flow.list_tasks(status=["pending", "running"], limit=None):
            task.cancel().wait()


@pytest.fixture
def completed() -> Callable[[Task], str]:
    """Waits for a task, and gives what it wrote; fails with its log if it did not complete."""

    def check(task: Task) -> str:
        task.wait(60)
        assert task.status == "completed", f"{task!r}\n{task.logs(tail=None)}\n{task.logs(tail=None, stderr=True)}"
        return task.logs(tail=None)

    return check
