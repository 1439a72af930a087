"""A real Podman for tests, with storage of its own and a base image made without a registry.

The base image is Debian's own, made by debootstrap from the mirror that this machine's apt uses (a minute or two), and
kept with what is built on it beside the environment's other caches, for the next run. Nothing is read from or written
to the user's containers.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from flowfn import Image
from flowfn.backends.container import ContainerBackend

BASE = "localhost/flowfn-test-base:1"  # another number after a change to how it is made
PACKAGES = "python3,python3-pip,python3-venv,ca-certificates"
CERTIFICATES = "/etc/ssl/certs"
WAIT_S = 60.0

STORAGE = Path(sys.prefix) / ".cache" / "test-containers" / "storage"
# Short, for its sockets, and gone when the machine restarts, as Podman wants it.
STATE = Path("/run" if os.getuid() == 0 else os.environ.get("XDG_RUNTIME_DIR", tempfile.gettempdir()))
STATE /= f"flowfn-tests-{hashlib.sha256(bytes(STORAGE)).hexdigest()[:12]}"
# Said to each command, so that no configuration file of the machine's matters: cgroups without systemd; runc, which
# takes them in any version; and no journal.
OPTIONS = [
    f"--root={STORAGE}",
    f"--runroot={STATE}/run",
    f"--tmpdir={STATE}/tmp",
    "--cgroup-manager=cgroupfs",
    "--runtime=runc",
    "--events-backend=none",
]
# Builds reach the package indexes that this machine reaches, as it does.
BUILD = [
    "--network=host",
    "--ulimit=nofile=1024:4096",
    "--ulimit=nproc=4096:4096",
    f"--volume={CERTIFICATES}:{CERTIFICATES}:ro",
    *(
        f"--env={name}={os.environ[name]}"
        for name in ("PIP_CERT", "PIP_INDEX_URL", "SSL_CERT_FILE")
        if name in os.environ
    ),
]


def why_not() -> str | None:
    """Why there can be no containers here, or None."""
    for program in ("podman", "runc", "debootstrap"):
        if shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin") is None:
            return f"there is no {program} (apt-get install podman runc conmon netavark aardvark-dns debootstrap)"
    if os.getuid() != 0:
        return "making a base image by debootstrap takes root"
    debian = _debian_python()
    if debian != f"{sys.version_info[0]}.{sys.version_info[1]}":
        return f"the tests' Python is not that of Debian's base image ({debian or 'none'})"
    return None


def run(*words: str, check: bool = True, **options: Any) -> str:
    """What podman prints."""
    done = subprocess.run(["podman", *OPTIONS, *words], stdout=subprocess.PIPE, text=True, check=check, **options)
    out: str = done.stdout
    return out


def containers() -> set[str]:
    """The names of all containers of the tests, running or not."""
    return set(run("ps", "--all", "--format", "{{.Names}}").split())


def wait_until_gone(name: str) -> None:
    """Return when the container has ended and is removed."""
    run(
        "wait",
        "--condition=removing",
        "--condition=exited",
        name,
        check=False,
        stderr=subprocess.DEVNULL,
        timeout=WAIT_S,
    )
    # Its removal takes a lock, which asking for all containers waits for.
    while name in containers():
        run("wait", name, check=False, stderr=subprocess.DEVNULL, timeout=WAIT_S)


def client_of(place: Path, engine: str, options: list[str]) -> tuple[subprocess.Popen[bytes], str]:
    """A client's program, with a call under way that started more processes; and the name of the call's container."""
    home = place / "home"
    home.mkdir()
    (home / "config.toml").write_text(
        f'backend = "box"\n[backends.box]\ntype = "container"\nimage = "{BASE}"\nnetwork = "host"\n'
        f"engine = '{engine}'\nshare = ['{place}']\nengine_options = {json.dumps(options)}\n"
    )
    (place / "project").mkdir()
    (place / "project" / "program.py").write_text(
        "import flowfn as flow\n"
        "@flow.function(mounts={'/models': 'volume://held'})\n"
        "def work(fifo):\n"
        "    import os, subprocess, time\n"
        "    subprocess.Popen(['setsid', 'sleep', '1000'])\n"
        "    with open(fifo, 'w') as file: file.write(os.uname().nodename)\n"
        "    time.sleep(1000)\n"
        f"work.remote('{place}/fifo')\n"
    )
    os.mkfifo(place / "fifo")
    environ = {**os.environ, "FLOW_HOME": str(home)}
    client = subprocess.Popen([sys.executable, "program.py"], cwd=place / "project", env=environ)
    return client, (place / "fifo").read_text()


def backend(**options: Any) -> ContainerBackend:
    """A backend of this Podman, in the base image unless told."""
    given = {"image": BASE, "network": "host", "engine": "podman", "engine_options": OPTIONS, "build_options": BUILD}
    return ContainerBackend(**{**given, **options})


@functools.cache
def ready() -> str:
    """See that the base image is there; its name."""
    STORAGE.mkdir(parents=True, exist_ok=True)
    (STATE / "tmp").mkdir(parents=True, exist_ok=True)
    with (STORAGE.parent / "lock").open("w") as lock:  # of many test processes one makes it
        fcntl.flock(lock, fcntl.LOCK_EX)
        if subprocess.run(["podman", *OPTIONS, "image", "exists", BASE]).returncode:
            _make()
        for which in (["--filter=label=flowfn.image", "--all"], []):  # what earlier runs built and left
            run("image", "prune", "--force", "--filter=until=48h", *which)
    return BASE


@functools.cache
def with_numpy() -> str:
    """The base image with the tests' own version of numpy, built by the backend; its name."""
    from importlib.metadata import version

    ready()
    maker = backend()
    return maker.images.get(Image.from_registry(BASE).pip_install(f"numpy=={version('numpy')}"), BASE)


def _make() -> None:
    folder = Path(tempfile.mkdtemp(dir=STORAGE.parent))
    codename, site = _mirror()
    environ = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    try:
        command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", codename, str(folder / "root"), site]
        made = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ)
        if made.returncode:
            raise RuntimeError(f"debootstrap failed:\n{made.stdout[-3000:]}")
        with (folder / "root/etc/apt/sources.list").open("w") as sources:
            sources.write(f"deb {site} {codename} main\n")
        shutil.rmtree(folder / "root/var/cache/apt/archives", ignore_errors=True)
        with subprocess.Popen(["tar", "-C", str(folder / "root"), "-c", "."], stdout=subprocess.PIPE) as pack:
            run("import", "--quiet", "-", BASE, stdin=pack.stdout)
        assert pack.returncode == 0
    finally:
        shutil.rmtree(folder)


def _mirror() -> tuple[str, str]:
    """The release's name, and where this machine's apt gets it from."""
    release = dict(line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line)
    codename = release["VERSION_CODENAME"].strip('"')
    listed = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(CODENAME) $(SITE)"], capture_output=True, text=True, check=True
    )
    sites = [line.split()[1] for line in listed.stdout.splitlines() if line.startswith(f"{codename} ")]
    return codename, sites[0] if sites else "http://deb.debian.org/debian"


def _debian_python() -> str:
    found = sorted(Path("/usr/bin").glob("python3.[0-9]*[0-9]"))
    return found[0].name.removeprefix("python") if found else ""
