"""Virtual environments made of an image's steps: by `uv` where it is there, else by `venv` and pip; kept by digest."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from . import kept, limits, paths
from .errors import BackendError, FlowError, VersionMismatch

KEEP_S = 30 * 86400.0  # one that nobody used for so long may go
TAIL_LINES = 30  # of a failed step's log, for the message

Tell = Callable[..., None]


def ready(image: Mapping[str, Any], tell: Tell, env: Mapping[str, str]) -> tuple[str, int]:
    """The directory of the image's environment, and a descriptor that keeps it there while open. Makes it if need be.

    `tell(log=, step=)` hears what the steps print. `env`: variables beside this process's, such as the credentials of
    a package index. Raises BackendError that names the step that failed, with the end of its log.
    """
    directory = os.path.join(paths.cache(), "environments")
    place = os.path.join(directory, f"{image['digest']}-{_machine()}")

    def make(place: str) -> None:
        Maker(place, image, tell, env).make()
        kept.drop_old(directory, KEEP_S)

    def waits() -> None:
        tell(log="another worker is making this environment\n", step="image")

    return place, kept.get(place, make, waits)


def _machine() -> str:
    """Tells this host's environments from those of others that share its cache and can't use them."""
    here = [os.uname().machine, os.path.realpath(sys.executable), *map(str, sys.version_info[:3])]
    return hashlib.sha256("\n".join(here).encode()).hexdigest()[:8]


class Maker:
    """Makes one environment."""

    def __init__(self, place: str, image: Mapping[str, Any], tell: Tell, env: Mapping[str, str]) -> None:
        self.place = place
        self.python = f"{place}/bin/python"
        self.image = image
        self.tell = tell
        self.uv = shutil.which("uv") or shutil.which("uv", path=os.path.expanduser("~/.local/bin:~/.cargo/bin"))
        self.env = {**os.environ, **env, "VIRTUAL_ENV": place, "PATH": f"{place}/bin:{os.environ.get('PATH', '')}"}
        if not _writable(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")):
            self.env.setdefault("UV_CACHE_DIR", os.path.join(paths.cache(), "uv"))
            self.env.setdefault("PIP_CACHE_DIR", os.path.join(paths.cache(), "pip"))
        self.count = len(image["steps"])

    def make(self) -> None:
        self._create(self.image["python"])
        for number, step in enumerate(self.image["steps"], 1):
            where = f"step {number} of {self.count}, {step['title']}"
            if step["op"] != "env":
                self.tell(log=f"{where}\n", step="image")
            folder = os.path.join(self.place, f".step-{number}")
            os.mkdir(folder)
            for name, content in step["files"]:
                with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
                    file.write(content)
            getattr(self, f"_{step['op']}")(where, folder, step["args"])

    def _create(self, version: str) -> None:
        full = ".".join(map(str, sys.version_info[:3]))
        fits = full == version or full.startswith(f"{version}.")
        if fits and self.uv is None:
            command = [sys.executable, "-m", "venv", self.place]
        else:
            try:
                uv = self.uv or self._get_uv("making the environment")
            except FlowError as error:
                raise VersionMismatch(
                    f"the image has Python {version}, this host has {full} and no uv to get another: {error.message}",
                    hint=f"install Python {version} or uv there",
                ) from None
            options = ["--allow-existing", "--no-project", "--python", sys.executable if fits else version]
            command = [uv, "venv", *options, self.place]
        try:
            self._do("making the environment", command)
        except BackendError as error:
            if fits:
                raise
            raise VersionMismatch(
                f"the image has Python {version}, this host has {full}, and uv can't get the other: {error.message}",
                hint=f"install Python {version} there, or use Image.python({full!r})",
            ) from None

    def _get_uv(self, where: str) -> str:
        """uv for a host that has none, from the package index: into an environment of its own, kept for all."""
        place = os.path.join(paths.cache(), "environments", f"uv-{_machine()}")

        def make(place: str) -> None:
            self._do(where, [sys.executable, "-m", "venv", place], cwd=place)
            self._do(where, [f"{place}/bin/python", "-m", "pip", "install", "--quiet", "uv"], cwd=place)

        os.close(kept.get(place, make))
        return f"{place}/bin/uv"

    def _pip_install(self, where: str, folder: str, args: list[str]) -> None:
        listed = [part for name in sorted(os.listdir(folder)) for part in ("-r", os.path.join(folder, name))]
        options = [arg for arg in args if arg.startswith("-")]
        packages = [arg for arg in args if not arg.startswith("-")]
        # Through a file: an environment of many packages is too long for a command line.
        with open(os.path.join(folder, "packages.txt"), "w", encoding="utf-8") as file:
            file.write("".join(f"{package}\n" for package in packages))
        pip = [self.uv, "pip", "install", "--python", self.python] if self.uv else [self.python, "-m", "pip", "install"]
        self._do(where, [*pip, *options, *listed, "-r", os.path.join(folder, "packages.txt")])

    def _uv_sync(self, where: str, folder: str, args: list[str]) -> None:
        try:
            uv = self.uv or self._get_uv(where)
        except FlowError as error:
            raise BackendError(
                f"building the image failed at {where}: there is no uv, and it can't be installed: {error.message}",
                hint="install uv there",
            ) from None
        self.env["UV_PROJECT_ENVIRONMENT"] = self.place
        sync = [uv, "sync", "--frozen", "--no-install-project", "--inexact", "--project", folder]
        self._do(where, [*sync, "--python", self.python])

    def _apt_install(self, where: str, folder: str, args: list[str]) -> None:
        missing = [name for name in args if not _has_package(name.partition("=")[0])]
        if missing:
            raise BackendError(
                f"building the image failed at {where}: this host has no {', '.join(missing)}, and an environment "
                "without containers can't install Debian packages",
                hint=f"have them installed there (apt-get install {' '.join(missing)}), or use a container backend",
            )

    def _env(self, where: str, folder: str, args: list[str]) -> None:
        for arg in args:
            name, _, value = arg.partition("=")
            self.env[name] = value

    def _run(self, where: str, folder: str, args: list[str]) -> None:
        for command in args:
            self._do(where, ["/bin/sh", "-ec", command], cwd=folder)

    def _do(self, where: str, command: list[str], cwd: str | None = None) -> None:
        tail: deque[str] = deque(maxlen=TAIL_LINES)
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=self.env,
                cwd=cwd or self.place,
                text=True,
                errors="replace",
                # If this process is killed, the next maker begins anew: not before all that this one started has ended.
                pass_fds=kept.making(),
                preexec_fn=functools.partial(limits.set_pdeathsig, signal.SIGKILL),
            )
        except OSError as error:
            raise BackendError(f"building the image failed at {where}: {command[0]}: {error.strerror}") from None
        assert process.stdout
        with process.stdout:
            for line in process.stdout:
                tail.append(line)
                self.tell(log=line, step=where)
        if status := process.wait():
            raise BackendError(f"building the image failed at {where}: status {status}\n{''.join(tail).rstrip()}")


def _writable(directory: str) -> bool:
    """Whether it can be written to, or made."""
    while not os.path.exists(directory) and directory != "/":
        directory = os.path.dirname(directory)
    return os.access(directory, os.W_OK)


def _has_package(name: str) -> bool:
    if shutil.which("dpkg-query") is None:
        return False
    command = ["dpkg-query", "-W", "-f", "${db:Status-Status}", name]
    return subprocess.run(command, capture_output=True, text=True).stdout == "installed"
