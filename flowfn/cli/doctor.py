"""`flow doctor`."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

SUMMARY = "say what this machine can do, what it lacks, and how to mend it"
EXAMPLES = """\
  flow doctor                      exit code 0 if all that tasks need is there, 1 if not
  flow doctor --json               for a program
"""


class Finding(NamedTuple):
    """One thing that was looked at."""

    name: str
    state: str  # "ok", "missing" (something needed) or "absent" (something optional)
    detail: str
    mend: str = ""  # the command, or the change, that mends it


def add_arguments(parser: Any) -> None:
    parser.add_argument("--json", action="store_true", help="as JSON")


def run(args: Any) -> int:
    from . import output

    findings = examine()
    bad = [finding for finding in findings if finding.state == "missing"]
    if args.json:
        output.print_json([finding._asdict() for finding in findings])
        return 1 if bad else 0
    marks = {"ok": "ok", "missing": "MISSING", "absent": "-"}
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        print(f"{marks[finding.state]:8}{finding.name:{width}}  {finding.detail}")
        if finding.mend:
            print(f"{'':8}{'':{width}}    {finding.mend}")
    return 1 if bad else 0


def examine() -> list[Finding]:
    """Look at everything that flowfn may use here."""
    return [check() for check in _CHECKS]


def _python() -> Finding:
    return Finding("python", "ok", f"{sys.version.split()[0]} at {sys.executable}")


def _configuration() -> Finding:
    from flowfn import config
    from flowfn_runtime.errors import FlowError

    try:
        loaded = config.load()
    except FlowError as error:
        return Finding("configuration", "missing", error.message, error.hint or "")
    return Finding("configuration", "ok", f"project {loaded.project!r}, backend {loaded.backend!r}")


def _directory(name: str, path: str, variable: str) -> Finding:
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        probe = os.path.join(path, f".doctor-{os.getpid()}")
        os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        os.unlink(probe)
        free = shutil.disk_usage(path).free
    except OSError as error:
        return Finding(name, "missing", f"{path}: {error.strerror}", f"export {variable}=/a/directory/of/yours")
    from .output import size

    if free < 2**30:
        return Finding(name, "missing", f"{path}: only {size(free)} free", "flow cache prune")
    return Finding(name, "ok", f"{path}, {size(free)} free")


def _home() -> Finding:
    from flowfn_runtime import paths

    return _directory("home", paths.home(), "FLOW_HOME")


def _cache() -> Finding:
    from flowfn_runtime import paths

    return _directory("cache", paths.cache(), "FLOW_CACHE")


def _sandbox() -> Finding:
    from flowfn_runtime import sandbox
    from flowfn_runtime.errors import FlowError

    try:
        sandbox.check()
    except FlowError as error:
        return Finding("sandbox", "missing", error.message, error.hint or "")
    return Finding("sandbox", "ok", f"bubblewrap at {shutil.which('bwrap')}: tasks have filesystems of their own")


def _gpus() -> Finding:
    from flowfn import config
    from flowfn_runtime import gpus
    from flowfn_runtime.errors import FlowError

    try:
        there = gpus.inventory(config.load().gpus)
    except FlowError as error:
        return Finding("gpus", "missing", error.message, error.hint or "")
    if there.gpus:
        return Finding("gpus", "ok", str(there))
    return Finding("gpus", "absent", str(there), "declare slots where there is no NVML: export FLOW_GPUS=a100:4")


def _package(name: str, module: str, what: str, extra: str) -> Finding:
    from importlib.util import find_spec

    if find_spec(module) is None:
        return Finding(name, "absent", f"{what}: not installed", f"pip install {extra}")
    return Finding(name, "ok", what)


def _program(name: str, program: str, what: str, mend: str) -> Finding:
    path = shutil.which(program)
    return Finding(name, "ok", f"{what}: {path}") if path else Finding(name, "absent", f"{what}: not installed", mend)


def _file_limit() -> Finding:
    import resource

    soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 1024:
        return Finding("open files", "missing", f"limit {soft}", "ulimit -n 4096")
    return Finding("open files", "ok", f"limit {soft}")


_CHECKS: tuple[Callable[[], Finding], ...] = (
    _python,
    _configuration,
    _home,
    _cache,
    _sandbox,
    _gpus,
    _file_limit,
    lambda: _package("s3", "s3fs", "s3:// through s3fs", "s3fs"),
    lambda: _package("nvml", "pynvml", "nvidia-ml-py, which finds GPUs", "'flowfn[gpu]'"),
    lambda: _program("enter tasks", "nsenter", "nsenter, for flow shell", "apt-get install util-linux"),
    lambda: _program("container", "podman", "podman, for backend='container'", "apt-get install podman"),
    lambda: _program("ssh", "ssh", "OpenSSH, for backend='ssh://...'", "apt-get install openssh-client"),
    lambda: _program(
        "slurm", "srun", "Slurm, for backend='slurm'", "run where srun is, or through backend='ssh://...'"
    ),
    lambda: _package("ray", "ray", "Ray, for backend='ray'", "'flowfn[ray]'"),
)
