"""The contract suite checks that what a backend says it can't do is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from flowfn.backends.local import LocalBackend
from flowfn.testing import BackendContract
from flowfn_runtime.errors import ConfigError


class Refusing(LocalBackend):
    def jobs(self) -> None:
        raise ConfigError("this backend takes no command=, num_instances= or ports=")


def suite(backend: LocalBackend, feature: str) -> BackendContract:
    made = BackendContract()
    made.unsupported, made._backend, made._record = {feature}, backend, lambda name, value: None  # type: ignore[misc]
    return made


@pytest.mark.parametrize(
    ("feature", "case"),
    [("commands", "test_a_command"), ("nodes", "test_a_command_on_several_nodes"), ("ports", "test_a_port_of_a_task")],
)
def test_tasks_that_are_not_to_be_had(feature: str, case: str, flow_home: Path) -> None:
    getattr(suite(Refusing(), feature), case)(None, None, None)


def test_a_backend_that_lacks_something_and_says_nothing(flow_home: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        suite(LocalBackend(), "commands").test_a_command(None, None, None)  # type: ignore[arg-type]
