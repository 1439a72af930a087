"""A real OpenSSH server for tests: as a machine of its own where network namespaces can be made, else on loopback."""

from __future__ import annotations

import os
import pwd
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from flowfn_runtime.limits import descendants

USER = "flowtest"
BINARY = "/usr/sbin/sshd"
WAIT_S = 60.0  # how long anything is waited for before the test fails


def why_not() -> str | None:
    """Why there can be no server here, or None."""
    for program in (BINARY, "ssh", "ssh-keygen"):
        if shutil.which(program) is None:
            return f"there is no {program} (apt-get install openssh-server openssh-client)"
    if os.getuid() == 0 and _base_python().startswith("/root/"):
        return "there is no Python of this version outside of root's home (apt-get install python3)"
    return None


def login() -> str:
    """Who logs in: as root an unprivileged user, made at the first use; else the user of the tests."""
    if os.getuid() != 0:
        return pwd.getpwuid(os.getuid()).pw_name
    try:
        pwd.getpwnam(USER)
    except KeyError:
        command = ["useradd", "--no-create-home", "--home-dir", "/nonexistent", "--shell", "/bin/sh", USER]
        subprocess.run(command, check=True)
        subprocess.run(["usermod", "-p", "*", USER], check=True)  # no password, and not locked either
    return USER


class Sshd:
    """One server. `url` is its address, `config` the client's configuration, `files` a directory of the login's."""

    def __init__(self, *, hostname: str | None = None, subnet: int = 0, settings: str = "", **environ: str) -> None:
        self.user = login()
        self.root = Path(tempfile.mkdtemp(prefix="sshd-test-", dir="/tmp"))
        self.root.chmod(0o755)
        self.files = self.root / "files"
        self.hostname = hostname
        # Tests that run beside this one have networks of their own.
        beside = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
        subnet += 10 * beside
        self.subnet = subnet
        self.settings = settings
        for directory in (self.files, self.root / "home", self.root / "cache"):
            directory.mkdir(mode=0o700)
            if os.getuid() == 0:
                shutil.chown(directory, self.user)
        self.environ = {"FLOW_HOME": f"{self.root}/home", "FLOW_CACHE": f"{self.root}/cache", **environ}
        self.namespace = f"flowfn-{subnet}" if hostname else None
        self.address = f"10.93.{subnet}.2" if hostname else "127.0.0.1"
        self.port = 22 if hostname else _free_port()
        self.process: subprocess.Popen[str] | None = None
        for name in ("host_key", "key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.root / name], check=True)
        shutil.copy(self.root / "key.pub", self.root / "authorized")
        self.known = self.root / "known_hosts"
        self.config = self.root / "client"
        self.trust()
        self.config.write_text(
            f"Host *\n  IdentityFile {self.root}/key\n  IdentitiesOnly yes\n  UserKnownHostsFile {self.known}\n"
            "  GlobalKnownHostsFile /dev/null\n"
        )

    @property
    def url(self) -> str:
        return f"ssh://{self.user}@{self.address}:{self.port}"

    def trust(self, key: str | None = None) -> None:
        """Let the client know the server's key, or take another one for it."""
        key = key or (self.root / "host_key.pub").read_text()
        name = self.address if self.port == 22 else f"[{self.address}]:{self.port}"
        self.known.write_text(f"{name} {key}")

    def trust_also(self, other: Sshd) -> None:
        """Let this server's client configuration do for the other server as well."""
        with self.known.open("a") as known:
            known.write(other.known.read_text())
        shutil.copy(self.root / "key.pub", other.root / "authorized")

    def log(self) -> str:
        """What the server said since it started."""
        return (self.root / "log").read_text()

    def wait_for(self, path: Path) -> None:
        """Return when the file is there."""
        import ctypes

        inotify = ctypes.CDLL(None, use_errno=True)
        fd = inotify.inotify_init()
        try:
            inotify.inotify_add_watch(fd, os.fsencode(path.parent), 0x100)  # IN_CREATE
            while not path.exists():
                ready, _, _ = select.select([fd], [], [], WAIT_S)
                assert ready, f"{path} did not come"
                os.read(fd, 1 << 16)
        finally:
            os.close(fd)

    def interpreter(self) -> str:
        """A Python that the login can run, of the tests' version."""
        return _base_python()

    def start(self) -> Sshd:
        if self.namespace:
            self._make_namespace()
        Path("/run/sshd").mkdir(exist_ok=True)
        settings = self.root / "sshd_config"
        words = " ".join(f'"{name}={value}"' for name, value in self.environ.items())
        settings.write_text(
            f"Port {self.port}\nListenAddress {self.address}\nHostKey {self.root}/host_key\n"
            f"AuthorizedKeysFile {self.root}/authorized\nPidFile none\nPasswordAuthentication no\nUsePAM no\n"
            f"StrictModes no\nUseDNS no\nMaxStartups 200\nSetEnv {words}\n{self.settings}\n"
        )
        command = [BINARY, "-D", "-e", "-f", str(settings)]
        if self.namespace:
            script = f"hostname {self.hostname} && exec ip netns exec {self.namespace} {' '.join(command)}"
            command = ["unshare", "--uts", "sh", "-c", script]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
        assert self.process.stderr
        log = ""
        for line in self.process.stderr:
            log += line
            if "Server listening on" in line:
                # What it says from here on goes to nobody; a full pipe must not stop it.
                with (self.root / "log").open("w") as file:
                    self._drain = subprocess.Popen(["cat"], stdin=self.process.stderr, stdout=file)
                return self
        raise RuntimeError(f"sshd did not start:\n{log}")

    def stop(self) -> None:
        """End the server and every session of it."""
        if self.process is not None:
            for pid in login_processes(self):
                _kill(pid)
            self.crash()

    def crash(self) -> None:
        """Kill the server with its connections, and nothing that the logins have started."""
        if self.process is not None:
            for pid in [*login_processes(self, "sshd"), self.process.pid]:
                _kill(pid)
            self.process.wait()
            self._drain.kill()
            self._drain.wait()
            assert self.process.stderr
            self.process.stderr.close()
            self.process = None

    def remove(self) -> None:
        self.stop()
        if self.namespace:
            subprocess.run(["ip", "netns", "delete", self.namespace], check=False)
            subprocess.run(["ip", "link", "delete", f"fn{self.subnet}"], check=False, stderr=subprocess.DEVNULL)
        shutil.rmtree(self.root, ignore_errors=True)

    def python(self, *packages: str) -> str:
        """An interpreter that the login can run, of the tests' version, with these packages."""
        place = self.root / "venv"
        if not place.exists():  # tests of one class may come in several groups, each with fixtures of its own
            command = [sys.executable, "-m", "uv", "venv", "-q", "--python", _base_python(), str(place)]
            subprocess.run(command, check=True)
        install = [sys.executable, "-m", "uv", "pip", "install", "-q", "--link-mode", "copy", "--python"]
        subprocess.run([*install, f"{place}/bin/python", *packages], check=True)
        return f"{place}/bin/python"

    def link(self, up: bool) -> None:
        """Plug the machine's network in, or pull it out."""
        subprocess.run(["ip", "link", "set", f"fn{self.subnet}", "up" if up else "down"], check=True)

    def _make_namespace(self) -> None:
        name, outer, inner = self.namespace, f"fn{self.subnet}", f"fi{self.subnet}"
        subprocess.run(["ip", "netns", "delete", str(name)], check=False, stderr=subprocess.DEVNULL)
        for command in (
            f"ip netns add {name}",
            f"ip link add {outer} type veth peer name {inner} netns {name}",
            f"ip address add 10.93.{self.subnet}.1/24 dev {outer}",
            f"ip link set {outer} up",
            f"ip -n {name} address add {self.address}/24 dev {inner}",
            f"ip -n {name} link set {inner} up",
            f"ip -n {name} link set lo up",
        ):
            subprocess.run(command.split(), check=True)


def login_processes(server: Sshd, name: str = "") -> list[int]:
    """The processes that this server's logins have started: they have its FLOW_CACHE. `sshd`: those of its own."""
    marker = f"FLOW_CACHE={server.root}/cache".encode()
    assert server.process
    below = descendants(server.process.pid)
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                program = (entry / "comm").read_text().strip()
                if name == "sshd":
                    if program == "sshd" and int(entry.name) in below:
                        found.append(int(entry.name))
                elif marker in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def wait_until_gone(server: Sshd, *, also_sshd: bool = True) -> None:
    """Return when no process of this server's logins is left. Waits for the end of each, not for time to pass."""
    while processes := login_processes(server) + (login_processes(server, "sshd") if also_sshd else []):
        wait_for_end(processes)


def wait_for_end(processes: list[int]) -> None:
    """Return when these have ended."""
    for pid in processes:
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        with os.fdopen(pidfd, "rb"):
            ended, _, _ = select.select([pidfd], [], [], WAIT_S)
            assert ended, Path(f"/proc/{pid}/cmdline").read_bytes()


def _base_python() -> str:
    """Of the Pythons of the tests' version one that everybody may run: not in root's home."""
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    for candidate in (f"/usr/bin/{version}", f"/usr/local/bin/{version}"):
        if os.path.exists(candidate):
            return candidate
    return os.path.realpath(sys.executable)


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
