"""Virtual environments made of an image's steps: by `uv` where it is there, else by `venv` and pip; kept by digest."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from . import kept, paths
from .errors import BackendError, VersionMismatch

KEEP_S = 30 * 86400.0  # one that nobody used for so long may go
TAIL_LINES = 30  # of a failed step's log, for the message

Tell = Callable[..., None]


def ready(image: Mapping[str, Any], tell: Tell, env: Mapping[str, str]) -> tuple[str, int]:
    """The directory of the image's environment, and a descriptor that keeps it there while open. Makes it if need be.

    `tell(log=, step=)` hears what the steps print. `env`: variables beside this process's, such as the credentials of
    a package index. Raises BackendError that names the step that failed, with the end of its log.
    """
    directory = os.path.join(paths.cache(), "environments")
    place = os.path.join(directory, image["digest"])

    def make(place: str) -> None:
        Maker(place, image, tell, env).make()
        kept.drop_old(directory, KEEP_S)

    return place, kept.get(place, make)


class Maker:
    """Makes one environment."""

    def __init__(self, place: str, image: Mapping[str, Any], tell: Tell, env: Mapping[str, str]) -> None:
        self.place = place
        self.python = f"{place}/bin/python"
        self.image = image
        self.tell = tell
        self.uv = shutil.which("uv") or shutil.which("uv", path=os.path.expanduser("~/.local/bin:~/.cargo/bin"))
        self.env = {**os.environ, **env, "VIRTUAL_ENV": place, "PATH": f"{place}/bin:{os.environ.get('PATH', '')}"}
        self.count = len(image["steps"])

    def make(self) -> None:
        self._create(self.image["python"])
        for number, step in enumerate(self.image["steps"], 1):
            where = f"step {number} of {self.count}, {step['title']}"
            folder = os.path.join(self.place, f".step-{number}")
            os.mkdir(folder)
            for name, content in step["files"]:
                with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
                    file.write(content)
            getattr(self, f"_{step['op']}")(where, folder, step["args"])

    def _create(self, version: str) -> None:
        here = f"{sys.version_info[0]}.{sys.version_info[1]}"
        fits = version == here or version == ".".join(map(str, sys.version_info[:3]))
        if self.uv:
            wanted = sys.executable if fits else version
            command = [self.uv, "venv", "--allow-existing", "--no-project", "--python", wanted, self.place]
        elif fits:
            command = [sys.executable, "-m", "venv", self.place]
        else:
            raise VersionMismatch(
                f"the image has Python {version}, this host has {here} and no uv to get another",
                hint=f"install Python {version} or uv there",
            )
        self._do("making the environment", command)

    def _pip_install(self, where: str, folder: str, args: list[str]) -> None:
        listed = [part for name in sorted(os.listdir(folder)) for part in ("-r", os.path.join(folder, name))]
        options = [arg for arg in args if arg.startswith("-")]
        # Through a file: an environment of many packages is too long for a command line.
        with open(os.path.join(folder, "packages.txt"), "w", encoding="utf-8") as file:
            file.write("".join(f"{arg}\n" for arg in args if not arg.startswith("-")))
        pip = [self.uv, "pip", "install", "--python", self.python] if self.uv else [self.python, "-m", "pip", "install"]
        self._do(where, [*pip, *options, *listed, "-r", os.path.join(folder, "packages.txt")])

    def _uv_sync(self, where: str, folder: str, args: list[str]) -> None:
        if not self.uv:
            raise BackendError(f"building the image failed at {where}: there is no uv", hint="install uv there")
        self.env["UV_PROJECT_ENVIRONMENT"] = self.place
        sync = [self.uv, "sync", "--frozen", "--no-install-project", "--inexact", "--project", folder]
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


def _has_package(name: str) -> bool:
    if shutil.which("dpkg-query") is None:
        return False
    command = ["dpkg-query", "-W", "-f", "${db:Status-Status}", name]
    return subprocess.run(command, capture_output=True, text=True).stdout == "installed"
