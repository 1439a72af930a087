"""`flow.Image`: what a function runs in, beside the runtime and the project's files.

An image is a list of steps. On backends with containers they become layers; on hosts without, a virtual environment
that is made once, kept by the digest of the steps, and shared.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from flowfn_runtime.errors import ValidationError, VersionMismatch

_OWN = frozenset({"flowfn", "flow"})  # the runtime brings them along
_VERSION = re.compile(r"\d+\.\d+(\.\d+)?")


class Step(NamedTuple):
    """One step of making an image."""

    op: str  # "pip_install", "uv_sync", "apt_install", "run" or "env"
    args: tuple[str, ...]  # requirements, packages, commands, "NAME=value"
    files: tuple[tuple[str, str], ...] = ()  # names and contents that it needs

    @property
    def title(self) -> str:
        """The step as it was written, shortened, for messages."""
        shown = [_shown(arg) for arg in self.args[:4]] if self.op != "env" else [a.partition("=")[0] for a in self.args]
        more = [f"... {len(self.args) - 4} more"] if len(self.args) > 4 and self.op != "env" else []
        files = [name for name, _ in self.files]
        return f"{self.op}({', '.join(shown + more + files)})"


def _shown(arg: str) -> str:
    option, given, _ = arg.partition("=")
    return f"{option}=..." if given and option.startswith("--") else repr(arg)  # an index's URL may hold a password


@dataclass(frozen=True)
class Image:
    """What a function runs in. Made by `here`, `python`, `from_registry` or `from_dockerfile`, then by further steps.

    >>> import flowfn as flow
    >>> image = flow.Image.python("3.12").pip_install("numpy>=2", "pandas").env(OMP_NUM_THREADS="4")
    >>> image
    Image.python('3.12').pip_install('numpy>=2', 'pandas').env(OMP_NUM_THREADS)
    """

    kind: str  # "venv": made by us; "registry": pulled; "dockerfile": built from one
    source: str  # version of Python; reference of the image; text of the Dockerfile
    steps: tuple[Step, ...] = ()
    directory: str = ""  # of a Dockerfile: its build context

    # making one

    @classmethod
    def here(cls) -> Image:
        """This Python, with the packages of this environment in exactly their versions.

        They are locked by hash where hashes are known: of what was installed from a URL, and of what the project's
        `uv.lock` or `pylock.toml` has in that version. Packages that were installed from a directory (in editable mode
        or not) are left out if they are part of the project, which travels by itself. Raises ValidationError for
        others, which no other machine could install.
        """
        version = f"{sys.version_info[0]}.{sys.version_info[1]}"
        image = cls("venv", version)
        packages = sorted(_installed())
        locked = [package for package in packages if " --hash=" in package]
        pinned = [package for package in packages if " --hash=" not in package]
        # Everything is named, so nothing needs to be resolved; and what is here works together, whatever it says.
        # Those with hashes by themselves: pip wants hashes of all, or of none.
        if locked:
            lines = "".join(f"{package}\n" for package in locked)
            image = image._and(Step("pip_install", ("--no-deps", "--require-hashes"), (("locked.txt", lines),)))
        return image._and(Step("pip_install", ("--no-deps", *pinned))) if pinned else image

    @classmethod
    def python(cls, version: str) -> Image:
        """A Python of that version ("3.12") and nothing else. It has to be the client's, but for the last number."""
        if not isinstance(version, str) or not _VERSION.fullmatch(version):
            raise ValidationError(f"Image.python({version!r}) is not accepted; accepted: a version such as '3.12'")
        return cls("venv", version)

    @classmethod
    def from_registry(cls, reference: str) -> Image:
        """A container image, such as "docker.io/library/python:3.12". It needs Python of the client's version."""
        if not isinstance(reference, str) or not re.fullmatch(r"[\w][\w./:@-]*", reference, re.ASCII):
            raise ValidationError(f"Image.from_registry({reference!r}) is not accepted; accepted: 'name:tag'")
        return cls("registry", reference)

    @classmethod
    def from_dockerfile(cls, path: str | os.PathLike[str], *, context: str | os.PathLike[str] | None = None) -> Image:
        """A container image built from a Dockerfile, in the directory `context` (default: the Dockerfile's own)."""
        text = _text(path)
        directory = os.path.abspath(context) if context is not None else os.path.dirname(os.path.abspath(path))
        return cls("dockerfile", text, (), directory)

    # steps

    def pip_install(
        self, *packages: str, requirements: str | os.PathLike[str] | None = None, options: Iterable[str] = ()
    ) -> Image:
        """Install packages, named as for pip, and those of a requirements file.

        `options` are those of `pip install` and `uv pip install`: `["--extra-index-url=https://example.org/simple"]`.
        """
        options = tuple(options)
        if any(not isinstance(option, str) or not re.match(r"--\w[^\n]*$", option) for option in options):
            raise ValidationError(f"options={list(options)!r} is not accepted; accepted: ['--index-url=URL'] and such")
        for package in packages:
            if not isinstance(package, str) or not package.strip() or "\n" in package or package.startswith("-"):
                raise ValidationError(f"pip_install({package!r}) is not accepted; accepted: 'numpy>=2' and the like")
        files = (("requirements.txt", _text(requirements)),) if requirements is not None else ()
        if not packages and not files:
            raise ValidationError("pip_install() installs nothing; name packages, or a file with requirements=")
        return self._and(Step("pip_install", (*options, *packages), files))

    def uv_sync(self, lock: str | os.PathLike[str] = "uv.lock") -> Image:
        """Install what a `uv.lock` says, exactly; `pyproject.toml` has to lie beside it."""
        project = os.path.join(os.path.dirname(os.path.abspath(lock)), "pyproject.toml")
        return self._and(Step("uv_sync", (), (("pyproject.toml", _text(project)), ("uv.lock", _text(lock)))))

    def apt_install(self, *packages: str) -> Image:
        """Install Debian packages. Where there is no container it is an error if one is missing."""
        for package in packages:
            if not re.fullmatch(r"[a-z0-9][a-z0-9+.:=~-]*", str(package)):
                raise ValidationError(f"apt_install({package!r}) is not accepted; accepted: names of Debian packages")
        return self._and(Step("apt_install", packages))

    def run(self, *commands: str) -> Image:
        """Run shell commands, with the image's Python first on PATH. They must not depend on where they run."""
        return self._and(Step("run", commands))

    def env(self, variables: Mapping[str, str] | None = None, /, **more: str) -> Image:
        """Set variables, for the steps that follow and for the function. They are no place for secrets."""
        both = {**(variables or {}), **more}
        for name, value in both.items():
            if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII) or not isinstance(value, str) or "\n" in value:
                raise ValidationError(f"env({name}=...) is not accepted; accepted: names and lines of text")
        return self._and(Step("env", tuple(f"{name}={value}" for name, value in both.items())))

    def _and(self, step: Step) -> Image:
        return replace(self, steps=(*self.steps, step))

    # for backends

    @property
    def digest(self) -> str:
        """Names the image by all that it is made of."""
        made_of = [self.kind, self.source, self.steps, self.directory]
        return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:32]

    @property
    def variables(self) -> dict[str, str]:
        """What `env` steps set."""
        pairs = (arg.partition("=") for step in self.steps if step.op == "env" for arg in step.args)
        return {name: value for name, _, value in pairs}

    def check_python(self) -> None:
        """Raise VersionMismatch if functions of this client can't run in it."""
        here = f"{sys.version_info[0]}.{sys.version_info[1]}"
        if self.kind == "venv" and ".".join(self.source.split(".")[:2]) != here:
            raise VersionMismatch(
                f"the image has Python {self.source}, and this client has Python {here}",
                hint=f"use Image.python({here!r}), or run this client with Python {self.source}",
            )

    def to_dict(self) -> dict[str, Any]:
        """For `flowfn_runtime.environments`. Raises ValidationError if it is no image for hosts without containers."""
        if self.kind != "venv":
            raise ValidationError(
                f"{self!r} is a container's image, and this backend has no containers",
                hint="say what to install: flow.Image.python('3.12').pip_install(...)",
            )
        self.check_python()
        steps = [{**step._asdict(), "title": step.title} for step in self.steps]
        return {"digest": self.digest, "python": self.source, "steps": steps, "env": self.variables}

    def containerfile(self, base: str | None = None) -> str:
        """The text of a Dockerfile that makes it. `base`: what to start from; default for `python(v)`: python:v-slim.

        The files of `context()` have to be in the build's directory.
        """
        if self.kind == "dockerfile":
            lines = [self.source.rstrip("\n")]
        else:
            default = self.source if self.kind == "registry" else f"docker.io/library/python:{self.source}-slim"
            lines = [f"FROM {base or default}"]
        for number, step in enumerate(self.steps):
            lines += _layer(number, step)
        return "\n".join(lines) + "\n"

    def context(self) -> dict[str, str]:
        """Names and contents of the files that the containerfile copies."""
        return {
            f"flowfn-{number}-{name}": content for number, step in enumerate(self.steps) for name, content in step.files
        }

    def __repr__(self) -> str:
        made = {"venv": "python", "registry": "from_registry", "dockerfile": "from_dockerfile"}[self.kind]
        source = self.source if self.kind != "dockerfile" else os.path.join(self.directory, "...")
        return f"Image.{made}({source!r})" + "".join(f".{step.title}" for step in self.steps)


def _layer(number: int, step: Step) -> Iterator[str]:
    files = [f"flowfn-{number}-{name}" for name, _ in step.files]
    quoted = " ".join(shlex.quote(arg) for arg in step.args)
    if step.op == "env":
        for arg in step.args:
            name, _, value = arg.partition("=")
            yield f"ENV {name}={json.dumps(value)}"
    elif step.op == "apt_install":
        yield (
            f"RUN apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends {quoted} "
            "&& rm -rf /var/lib/apt/lists/*"
        )
    elif step.op == "run":
        yield from (f"RUN {command}" for command in step.args)
    elif step.op == "pip_install":
        yield from (f"COPY {name} /tmp/{name}" for name in files)
        listed = "".join(f" -r /tmp/{name}" for name in files)
        yield f"RUN python3 -m pip install --no-cache-dir --break-system-packages {quoted}{listed}"
    elif step.op == "uv_sync":
        yield f"COPY {files[0]} /opt/flowfn-{number}/pyproject.toml"
        yield f"COPY {files[1]} /opt/flowfn-{number}/uv.lock"
        yield (
            "RUN python3 -m pip install --no-cache-dir --break-system-packages uv "
            f"&& cd /opt/flowfn-{number} && uv export --frozen --no-emit-project -o requirements.txt "
            "&& uv pip install --system --break-system-packages -r requirements.txt"
        )


def _text(path: str | os.PathLike[str]) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except OSError as error:
        raise ValidationError(f"{os.fspath(path)} can't be read: {error.strerror}") from None


def _installed() -> Iterator[str]:
    """This environment's packages as requirements."""
    from importlib import metadata

    seen: set[str] = set()
    known = _locked()
    for distribution in metadata.distributions():
        name = distribution.metadata["Name"]
        key = _normal(name or "")
        if not key or key in seen or key in _OWN:
            continue
        seen.add(key)
        origin = json.loads(distribution.read_text("direct_url.json") or "{}")
        if "dir_info" in origin:
            _check_travels(name, origin["url"])
        elif "vcs_info" in origin:
            vcs = origin["vcs_info"]
            yield f"{name} @ {vcs['vcs']}+{origin['url']}@{vcs['commit_id']}"
        elif origin.get("url", "").startswith(("http://", "https://")):
            yield f"{name} @ {origin['url']}" + _hashes(origin.get("archive_info", {}).get("hashes", {}))
        else:
            found = known.get((key, distribution.version), [])
            here = origin.get("archive_info", {}).get("hashes", {})  # of a file: the index may have the same
            yield f"{name}=={distribution.version}" + (_hashes(here) or "".join(f" --hash={h}" for h in found))


def _hashes(archive: Mapping[str, str]) -> str:
    """Of an installed archive, as pip's option."""
    return f" --hash=sha256:{archive['sha256']}" if "sha256" in archive else ""


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _locked() -> dict[tuple[str, str], list[str]]:
    """The hashes that the lock files of the project have, by name and version."""
    from flowfn import config, userproject

    top = userproject.top(os.path.realpath(os.getcwd()))
    found: dict[tuple[str, str], list[str]] = {}
    for name, packages in (("uv.lock", "package"), ("pylock.toml", "packages")):
        path = os.path.join(top, name)
        if not os.path.exists(path):
            continue
        for package in config.read_toml(path).get(packages, ()):
            files = [*package.get("wheels", ()), *([package["sdist"]] if "sdist" in package else [])]
            hashes = [h for file in files for h in ([file["hash"]] if "hash" in file else [])]
            hashes += [f"sha256:{file['hashes']['sha256']}" for file in files if "sha256" in file.get("hashes", {})]
            found[_normal(package["name"]), package.get("version", "")] = hashes
    return found


def _check_travels(name: str, url: str) -> None:
    """A package installed from a directory has to be part of what travels as the project."""
    from urllib.parse import unquote

    from flowfn import userproject

    directory = os.path.realpath(unquote(url.removeprefix("file://")))
    entries = [os.path.realpath(entry or os.getcwd()) for entry in sys.path]
    roots = userproject.find_roots(entries, os.path.realpath(os.getcwd()))
    inside = any(directory == root or directory.startswith(root + "/") for root in roots)
    if (
        not inside
        and not any(root.startswith(directory + "/") for root in roots)
        and name.replace("-", "_") in sys.modules
    ):
        raise ValidationError(
            f"{name} was installed from {directory}, which is not part of the project, so no other machine can have it",
            hint="run from within the project, or say what to install: flow.Image.python(...).pip_install(...)",
        )
