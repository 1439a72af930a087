"""SSH: a login for each call by hand, with and without a connection that is shared (ControlMaster)."""

from __future__ import annotations

import shlex
import subprocess
import sys

from common import HERE, PeerMissing, Results
from engines_common import By, Engine, measure, workplace


def ssh(results: Results, rounds: int) -> None:
    """All cases, against sshd on loopback."""
    sys.path.insert(0, str(HERE.parent / "tests" / "engines"))
    import sshd  # type: ignore[import-not-found,unused-ignore]

    if reason := sshd.why_not():
        raise PeerMissing(reason)
    server = sshd.Sshd().start()
    try:
        with workplace("bench-ssh-") as place:
            _ssh(results, rounds, server.url, str(server.config), server.python("boto3"), place)
    finally:
        server.remove()


def _ssh(results: Results, rounds: int, url: str, config: str, python: str, place: str) -> None:
    from flowfn.backends.ssh import SshBackend

    shared = ["-o", "ControlMaster=auto", "-o", f"ControlPath={place}/ctl", "-o", "ControlPersist=60"]

    def by(options: list[str]) -> By:
        return lambda program: ["ssh", "-F", config, *options, url, f"{python} -c {shlex.quote(program)}"]

    # A program with one result: the interpreter and the library start here, and a worker there.
    made = f"SshBackend({url!r}, config={config!r}, python={python!r})"
    first = (
        "import flowfn as flow; from flowfn.backends.ssh import SshBackend\n"
        f"assert flow.function(backend={made})(abs).remote(-1) == 1"
    )
    backend = SshBackend(url, config=config, python=python)

    def let_go() -> None:
        """A shared connection has to be there before it can be used: its first result is a login, as without."""
        subprocess.run(["ssh", "-F", config, *shared, "-O", "exit", url], capture_output=True)

    peers = {"ssh": by([]), "ssh shared": by(shared)}
    try:
        measure(results, rounds, Engine("ssh", backend, first, peers, let_go=let_go))
    finally:
        let_go()
        backend.close()
