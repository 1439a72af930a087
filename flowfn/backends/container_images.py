"""Images for workers: pulled, or built from the steps of a `flow.Image`; once, with what goes on shown to the user."""

from __future__ import annotations

import os
import re
import subprocess
import threading
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from flowfn.backends import stream
from flowfn.backends.container_engine import Engine, noise, tail
from flowfn_runtime import paths
from flowfn_runtime.errors import BackendError, BackendUnavailable, ConfigError

if TYPE_CHECKING:
    from flowfn.image import Image

REPOSITORY = "localhost/flowfn"  # of the images that are built here
LABEL = "flowfn.image"  # on them: the digest of what they are made of
TAIL_LINES = 30  # of a failed step's log, for the message

# How builders announce a step, or name the one that failed: Podman and Docker's old builder; BuildKit.
_STEP = r"^(?:STEP|Step) \d+/\d+ ?: (.*)$"
_FAILED = r"^ > (?:\[[^\]]*\] )(.*?):?$"


class Images:
    """The images of one engine."""

    def __init__(self, engine: Engine, build_options: Sequence[str]) -> None:
        self._engine = engine
        self._options = list(build_options)
        self._ready: dict[Any, str] = {}
        self._locks: dict[Any, threading.Lock] = {}
        self._lock = threading.Lock()

    def get(self, image: Any, default: str) -> str:
        """What to run: the reference of an image that is there. `default`: for none, and to build `Image.python` on.

        Raises BackendUnavailable if it can't be had, BackendError that names the step of a build that failed.
        """
        if image is not None and not isinstance(image, str) and not hasattr(image, "containerfile"):
            raise ConfigError(f"image={image!r} is no image for containers", hint='pass "name:tag" or a flow.Image')
        key = image or default
        with self._lock:
            lock = self._locks.setdefault(key, threading.Lock())
        with lock:  # of many workers that start at once the first sees to it
            if key not in self._ready:
                self._ready[key] = self._have(key) if isinstance(key, str) else self._made(key, default)
            return self._ready[key]

    def forget(self) -> None:
        """Look anew: somebody removed one."""
        with self._lock:
            self._ready.clear()

    def _have(self, reference: str) -> str:
        if not self._engine.has(reference) and not self._there(reference):
            status, said = self._run(["pull", reference], f"pull {reference}")
            if status:
                raise self._engine.meaning(said, reference) or BackendUnavailable(
                    f"the image {reference} can't be pulled:\n{tail(said)}",
                    hint=f"try: {self._engine.name} pull {reference}",
                )
        self._engine.has_now(reference)
        return reference

    def _there(self, reference: str) -> str:
        """The id of an image, empty if it is not there."""
        status, out, said = self._engine.ask("image", "inspect", "--format", "{{.Id}}", reference)
        if status and (error := self._engine.meaning(said)):
            raise error
        return "" if status else out.strip()

    def _made(self, image: Image, default: str) -> str:
        import hashlib
        import json
        import tempfile
        from dataclasses import replace

        image.check_python()
        if image.steps:
            self._engine.be_sure()  # builds are not tried twice
        if image.kind == "dockerfile":
            # Its context may have changed, so the builder is asked each time; it knows what it has.
            plain = replace(image, steps=())
            base = self._build(plain, plain.containerfile(), image.directory, plain.digest)
            image = replace(image, kind="registry", source=base, directory="")
        elif image.kind == "registry":
            self._have(image.source)
        elif not image.steps and image.source == default:
            return self._have(default)
        if not image.steps:
            return image.source if image.kind == "registry" else self._have(default)
        base = image.source if image.kind == "registry" else self._have(default)
        text = image.containerfile(base)
        files = image.context()
        # Of the base itself, not only its name: a tag may mean another image by now.
        made_of = [text, sorted(files.items()), self._there(base)]
        digest = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:32]
        if self._there(f"{REPOSITORY}:{digest}"):
            return f"{REPOSITORY}:{digest}"
        with tempfile.TemporaryDirectory(dir=_place()) as folder:
            for name, content in files.items():
                with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
                    file.write(content)
            return self._build(image, text, folder, digest)

    def _build(self, image: Image, text: str, folder: str, digest: str) -> str:
        import tempfile

        reference = f"{REPOSITORY}:{digest}"
        with tempfile.NamedTemporaryFile("w", dir=_place(), suffix=".Dockerfile") as file:
            file.write(text)
            file.flush()
            words = ["build", "--tag", reference, "--label", f"{LABEL}={digest}", "--file", file.name]
            status, said = self._run([*words, *self._options, folder], "build")
        if status:
            raise self._failure(image, text, status, said)
        return reference

    def _failure(self, image: Image, text: str, status: int, said: str) -> Exception:
        failed, log = last_step(said)
        where = place(image, text, failed)
        if where is None:
            words = tail(said, TAIL_LINES)
            base = text.partition("FROM ")[2].split()
            known = self._engine.meaning(said, base[0] if base else "the base image")
            return known or BackendError(f"building the image failed: status {status}\n{words}")
        return BackendError(f"building the image failed at {where}: status {status}\n{tail(log, TAIL_LINES)}")

    def _run(self, words: list[str], step: str) -> tuple[int, str]:
        """Have the engine do something long, and show what it says: exit status, and the end of what it said."""
        said: deque[str] = deque(maxlen=400)
        environ = {**os.environ, "BUILDKIT_PROGRESS": "plain"}
        try:
            process = subprocess.Popen(
                [*self._engine.command, *words],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=environ,
                text=True,
                errors="replace",
            )
        except OSError as error:
            raise BackendUnavailable(f"{self._engine.program} can't be started: {error.strerror}") from None
        assert process.stdout
        try:
            with process.stdout:
                for line in process.stdout:
                    if not noise(line):
                        said.append(line)
                        stream.show(self._engine.name, {"log": line, "step": step})
        except BaseException:
            process.kill()
            raise
        finally:
            status = process.wait()
        return status, "".join(said)


def last_step(said: str) -> tuple[str | None, str]:
    """Of a failed build's log: the instruction that failed, if one had begun, and what was said since."""
    lines = said.splitlines()
    for number in reversed(range(len(lines))):
        found = re.match(_STEP, lines[number]) or re.match(_FAILED, lines[number])
        if found:
            return found[1].strip(), "\n".join(lines[number + 1 :])
    return None, said


def place(image: Image, text: str, instruction: str | None) -> str | None:
    """Which step of the image an instruction belongs to, for messages. None: no step, so the base was not to be had."""
    from dataclasses import replace

    if instruction is None or instruction.startswith("FROM "):
        return None
    made = [
        len(replace(image, steps=image.steps[:count]).containerfile("x").splitlines())
        for count in range(len(image.steps) + 1)
    ]
    lines = text.splitlines()
    for number in reversed(range(len(lines))):
        if lines[number].strip() == instruction:
            step = sum(number >= before for before in made)
            if 1 <= step <= len(image.steps):
                return f"step {step} of {len(image.steps)}, {image.steps[step - 1].title}"
    return instruction


def _place() -> str:
    """Where what a build is made of lies while it runs."""
    return paths.private_dir(os.path.join(paths.cache(), "containers"))
