"""A real Docker for tests: a daemon of its own, on a socket of its own, with Podman's base image."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import podman

from flowfn.backends.container import ContainerBackend

WAIT_S = 60.0
# Nothing of the machine's network is touched: containers use it as it is.
NETWORK = ["--iptables=false", "--ip6tables=false", "--ip-forward=false", "--bridge=none"]


def why_not() -> str | None:
    """Why there can be no daemon here, or None."""
    for program in ("docker", "dockerd"):
        if shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin") is None:
            return f"there is no {program} (apt-get install docker.io)"
    return podman.why_not()  # which makes the base image, and says so of those who are not root


class Docker:
    """One daemon."""

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="docker-test-", dir="/var/tmp"))
        self.options = [f"--host=unix://{self.root}/socket"]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Docker:
        daemon = shutil.which("dockerd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
        assert daemon
        places = [f"--data-root={self.root}/data", f"--exec-root={self.root}/exec", f"--pidfile={self.root}/pid"]
        log = (self.root / "log").open("ab")
        command = [daemon, *self.options, *places, *NETWORK, "--default-ulimit=nofile=20000:20000"]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
        assert self.process.stdout
        for line in self.process.stdout:
            log.write(line)
            if b"API listen on" in line:
                self._drain = subprocess.Popen(["cat"], stdin=self.process.stdout, stdout=log)
                log.close()
                return self
        raise RuntimeError(f"dockerd did not start:\n{(self.root / 'log').read_text()[-3000:]}")

    def load(self, image: str) -> str:
        """Have an image of Podman's; its name."""
        if image not in self.run("images", "--format", "{{.Repository}}:{{.Tag}}").split():
            saved = subprocess.Popen(["podman", *podman.OPTIONS, "save", image], stdout=subprocess.PIPE)
            subprocess.run(["docker", *self.options, "load", "--quiet"], stdin=saved.stdout, check=True)
            assert saved.stdout and saved.wait() == 0
            saved.stdout.close()
        return image

    def run(self, *words: str, check: bool = True) -> str:
        """What docker prints."""
        done = subprocess.run(["docker", *self.options, *words], stdout=subprocess.PIPE, text=True, check=check)
        return done.stdout

    def containers(self) -> set[str]:
        return set(self.run("ps", "--all", "--format", "{{.Names}}").split())

    def wait_until_gone(self, name: str) -> None:
        """Return when the container has ended and is removed."""
        while name in self.containers():
            quiet = {"stderr": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
            subprocess.run(["docker", *self.options, "wait", name], check=False, timeout=WAIT_S, **quiet)  # type: ignore[call-overload]

    def backend(self, **options: Any) -> ContainerBackend:
        given = {"image": podman.BASE, "network": "host", "engine": "docker", "engine_options": self.options}
        return ContainerBackend(**{**given, **options})

    def kill(self) -> None:
        """As a crash would, with the containerd that it has started; containers go on."""
        assert self.process is not None and self.process.stdout
        below = self.root / "exec" / "containerd"
        containerd = int((below / "containerd.pid").read_text())
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(ProcessLookupError):
            gone = os.pidfd_open(containerd)
            signal.pidfd_send_signal(gone, signal.SIGKILL)
            select.select([gone], [], [], WAIT_S)
            os.close(gone)
        for left in (*below.glob("*.sock*"), below / "containerd.pid"):  # where nobody reaps it, it seems to be there
            left.unlink()
        self._drain.wait()
        self.process.stdout.close()
        self.process = None
        (self.root / "pid").unlink(missing_ok=True)

    def remove(self) -> None:
        if self.process is None:
            self.start()
        if left := self.containers():
            self.run("rm", "--force", *left, check=False)
        assert self.process is not None and self.process.stdout
        self.process.terminate()
        self.process.wait()
        self._drain.wait()
        self.process.stdout.close()
        mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
        for place in sorted((place for place in mounts if place.startswith(f"{self.root}/")), reverse=True):
            subprocess.run(["umount", "--lazy", place], check=False)
        shutil.rmtree(self.root, ignore_errors=True)
