"""The program that runs containers, Podman or Docker: which it is, what it can do here, what its messages mean."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

from flowfn.backends.container_memory import Memory
from flowfn_runtime import paths
from flowfn_runtime.errors import BackendUnavailable, ConfigError, FlowError, ResourceUnavailable

ANSWER_S = 60.0  # how long the engine may take to answer a question
INSTALL = "install Podman (apt-get install podman) or Docker (https://docs.docker.com/engine/install)"

# What its messages look like. Compiled when they are needed: most programs never do.
_DOWN = (
    r"(?i)cannot connect to the docker daemon|is the docker daemon running|error during connect"
    r"|cannot connect to podman|unable to connect to podman"
)
_DENIED = r"(?i)permission denied while trying to connect|dial unix .*permission denied"
_NO_IMAGE = (
    r"(?im)image not known|no such image|manifest unknown|name unknown|repository .*(not found|does not exist)"
    r"|pull access denied|requested access to the resource is denied|not found: manifest|short-name|: not found$"
)
_NO_REGISTRY = r"(?i)(dial tcp|lookup|pinging container registry|server misbehaving|i/o timeout|tls: |x509: )[^\n]*"
_NO_PROGRAM = (
    r'(?:exec: |executable file )["`\']?([^"`\':]+)["`\']?:? (?:executable file )?(?:not found|stat |no such file)'
)
_NO_GPU = r"(?i)unresolvable CDI devices[^\n]*|could not select device driver[^\n]*|nvidia-container-cli[^\n]*"
_NO_CGROUP = r"(?i)cgroup controller [`'\"]?(\w+)[^\n]*not available|cgroups?[^\n]*(?:denied|read-only)"
_NO_PATH = r"(?:statfs|bind source path does not exist:|invalid mount config[^\n]*?:) ?(/[^\n:]*)"


class Facts(NamedTuple):
    """What the engine says of itself."""

    docker: bool
    rootless: bool
    limits: frozenset[str]  # what it can limit here: "memory", "cpu" (time), "cpuset" (cores)


class Engine:
    """Podman or Docker on this host."""

    def __init__(self, program: str | None, options: Sequence[str]) -> None:
        self._wanted = program
        self._options = list(options)
        self._lock = threading.Lock()
        self._facts: Facts | None = None
        self._images: set[str] = set()  # that are there
        self.remembered = False  # all that by earlier programs, so that it may not be true any more

    @functools.cached_property
    def memory(self) -> Memory:
        return Memory(self.program, self._options)

    @functools.cached_property
    def program(self) -> str:
        """Its path. Raises BackendUnavailable if there is none."""
        for name in [self._wanted] if self._wanted else ["podman", "docker"]:
            if found := paths.which(name):
                return found
        if self._wanted:
            raise BackendUnavailable(f"there is no {self._wanted} on this host, to run containers", hint=INSTALL)
        raise BackendUnavailable("there is neither podman nor docker on this host, to run containers", hint=INSTALL)

    @property
    def name(self) -> str:
        return os.path.basename(self.program)

    @property
    def command(self) -> list[str]:
        """What begins every command line."""
        return [self.program, *self._options]

    def ask(self, *words: str, timeout: float = ANSWER_S) -> tuple[int, str, str]:
        """Have it do something short: exit status, standard output, standard error."""
        try:
            done = subprocess.run(
                [*self.command, *words], stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout
            )
        except subprocess.TimeoutExpired:
            raise BackendUnavailable(
                f"{self.name} did not answer to `{words[0]}` within {timeout:g} s",
                hint=f"is it well? try: {self.name} ps",
            ) from None
        except OSError as error:
            raise BackendUnavailable(f"{self.program} can't be started: {error.strerror}") from None
        return done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")

    def facts(self) -> Facts:
        """What it is and can do. Asked once, or remembered; raises BackendUnavailable if it does not run."""
        with self._lock:
            if self._facts is None and (words := self.memory.read()):
                self._facts = Facts(words["docker"], words["rootless"], frozenset(words["limits"]))
                self._images = set(words["images"])
                self.remembered = True
            if self._facts is None:
                status, out, errors = self.ask("info", "--format", "{{json .}}")
                try:
                    told = json.loads(out)
                except ValueError:
                    told = {}
                if status or not told or told.get("ServerErrors"):
                    said = "\n".join([errors.strip(), *(told.get("ServerErrors") or [])]).strip()
                    raise self.meaning(said) or BackendUnavailable(f"{self.name} does not work here:\n{said}")
                self._facts = _read(told)
                self._remember()
            return self._facts

    def has(self, image: str) -> bool:
        """Whether an image was there when somebody looked."""
        return image in self._images

    def has_now(self, image: str) -> None:
        """An image is there."""
        with self._lock:
            if self._facts is not None and image not in self._images:
                self._images.add(image)
                self._remember()

    def doubt(self) -> None:
        """Believe nothing that was found out before."""
        with self._lock:
            self._facts, self._images, self.remembered = None, set(), False
            self.memory.forget()

    def be_sure(self) -> None:
        """From here on go by what is found out by this process."""
        if self.remembered:
            self.doubt()

    def _remember(self) -> None:
        facts = self._facts
        assert facts is not None
        words = {"docker": facts.docker, "rootless": facts.rootless, "limits": sorted(facts.limits)}
        self.memory.write({**words, "images": sorted(self._images)})

    def meaning(self, said: str, image: str = "") -> FlowError | None:
        """What to raise of a failure with these words on standard error; None if they are not known."""
        if re.search(_DENIED, said):
            return BackendUnavailable(
                f"{self.name} does not let this user in",
                hint="join its group (sudo usermod -aG docker $USER, then log in anew), or use Podman",
            )
        if re.search(_DOWN, said):
            return BackendUnavailable(
                f"{self.name} is installed, and its service is not running:\n{tail(said)}",
                hint=f"start it: systemctl start {self.name}",
            )
        if image.startswith("localhost/") and (re.search(_NO_REGISTRY, said) or re.search(_NO_IMAGE, said)):
            return BackendUnavailable(
                f"there is no image {image} on this host", hint=f"build it, or check its name: {self.name} images"
            )
        if image and (found := re.search(_NO_REGISTRY, said)):
            return BackendUnavailable(
                f"the image {image} can't be pulled: {found[0].strip()}",
                hint=f"is the registry reachable? try: {self.name} pull {image}",
            )
        if image and re.search(_NO_IMAGE, said):
            return BackendUnavailable(
                f"there is no image {image}, or it may not be pulled:\n{tail(said)}",
                hint=f"check its name and tag; for a private one log in first: {self.name} login",
            )
        if found := re.search(_NO_GPU, said):
            how = "install nvidia-container-toolkit"
            if self.name != "docker":
                how += ", then: nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml"
            return ResourceUnavailable(f"{self.name} can't hand GPUs to containers: {found[0].strip()}", hint=how)
        if found := re.search(_NO_CGROUP, said):
            return ResourceUnavailable(
                f"{self.name} can't limit resources here: {found[0].strip()}",
                hint="leave the limits to flowfn's own runtime: engine_limits = false in the backend's configuration",
            )
        if image and (found := re.search(_NO_PROGRAM, said)):
            return BackendUnavailable(
                f"the image {image} has no {found[1]}",
                hint="use one with a shell and Python, or say where its Python is with python=",
            )
        if found := re.search(_NO_PATH, said):
            return ConfigError(f"{found[1]} can't be shared with a container: it is not on the host of {self.name}")
        return None


def _read(told: dict[str, Any]) -> Facts:
    """Facts of what `info` says, which differs between the two."""
    if host := told.get("host"):
        rootless = bool(host.get("security", {}).get("rootless"))
        there = set(host.get("cgroupControllers") or ())
        if rootless and host.get("cgroupVersion") == "v1":
            there = set()
        return Facts(False, rootless, frozenset(there & {"memory", "cpu", "cpuset"}))
    rootless = any("rootless" in option for option in told.get("SecurityOptions") or ())
    names = {"memory": "MemoryLimit", "cpu": "CpuCfsQuota", "cpuset": "CPUSet"}
    return Facts(True, rootless, frozenset(limit for limit, key in names.items() if told.get(key)))


def tail(said: str, lines: int = 8) -> str:
    """The last lines, for messages; without the log lines of podman that are no errors."""
    kept = [line for line in said.strip().splitlines() if not noise(line)]
    return "\n".join(kept[-lines:])


def noise(line: str) -> bool:
    """Whether it is one of podman's warnings about its host, which are in everything that it says."""
    return line.startswith('time="') and "level=error" not in line and "level=fatal" not in line
