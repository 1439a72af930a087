"""Tasks on machines that OpenSSH reaches: they are tasks of that machine's own, under its own supervisors.

This client asks for them over sessions with `flowfn_runtime.taskserver`, opened when there is something to ask. So the
task knows nothing of clients: they may end, or lose the network, and ask again later.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flowfn.backends import openssh
from flowfn.backends.jobs import Jobs
from flowfn.backends.ssh_session import RemoteJobs
from flowfn_runtime import taskdb
from flowfn_runtime.errors import BackendUnavailable, ConfigError, FlowError, ResourceUnavailable

if TYPE_CHECKING:
    from flowfn.plan import Draft


class SshJobs(RemoteJobs):
    """Tasks of one host."""

    def __init__(self, place: Mapping[str, Any]) -> None:
        options = {key: place[key] for key in ("config", "connect_timeout", "alive_interval") if key in place}
        super().__init__(place, openssh.Client(openssh.Address.parse(place["address"]), **options))
        self.label = f"ssh://{self._client.address}"

    def there(self, task_id: str) -> str:
        return f"{task_id}r"  # not the same: the host may be this one, with the same register

    # the contract

    def choose(self, draft: Draft) -> Jobs:
        _refuse_image(draft)
        return self

    def check(self, draft: Draft) -> None:
        _refuse_image(draft)
        self._ask({"do": "check", "wanted": self._wanted(draft)})

    def start(self, draft: Draft) -> None:
        self._ask({"do": "start", "wanted": self._wanted(draft)}, draft.payload or b"", draft)

    def address(self, task_id: str) -> str:
        return self._client.address.host

    # within

    def _wanted(self, draft: Draft) -> dict[str, Any]:
        wanted = {**draft.wanted, "id": self.there(draft.wanted["id"]), "box": "sandbox if possible"}
        wanted["depends_on"] = [self.there(task_id) for task_id in wanted["depends_on"]]
        if draft.image is not None:
            wanted["environment"] = draft.image.to_dict()
        return wanted


class SshGroup(Jobs):
    """Tasks of several hosts: each goes to the one with the fewest of ours that has what it needs."""

    def __init__(self, hosts: Sequence[SshJobs]) -> None:
        self.hosts = list(hosts)
        self.label = "ssh"
        self.place = {}

    def close(self) -> None:
        for host in self.hosts:
            host.close()

    def choose(self, draft: Draft) -> Jobs:
        active = [row.place for row in taskdb.elsewhere(None)]
        ordered = sorted(self.hosts, key=lambda host: active.count(json.dumps(dict(host.place), sort_keys=True)))
        errors: list[FlowError] = []
        for host in ordered:
            try:
                host.check(draft)
                return host
            except (ResourceUnavailable, BackendUnavailable) as error:
                errors.append(error)
        if len(errors) == 1:
            raise errors[0]
        raise ResourceUnavailable("none of the hosts takes it: " + "; ".join(error.message for error in errors))

    def check(self, draft: Draft) -> None:
        self.choose(draft)

    def _nobody(self, *_: Any) -> Any:
        raise NotImplementedError("a task is of one host, see `choose`")

    start = states = read = end_of = more = wait = cancel = forget = _nobody  # type: ignore[assignment]


def _refuse_image(draft: Draft) -> None:
    if isinstance(draft.image, str):
        raise ConfigError(
            f"image={draft.image!r}: the ssh backend has no containers",
            hint="say what to install: image=flow.Image.python('3.12').pip_install(...)",
        )
