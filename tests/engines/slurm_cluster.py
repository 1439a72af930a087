"""A real Slurm for tests: one slurmctld and three slurmd on this machine, on loopback, with files of their own.

As a program it stays until its standard input ends, and prints SLURM_CONF.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flowfn as flow

ACCOUNTING = ("sacct", "slurmdbd", "mariadbd", "mariadb-install-db")
PROGRAMS = ("slurmctld", "slurmd", "srun", "squeue", "sinfo", "scancel", "scontrol", "sbatch")
PACKAGES = "apt-get install --no-install-recommends slurm-wlm slurmdbd mariadb-server"
START_S = 30.0
# Of a cluster with a node that is apart; tests that run beside this one have networks of their own.
_BESIDE = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
NETWORK, LINK = f"flowfn-slurm-{_BESIDE}", f"fnslurm{_BESIDE}"
CONTROLLER, AWAY = f"10.94.{_BESIDE}.1", f"10.94.{_BESIDE}.2"


def why_not(*, accounting: bool = False) -> str | None:
    """Why there can be no Slurm here, or None."""
    if missing := [program for program in PROGRAMS + ACCOUNTING * accounting if find(program) is None]:
        return f"there is no {missing[0]} ({PACKAGES})"
    return None if os.getuid() == 0 else "only root can start slurmd, and make device files for its GPUs"


def find(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")


class SlurmCluster:
    """n1 has two a100, n2 an h100, n3 no GPU. Partitions: main (all, the default), cpu (n3), and physics, which is for
    an account of that name only. A preempting partition `urgent` takes nodes from `main`."""

    CPUS = 16
    MEMORY_MIB = 16000

    def __init__(self, *, apart: bool = False, accounting: bool = False) -> None:
        """`apart`: n3 is in a network of its own, with a link that can be cut. `accounting`: there is `sacct`, and the
        controller forgets a job two seconds after its end."""
        self.apart = apart
        self.accounting = Accounting() if accounting else None
        self.root = Path(tempfile.mkdtemp(prefix="slurm-test-", dir="/tmp"))
        self.root.chmod(0o755)
        self.conf = self.root / "slurm.conf"
        self.environ = {"SLURM_CONF": str(self.conf)}
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> SlurmCluster:
        if self.apart:
            self._make_network()
        ports = _free_ports(4)
        for number in range(2):
            os.mknod(self.root / f"nvidia{number}", 0o20666, os.makedev(1, 3))
        host = socket.gethostname().partition(".")[0]
        user = pwd.getpwuid(os.getuid()).pw_name
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={host} NodeAddr={self._address(name)} Port={port} CPUs={self.CPUS} "
            f"RealMemory={self.MEMORY_MIB} {gres} State=UNKNOWN"
            for name, port, gres in zip(
                ("n1", "n2", "n3"), ports[1:], ("Gres=gpu:a100:2", "Gres=gpu:h100:1", ""), strict=True
            )
        )
        self.conf.write_text(
            f"""
ClusterName=flowtest
SlurmctldHost={host}({CONTROLLER if self.apart else "127.0.0.1"})
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
StateSaveLocation={self.root}/state
SlurmdSpoolDir={self.root}/spool.%n
SlurmctldPidFile={self.root}/slurmctld.pid
SlurmdPidFile={self.root}/slurmd.%n.pid
SlurmctldLogFile={self.root}/slurmctld.log
SlurmdLogFile={self.root}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
{self._account()}
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=CANCEL
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
GresTypes=gpu
DefMemPerCPU=500
KillWait=2
SlurmdTimeout={30 if self.apart else 6}
MessageTimeout=5
{nodes}
PartitionName=main Nodes=n[1-3] Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=cpu Nodes=n3 MaxTime=60 State=UP PriorityTier=1
PartitionName=urgent Nodes=n3 State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=physics Nodes=n3 AllowAccounts=physics State=UP PriorityTier=1
"""
        )
        (self.root / "gres.conf").write_text(
            f"NodeName=n1 Name=gpu Type=a100 File={self.root}/nvidia[0-1]\n"
            f"NodeName=n2 Name=gpu Type=h100 File={self.root}/nvidia0\n"
        )
        (self.root / "state").mkdir()
        if self.accounting is not None:
            self.accounting.serve(self.environ)
        self.start_controller(wait=False)
        for name in ("n1", "n2", "n3"):
            self.start_node(name)
        self._wait_until_up()
        return self

    def _account(self) -> str:
        """What the configuration says of accounting, which runs from here on."""
        if self.accounting is None:
            return "AccountingStorageType=accounting_storage/none"
        port = self.accounting.start(self.root)
        where = f"AccountingStorageHost=127.0.0.1\nAccountingStoragePort={port}"
        return f"AccountingStorageType=accounting_storage/slurmdbd\n{where}\nMinJobAge=2"

    def options(self, **more: Any) -> flow.Slurm:
        """Of workers here, whose files go with the cluster's."""
        return flow.Slurm(**{"workers": 3, "cache": f"{self.root}/cache", "home": f"{self.root}/home", **more})

    def start_node(self, name: str) -> None:
        """Start the daemon of a node."""
        away = ["nsenter", f"--net=/run/netns/{NETWORK}"] if self.apart and name == "n3" else []
        self._spawn("slurmd", "-D", "-N", name, label=name, before=away)

    def link(self, up: bool) -> None:
        """Plug n3's network in, or pull it out."""
        subprocess.run(["ip", "link", "set", LINK, "up" if up else "down"], check=True)

    def _address(self, name: str) -> str:
        if not self.apart:
            return "127.0.0.1"
        return AWAY if name == "n3" else CONTROLLER

    def _make_network(self) -> None:
        self._remove_network()
        for command in (
            f"ip netns add {NETWORK}",
            f"ip link add {LINK} type veth peer name {LINK}n netns {NETWORK}",
            f"ip address add {CONTROLLER}/24 dev {LINK}",
            f"ip link set {LINK} up",
            f"ip -n {NETWORK} address add {AWAY}/24 dev {LINK}n",
            f"ip -n {NETWORK} link set {LINK}n up",
            f"ip -n {NETWORK} link set lo up",
        ):
            subprocess.run(command.split(), check=True)

    def _remove_network(self) -> None:
        for command in (f"ip netns delete {NETWORK}", f"ip link delete {LINK}"):
            subprocess.run(command.split(), check=False, stderr=subprocess.DEVNULL)

    def start_controller(self, *, wait: bool = True) -> None:
        """Start the controller, which goes on where a former one ended."""
        self._spawn("slurmctld", "-D")
        if wait:
            self._wait_until_up()

    def stop_controller(self) -> None:
        """End the controller as for a restart: it saves what it knows."""
        controller = self.daemons.pop("slurmctld")
        controller.terminate()
        controller.wait()

    def kill_controller(self) -> None:
        """End the controller, as if it had crashed."""
        controller = self.daemons.pop("slurmctld")
        controller.kill()
        controller.wait()

    def _spawn(self, program: str, *arguments: str, label: str = "", before: Sequence[str] = ()) -> None:
        path = find(program)
        assert path
        self.daemons[label or program] = subprocess.Popen(
            [*before, path, *arguments],
            env={**os.environ, **self.environ},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _wait_until_up(self) -> None:
        deadline = time.monotonic() + START_S
        while not set((states := self.states()).values()) <= {"idle", "mixed", "allocated"} or len(states) != 3:
            dead = [name for name, daemon in self.daemons.items() if daemon.poll() is not None]
            if dead or time.monotonic() > deadline:
                logs = "\n".join(path.read_text()[-2000:] for path in self.root.glob("*.log"))
                raise RuntimeError(f"Slurm did not start: {dead or states}\n{logs}")
            time.sleep(0.05)  # its daemons report to nobody

    def states(self) -> Mapping[str, str]:
        """The nodes as the controller sees them."""
        lines = self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T", check=False).splitlines()
        return dict(line.split() for line in lines if len(line.split()) == 2)

    def run(self, *argv: str, check: bool = True) -> str:
        """What one of Slurm's commands prints."""
        done = subprocess.run(
            argv, env={**os.environ, **self.environ}, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
        assert not check or done.returncode == 0, f"{argv}: {done.stderr}"
        return done.stdout

    def jobs(self) -> list[str]:
        """The numbers of the jobs that wait or run."""
        return self.run("squeue", "-h", "-t", "pending,running,suspended", "-o", "%A").split()

    def kill_node(self, name: str) -> None:
        """End a node as if its power had failed: its daemon, and what runs there."""
        daemon = self.daemons.pop(name)
        steps = self._steps(name)
        for pid in list(steps):  # the slurmstepd above a batch script has no such variable
            parent = _parent(pid)
            if Path(f"/proc/{parent}/comm").read_text().startswith("slurmstepd") and parent not in steps:
                steps.append(parent)
        for number in (signal.SIGSTOP, signal.SIGKILL):  # all at one moment: none sees another's end
            for pid in (daemon.pid, *steps):
                _kill(pid, number)
        daemon.wait()

    def _steps(self, name: str) -> list[int]:
        """The processes of the jobs on a node, and the slurmstepd above them."""
        marker = f"SLURMD_NODENAME={name}".encode()
        conf = f"SLURM_CONF={self.conf}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    environ = (entry / "environ").read_bytes().split(b"\0")
                except OSError:
                    continue
                if marker in environ and conf in environ:
                    found.append(int(entry.name))
        return found

    def workers(self, name: str) -> list[int]:
        """The processes on a node that execute calls: children of the runtime's host, and leaders of a session."""
        steps = set(self._steps(name))
        parents = {pid: _parent(pid) for pid in steps}
        return [pid for pid in steps if parents[pid] in steps and os.getsid(pid) == pid]

    def step_daemon(self, pid: int) -> int:
        """The slurmstepd above a process."""
        while not Path(f"/proc/{pid}/comm").read_text().startswith("slurmstepd"):
            pid = _parent(pid)
        return pid

    def stop(self) -> None:
        self.run("scancel", "-Q", "--user", str(os.getuid()), "--signal=KILL", check=False)
        for name in ("n1", "n2", "n3"):
            for pid in self._steps(name):
                _kill(pid)
        for daemon in self.daemons.values():
            daemon.kill()
            daemon.wait()
        self.daemons.clear()
        if self.accounting is not None:
            self.accounting.stop()

    def remove(self) -> None:
        self.stop()
        if self.apart:
            self._remove_network()
        shutil.rmtree(self.root, ignore_errors=True)


class Accounting:
    """Slurm's accounting: slurmdbd, and a MariaDB whose files, socket and port are its own."""

    def __init__(self) -> None:
        self.daemons: list[subprocess.Popen[bytes]] = []

    def start(self, root: Path) -> int:
        """Make and start the database; returns the port where slurmdbd will answer."""
        self.root = root
        self.port, database = _free_ports(2)
        data = f"--datadir={root}/db"
        small = ["--innodb-buffer-pool-size=16M", "--innodb-log-file-size=4M", "--innodb-flush-log-at-trx-commit=0"]
        user = f"--user={pwd.getpwuid(os.getuid()).pw_name}"
        make = ["--no-defaults", data, user, "--skip-test-db", "--auth-root-authentication-method=normal", *small]
        subprocess.run([str(find("mariadb-install-db")), *make], check=True, capture_output=True)
        (root / "db.sql").write_text(
            "CREATE DATABASE accounts;\nGRANT ALL ON accounts.* TO slurm@'127.0.0.1' IDENTIFIED BY 'slurm';\n"
        )
        files = [f"--socket={root}/db.socket", f"--pid-file={root}/db.pid", f"--log-error={root}/db.log"]
        net = ["--bind-address=127.0.0.1", f"--port={database}", "--skip-name-resolve", f"--init-file={root}/db.sql"]
        self._spawn(["mariadbd", "--no-defaults", data, user, *small, *files, *net], {})
        conf = root / "slurmdbd.conf"
        conf.touch(mode=0o600)
        conf.write_text(
            f"AuthType=auth/none\nDbdHost=localhost\nDbdAddr=127.0.0.1\nDbdPort={self.port}\n"
            f"SlurmUser={pwd.getpwuid(os.getuid()).pw_name}\nPidFile={root}/slurmdbd.pid\n"
            f"LogFile={root}/slurmdbd.log\nStorageType=accounting_storage/mysql\nStorageHost=127.0.0.1\n"
            f"StoragePort={database}\nStorageUser=slurm\nStoragePass=slurm\nStorageLoc=accounts\n"
        )
        _wait_for(root / "db.log", "ready for connections")
        return self.port

    def serve(self, environ: Mapping[str, str]) -> None:
        """Start slurmdbd, by Slurm's configuration."""
        self._spawn(["slurmdbd", "-D"], environ)
        _wait_for(self.root / "slurmdbd.log", "started")
        deadline = time.monotonic() + START_S
        while not _listens(self.port):  # it says so before it listens
            assert time.monotonic() < deadline, (self.root / "slurmdbd.log").read_text()
            time.sleep(0.02)

    def _spawn(self, command: list[str], environ: Mapping[str, str]) -> None:
        command[0] = str(find(command[0]))
        null = subprocess.DEVNULL
        env = {**os.environ, **environ}
        self.daemons.append(
            subprocess.Popen(command, env=env, stdin=null, stdout=null, stderr=null, start_new_session=True)
        )

    def stop(self) -> None:
        for daemon in reversed(self.daemons):
            daemon.kill()
            daemon.wait()
        self.daemons.clear()


def _listens(port: int) -> bool:
    with socket.socket() as visitor:
        return visitor.connect_ex(("127.0.0.1", port)) == 0


def _wait_for(log: Path, words: str) -> None:
    """Return when a daemon has said so in its log."""
    deadline = time.monotonic() + START_S
    while not log.exists() or words not in log.read_text(errors="replace"):
        assert time.monotonic() < deadline, log.read_text(errors="replace") if log.exists() else log
        time.sleep(0.02)


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def _kill(pid: int, number: int = signal.SIGKILL) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def main() -> None:
    if (missing := why_not()) is not None:
        print(missing, flush=True)
        sys.exit(1)
    cluster = SlurmCluster()
    try:
        cluster.start()
        print(f"SLURM_CONF={cluster.conf}", flush=True)
        sys.stdin.read()
    finally:
        cluster.remove()


if __name__ == "__main__":
    main()
