"""OpenSSH as a program: addresses, command lines, and what its messages mean. No I/O but for the sockets' directory."""

from __future__ import annotations

import os
import re
import shlex
import stat
from collections.abc import Sequence
from typing import NamedTuple

from flowfn_runtime import paths
from flowfn_runtime.errors import BackendUnavailable, ConfigError, FlowError

OPENED = b"flowfn-opened"  # said on standard error when a connection can be shared
SOCKET_PATH_BYTES = 80  # of 108 that the kernel allows; ssh adds to it while it makes the socket


# Not by urllib, whose import would delay the start of ssh; nor are the classes below dataclasses.
_ADDRESS = re.compile(r"(?:([^:/?#\[\]]+)@)?(\[[^]\s]+\]|[^@:/?#\[\]\s]+)(?::(\d{0,5}))?/?")


class Address(NamedTuple):
    """Where to log in. What is None is OpenSSH's own configuration's to say."""

    host: str
    user: str | None = None
    port: int | None = None

    @classmethod
    def parse(cls, text: str) -> Address:
        """`host`, `user@host:port`, or the same after `ssh://`. Raises ConfigError."""
        found = _ADDRESS.fullmatch(text.removeprefix("ssh://"))
        if found is None:
            raise ConfigError(
                f"{text!r} is no SSH address", hint="write ssh://user@host:port; keys are OpenSSH's matter"
            )
        user, host, port = found.groups()
        host = host.strip("[]")
        if user and "%" in user:
            from urllib.parse import unquote

            user = unquote(user)
        if host.startswith("-") or (user and user.startswith("-")) or int(port or 0) > 65535:
            raise ConfigError(f"{text!r} is no SSH address: {host!r}, {user!r} or {port!r} can't be")
        return cls(host, user, int(port) if port else None)

    def __str__(self) -> str:
        return (f"{self.user}@" if self.user else "") + self.host + (f":{self.port}" if self.port else "")


class Client(NamedTuple):
    """How to call OpenSSH for one address."""

    address: Address
    config: str | None = None  # a configuration file in place of the user's
    connect_timeout: int = 15  # seconds
    alive_interval: int = (
        5  # seconds between questions whether the other side is there; three without answer are the end
    )

    @property
    def by_hand(self) -> str:
        """The command that a person would type."""
        config = ["-F", self.config] if self.config else []
        port = ["-p", str(self.address.port)] if self.address.port else []
        user = f"{self.address.user}@" if self.address.user else ""
        return shlex.join(["ssh", *config, *port, user + self.address.host])

    def first(self, socket: str, program: Sequence[str]) -> list[str]:
        """Log in, run a program, and let others share the connection by the socket."""
        told = f"LocalCommand=/bin/sh -c 'echo {OPENED.decode()} >&2'"
        shared = ["ControlMaster=yes", f"ControlPath={_escaped(socket)}", "ControlPersist=no"]
        return self._command([*shared, "PermitLocalCommand=yes", told], program)

    def further(self, socket: str, program: Sequence[str]) -> list[str]:
        """Run a program over a connection that is there. Fails if it is not."""
        shared = ["ControlMaster=no", f"ControlPath={_escaped(socket)}", "ProxyJump=none", "ProxyCommand=false"]
        return self._command([*shared, "PermitLocalCommand=no"], program)

    def alone(self, program: Sequence[str]) -> list[str]:
        """Log in and run a program, on a connection of its own."""
        return self._command(["ControlMaster=no", "ControlPath=none", "PermitLocalCommand=no"], program)

    def _command(self, own: list[str], program: Sequence[str]) -> list[str]:
        options = [
            *own,
            "BatchMode=yes",  # never a question; an unknown host key is an error
            f"ConnectTimeout={self.connect_timeout}",
            f"ServerAliveInterval={self.alive_interval}",
            "ServerAliveCountMax=3",
            "ClearAllForwardings=yes",  # those of the user's configuration are for the user's own sessions
            "RemoteCommand=none",
            "ForwardX11=no",
            "LogLevel=INFO",  # the messages are read, see `explain`
        ]
        argv = ["ssh", "-T"]
        if self.config is not None:
            argv += ["-F", self.config]
        for option in options:
            argv += ["-o", option]
        if self.address.port is not None:
            argv += ["-p", str(self.address.port)]
        if self.address.user is not None:
            argv += ["-l", self.address.user]
        return [*argv, "--", self.address.host, "exec " + shlex.join(program)]


def _escaped(path: str) -> str:
    """As ssh takes it: quoted, with % doubled."""
    return '"' + path.replace("%", "%%") + '"'


def sockets_directory() -> str:
    """A private directory whose path is short enough for sockets. Raises BackendUnavailable."""
    candidates = [os.path.join(paths.home(), "run"), f"/tmp/flowfn-{os.getuid()}"]
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        candidates.insert(0, os.path.join(runtime, "flowfn"))
    for path in candidates:
        if len(path.encode()) > SOCKET_PATH_BYTES - 24:
            continue
        try:
            paths.private_dir(path)
            status = os.lstat(path)
        except OSError:
            continue
        # In /tmp anybody may have made it, to have our connections.
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077:
            return path
    raise BackendUnavailable(
        f"there is no private directory for ssh's sockets: {', '.join(candidates)}", hint="set XDG_RUNTIME_DIR"
    )


def refused_session(said: str) -> bool:
    """Whether the server wants no further session on this connection (its MaxSessions)."""
    return "Session open refused by peer" in said or "session request failed" in said


def lost_connection(said: str) -> bool:
    """Whether there is no shared connection any more."""
    return "UNKNOWN port" in said or "Control socket connect" in said or "mux_client" in said


_MEANINGS = (
    (
        r"REMOTE HOST IDENTIFICATION HAS CHANGED",
        "the host key of {a} is another one than before: this may be another machine, or somebody in between",
        "if the change is known and right: ssh-keygen -R {k}, then {c} once by hand",
    ),
    (
        r"Host key verification failed|No .* host key is known",
        "the host key of {a} is not known here, and is never accepted unseen",
        "run {c} once by hand, and compare the fingerprint",
    ),
    (
        r"Permission denied \(([^)]*)\)",
        "{a} does not let this user in ({1})",
        "is the key in the agent (ssh-add -l), or named by IdentityFile? Try by hand: {c}",
    ),
    (
        r"Could not resolve hostname",
        "there is no host {h}: its name can't be resolved",
        "check the spelling, and the Host entries of ~/.ssh/config",
    ),
    (r"Connection refused", "{a} refuses connections: no SSH server listens there", "is the port right? Try: {c}"),
    (
        r"No route to host|Network is unreachable",
        "{a} can't be reached: there is no route to it",
        "is the network or VPN up, and the host running?",
    ),
    (
        r"[Tt]imed out|banner exchange|Timeout, server",
        "{a} does not answer",
        "is the host running, and does a firewall let SSH through?",
    ),
    (
        r"Too many authentication failures",
        "{a} refused: too many keys were tried",
        "name the right one with IdentityFile, and set IdentitiesOnly yes",
    ),
    (r"Bad configuration option|terminating, \d+ bad", "ssh refuses its configuration file", "mend it: {c}"),
    (r"Can't open user config file ([^\n]*)", "ssh can't read its configuration file {1}", "is config= right?"),
    (r"Connection (?:closed|reset) by|kex_exchange", "{a} closed the connection before logging in", "try by hand: {c}"),
)


def explain(client: Client, status: int, said: str) -> FlowError | None:
    """What to raise if ssh itself failed: its exit status is 255 then. Or if there is no such program there."""
    address = client.address
    if status in (126, 127):  # the shell's there
        words = said.strip().rpartition("\n")[2]
        return BackendUnavailable(
            f"{address} can't start what was to run there: {words}",
            hint="is python= a Python that is there? Without it, one is looked for",
        )
    if status != 255:
        return None
    known_as = f"'[{address.host}]:{address.port}'" if address.port not in (None, 22) else address.host
    values = {"a": str(address), "h": address.host, "c": client.by_hand, "k": known_as}
    for pattern, message, hint in _MEANINGS:
        if found := re.search(pattern, said):
            text = message.replace("{1}", found[1].strip() if found.groups() else "").format(**values)
            return BackendUnavailable(text, hint=hint.format(**values))
    return BackendUnavailable(f"ssh to {address} failed:\n{said}", hint=f"try by hand: {client.by_hand}")
