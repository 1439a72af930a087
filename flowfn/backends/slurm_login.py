"""A Slurm cluster from outside: all of Slurm's commands run on a login node, over one ssh connection.

The first program on the connection is a guard: should the client end, or its network be gone, it cancels the jobs.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import threading
from collections.abc import Sequence

from flowfn.backends import openssh
from flowfn.clock import clock
from flowfn_runtime.errors import BackendUnavailable, FlowError

SESSIONS = 8  # of a server's default of 10 on a connection: the guard's, and a short command's beside
BEAT_S = 5.0  # how often the guard hears that the client is there
SILENCE_S = 60  # after which it believes that the client is gone
MARK = b"flowfn-login "
_numbers = itertools.count(1)

# Arguments: the beginning of the jobs' names, seconds of silence.
_GUARD = """
user=$(id -u)
echo "flowfn-login $user"
limit="timeout $2"
command -v timeout >/dev/null 2>&1 || limit=
while $limit sh -c 'IFS= read -r _'; do :; done
ids=$(squeue -h -u "$user" -o '%j %A' | sed -n "s/^$1-[0-9]* //p")
[ -z "$ids" ] || exec scancel -Q $ids
"""


class Login:
    """The connection to a login node. From any thread."""

    def __init__(self, address: str, config: str | None, prefix: str) -> None:
        self._client = openssh.Client(
            openssh.Address.parse(address.removeprefix("slurm://")), os.path.expanduser(config) if config else None
        )
        self._prefix = prefix  # of the jobs' names
        self._lock = threading.Lock()
        self._guard: subprocess.Popen[bytes] | None = None
        self._socket = ""
        self._uid = ""
        self._sessions = 0  # that last
        self._limit = SESSIONS

    def __str__(self) -> str:
        return str(self._client.address)

    @property
    def uid(self) -> str:
        """Whose jobs these are, there. Connects if need be."""
        self.command([])
        return self._uid

    def command(self, words: Sequence[str]) -> list[str]:
        """The command line here that runs these words there. Connects if need be; raises BackendUnavailable."""
        with self._lock:
            if self._guard is None or self._guard.poll() is not None:
                self._open()
            return self._client.further(self._socket, words)

    def lasting(self, words: Sequence[str]) -> list[str]:
        """The same for a program that goes on: it counts until `left`, and gets a connection of its own if need be."""
        shared = self.command(words)
        with self._lock:
            self._sessions += 1
            return shared if self._sessions <= self._limit else self._client.alone(words)

    def left(self) -> None:
        """One of these has ended."""
        with self._lock:
            self._sessions -= 1

    def explain(self, status: int, said: str) -> FlowError | None:
        """What to raise if it was the connection that failed. A server that allows few sessions is asked for fewer."""
        if openssh.refused_session(said):
            with self._lock:
                self._limit = max(0, min(self._limit, self._sessions) - 1)
            return BackendUnavailable(f"{self} allows no more sessions on one connection")
        if status == 127:
            return BackendUnavailable(
                f"Slurm's commands are not on the PATH of {self}, or not for ssh's shells there:\n{said.strip()}",
                hint=f"is it a login node of the cluster? try: {self._client.by_hand} sinfo",
            )
        return openssh.explain(self._client, status, said)

    def _open(self) -> None:
        self._socket = os.path.join(openssh.sockets_directory(), f"slurm-{os.getpid()}-{next(_numbers)}")
        program = ["sh", "-c", _GUARD, "flowfn-guard", self._prefix, str(SILENCE_S)]
        try:
            guard = subprocess.Popen(
                self._client.first(self._socket, program),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
                bufsize=0,
            )
        except OSError as error:
            raise BackendUnavailable(f"ssh can't be started: {error.strerror}") from None
        assert guard.stdin and guard.stdout and guard.stderr
        said = guard.stdout.readline()
        while said and not said.startswith(MARK):  # a banner
            said = guard.stdout.readline()
        if not said:
            status, words = guard.wait(), guard.stderr.read().decode(errors="replace")
            _close(guard)
            raise self.explain(status, words) or BackendUnavailable(f"logging in to {self} failed:\n{words.strip()}")
        self._uid = said[len(MARK) :].decode().strip()
        threading.Thread(target=_drain, args=(guard,), name="flowfn-login", daemon=True).start()
        self._guard = guard
        clock.later(BEAT_S, lambda: self._beat(guard))

    def _beat(self, guard: subprocess.Popen[bytes]) -> None:
        assert guard.stdin
        try:
            guard.stdin.write(b"\n")
        except (OSError, ValueError):
            return  # it has ended, or was closed
        clock.later(BEAT_S, lambda: self._beat(guard))

    def forget(self) -> None:
        """In a forked child: the connection is the parent's."""
        guard, self._guard = self._guard, None
        self._lock = threading.Lock()
        if guard is not None:
            _close(guard)
            guard.returncode = 0

    def close(self) -> None:
        """Log out. Safe to repeat."""
        with self._lock:
            guard, self._guard = self._guard, None
        if guard is not None:
            guard.kill()
            guard.wait()
            _close(guard)


def _drain(guard: subprocess.Popen[bytes]) -> None:
    """What ssh says meanwhile goes to nobody; a full pipe must not stop it."""
    assert guard.stderr
    try:
        while guard.stderr.read(4096):
            pass
    except (OSError, ValueError):
        pass


def _close(guard: subprocess.Popen[bytes]) -> None:
    for pipe in (guard.stdin, guard.stdout, guard.stderr):
        if pipe is not None:
            try:
                pipe.close()
            except OSError:
                pass
