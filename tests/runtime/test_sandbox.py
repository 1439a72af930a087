"""Sandboxes that really run, under bubblewrap, as root and as a normal user."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from flowfn_runtime import sandbox
from flowfn_runtime.errors import SandboxError
from flowfn_runtime.sandbox import Bind


@pytest.fixture(autouse=True)
def _needs_bubblewrap() -> None:
    try:
        sandbox.check()
    except SandboxError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A directory as a mount's snapshot is: files, a directory, and links."""
    directory = tmp_path / "data"
    (directory / "sub" / "deep").mkdir(parents=True)
    (directory / "file").write_text("content")
    (directory / "sub" / "leaf").write_text("leaf")
    (directory / "link").symlink_to("sub")
    return directory


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    directory = tmp_path / "volume"
    directory.mkdir()
    (directory / "kept").write_text("kept")
    return directory


def run(script: str, binds: Sequence[Bind] = (), **options: Any) -> subprocess.CompletedProcess[str]:
    command = sandbox.command(["sh", "-c", script], binds, **options)
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def shows(script: str, binds: Sequence[Bind] = (), **options: Any) -> str:
    done = run(script, binds, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_read_only_data_is_readable_and_writing_is_refused(data: Path) -> None:
    bind = Bind(str(data), "/train", True)
    assert shows("cat /train/file /train/sub/leaf /train/link/leaf", [bind]) == "contentleafleaf"
    for script in ("echo x >/train/new", "echo x >/train/file", "rm /train/file", "mkdir /train/sub/new"):
        done = run(script, [bind])
        assert done.returncode != 0
        assert "Read-only file system" in done.stderr
    assert (data / "file").read_text() == "content"


def test_the_hosts_root_is_read_only(data: Path) -> None:
    for path in ("/new", "/usr/new", "/etc/new", "/train-sibling"):
        done = run(f"mkdir {path}", [Bind(str(data), "/train", True)])
        assert done.returncode != 0
        assert "Read-only file system" in done.stderr or "Permission denied" in done.stderr
    assert shows("cat /etc/passwd") == Path("/etc/passwd").read_text().strip()


def test_what_is_written_to_a_writable_bind_stays(volume: Path) -> None:
    shows("cat /models/kept; echo new >/models/new; rm /models/kept", [Bind(str(volume), "/models", False)])
    assert (volume / "new").read_text() == "new\n"
    assert not (volume / "kept").exists()


def test_nothing_is_made_on_the_host_for_targets_it_lacks(data: Path) -> None:
    name = f"flowfn-test-{os.getpid()}"
    targets = [f"/{name}", f"/{name}-2/a/b/c", f"/opt/{name}", f"/srv/{name}/deep", f"/mnt/{name}"]
    before = {path: sorted(os.listdir(path)) for path in ("/", "/opt", "/srv", "/mnt")}
    found = shows(
        "for target in " + " ".join(targets) + "; do cat $target/file; echo; done; ls -a /opt; mkdir /opt/x || true",
        [Bind(str(data), target, True) for target in targets],
    ).splitlines()
    assert found[:5] == ["content"] * 5
    # What else the host has there is still there.
    assert sorted(found[5:]) == sorted([".", "..", name, *before["/opt"]])
    assert {path: sorted(os.listdir(path)) for path in before} == before


def test_targets_that_the_host_has(data: Path) -> None:
    assert shows("cat /srv/file; ls /srv", [Bind(str(data), "/srv", True)]).startswith("content")
    assert shows("cat /usr/share/doc/file", [Bind(str(data), "/usr/share/doc", True)]) == "content"


@pytest.mark.parametrize("backwards", [False, True])
def test_targets_inside_one_another(data: Path, volume: Path, backwards: bool) -> None:
    binds = [
        Bind(str(data), "/train", True),
        Bind(str(volume), "/train/sub/deep", False),  # the snapshot has this one
        Bind(str(volume), "/train/extra/more", False),  # but not this one
        Bind(str(data), "/train/sub/new", True),
        Bind(str(volume), "/train/sub/new/sub/out", False),
        Bind(str(data), "/train/sub/new/sub/out/in", True),  # in a writable bind it is made
    ]
    script = (
        "cat /train/file /train/sub/leaf /train/sub/deep/kept /train/extra/more/kept /train/sub/new/file"
        " /train/sub/new/sub/leaf /train/sub/new/sub/out/kept /train/sub/new/sub/out/in/file; ls /train /train/sub;"
        " echo x >/train/extra/more/x; echo y >/train/sub/new/sub/out/y;"
        " ! mkdir /train/z 2>/dev/null; ! mkdir /train/sub/z 2>/dev/null; ! mkdir /train/extra/z 2>/dev/null"
    )
    found = shows(script, binds[::-1] if backwards else binds)
    assert found.split("\n") == [
        "contentleafkeptkeptcontentleafkeptcontent/train:",
        *("extra", "file", "link", "sub", "", "/train/sub:", "deep", "leaf", "new"),
    ]
    assert sorted(os.listdir(data)) == ["file", "link", "sub"]
    assert sorted(os.listdir(data / "sub")) == ["deep", "leaf"]
    assert sorted(os.listdir(volume)) == ["in", "kept", "x", "y"]


def test_targets_through_and_over_symbolic_links(data: Path, volume: Path) -> None:
    (data / "absolute").symlink_to("/train/sub")
    (data / "up").symlink_to("../train/./sub/../sub")
    for link in ("link", "absolute", "up"):
        binds = [Bind(str(data), "/train", True), Bind(str(volume), f"/train/{link}/new", True)]
        assert shows(f"cat /train/sub/new/kept /train/{link}/new/kept /train/sub/leaf", binds) == "keptkeptleaf"
    binds = [Bind(str(data), "/train", True), Bind(str(volume), "/train/link", True)]
    assert shows("cat /train/link/kept; ls /train/sub", binds) == "keptdeep\nleaf"
    (data / "circle").symlink_to("circle")
    with pytest.raises(SandboxError, match="circle"):
        sandbox.command(["true"], [Bind(str(data), "/train", True), Bind(str(volume), "/train/circle/new", True)])


def test_a_target_may_take_the_place_of_something_else(data: Path, volume: Path) -> None:
    binds = [Bind(str(data), "/train", True), Bind(str(volume), "/train/file", True)]
    assert shows("cat /train/file/kept /train/sub/leaf", binds) == "keptleaf"
    binds = [Bind(str(data), "/train", True), Bind(str(volume / "kept"), "/train/sub", True)]
    assert shows("cat /train/sub /train/file", binds) == "keptcontent"
    binds = [Bind(str(data), "/train", True), Bind(str(volume), "/train/file/below", True)]
    assert shows("cat /train/file/below/kept", binds) == "kept"
    with pytest.raises(SandboxError, match="of another kind"):
        sandbox.command(["true"], [Bind(str(volume), "/out", False), Bind(str(data), "/out/kept", True)])


def test_a_file_can_be_bound(data: Path) -> None:
    assert shows("cat /models/weights.bin", [Bind(str(data / "file"), "/models/weights.bin", True)]) == "content"
    assert shows("cat /etc/hostname", [Bind(str(data / "file"), "/etc/hostname", True)]) == "content"


def test_odd_names(data: Path, tmp_path: Path) -> None:
    odd = tmp_path / "an odd\nname"
    odd.mkdir()
    (odd / "--help").write_text("x")
    (odd / "sub").mkdir()
    Path(os.fsdecode(os.fsencode(odd) + b"/\xff")).write_text("y")
    binds = [Bind(str(odd), "/odd one", True), Bind(str(data), "/odd one/new", True)]
    assert shows("cat '/odd one/--help' '/odd one/new/file'; ls '/odd one' | wc -l", binds) == "xcontent4"


def test_temporary_directories_are_its_own(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("x")
    leak = f"leak-{os.getpid()}"
    found = shows(
        f"for d in /tmp /var/tmp /dev/shm; do echo $d/*; echo x >$d/{leak}; stat -c %a $d; done; ! ls {outside}",
        hide=(),
        readable=(),
    )
    mode = "1777" if os.geteuid() == 0 else "755"
    assert found.split() == ["/tmp/*", mode, "/var/tmp/*", mode, "/dev/shm/*", mode]
    assert not any(os.path.exists(f"{d}/{leak}") for d in ("/tmp", "/var/tmp", "/dev/shm"))


def test_an_older_bubblewrap_will_do(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, data: Path
) -> None:
    programs = tmp_path_factory.mktemp("programs")
    real = shutil.which("bwrap")
    (programs / "bwrap").write_text(
        f"""#!/bin/sh
case " $* " in
*" --version "*) echo bubblewrap 0.4.1; exit ;;
*" --perms "*) echo "bwrap: Unknown option --perms" >&2; exit 1 ;;
esac
exec {real} "$@"
"""
    )
    (programs / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    sandbox._knows_perms.cache_clear()
    try:
        assert shows("cat /train/file; echo x >/tmp/x", [Bind(str(data), "/train", True)]) == "content"
    finally:
        sandbox._knows_perms.cache_clear()


def test_a_disk_can_back_the_temporary_directory(tmp_path: Path) -> None:
    shows("echo x >/tmp/big", [Bind(str(tmp_path), "/tmp", False)], readable=())
    assert (tmp_path / "big").exists()


def test_processes_are_its_own() -> None:
    assert shows("echo $$; ls -d /proc/[0-9]* | wc -l").split() in (["2", "3"], ["2", "4"])


def test_the_flowfn_home_is_hidden_but_for_what_is_bound(flow_home: Path, data: Path) -> None:
    (flow_home / "volumes" / "other").mkdir(parents=True)
    (flow_home / "volumes" / "other" / "secret").write_text("hunter2")
    (flow_home / "volumes" / "mine").mkdir()
    (flow_home / "volumes" / "mine" / "file").write_text("mine")
    bind = Bind(str(flow_home / "volumes" / "mine"), "/models", False)
    script = f"cat /models/file; echo; ls -A {flow_home}; echo x >{flow_home}/own; echo y >{flow_home}/locks/shared"
    for readable in (None, (str(flow_home.parent), str(flow_home))):  # also where the project holds the home
        assert shows(script, [bind], readable=readable) == "mine\nlocks"
    assert not (flow_home / "own").exists()
    assert (flow_home / "locks" / "shared").exists()  # who has which GPU is known inside too


def test_a_home_that_comes_to_be_later_is_hidden_too(flow_home: Path) -> None:
    assert not flow_home.exists()
    with subprocess.Popen(
        sandbox.command(["sh", "-c", f"read line; ls -A {flow_home}"]),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        (flow_home / "volumes").mkdir(parents=True)
        out, _ = process.communicate("go\n", timeout=60)
    assert out == "locks\n"


def test_more_can_be_hidden(data: Path) -> None:
    assert shows("ls -A /srv /etc/ssl", hide=["/srv", "/etc/ssl"]) == "/etc/ssl:\n\n/srv:"


def test_python_and_the_project_stay_readable_wherever_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: Path
) -> None:
    project = tmp_path / "project"  # in /tmp, of which the sandbox has its own
    project.mkdir()
    (project / "mine.py").write_text("value = 42")
    monkeypatch.chdir(project)
    monkeypatch.syspath_prepend(str(project))
    code = (
        "import mine, os, flowfn_runtime.errors\n"
        "print(mine.value, os.getcwd())\n"
        "try: open('new', 'w')\nexcept OSError as error: print(error.strerror)"
    )
    command = sandbox.command([sys.executable, "-c", code], [Bind(str(data), "/train", True)])
    env = {**os.environ, "PYTHONPATH": str(project), "PYTHONDONTWRITEBYTECODE": "1"}
    out = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=60).stdout
    assert out == f"42 {project}\nRead-only file system\n"


def test_the_working_directory(tmp_path: Path, data: Path, volume: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shows("pwd; echo x >made; ls", cwd="/workspace") == "/workspace\nmade"
    assert shows("pwd; echo x >made", cwd="/workspace/", workdir_host=str(volume)) == "/workspace"
    assert (volume / "made").exists()
    assert shows("pwd; ls", [Bind(str(data), "/train", True)], cwd="/train/sub") == "/train/sub\ndeep\nleaf"
    assert shows("pwd", cwd="/usr/lib") == "/usr/lib"
    assert shows("pwd; echo x >made", cwd="/tmp/work") == "/tmp/work"
    assert shows("pwd; echo x >made", cwd="/tmp") == "/tmp"
    assert shows("pwd; echo x >made", cwd=str(tmp_path), readable=()) == str(tmp_path)
    assert not (tmp_path / "made").exists()
    monkeypatch.chdir(tmp_path)
    assert shows("pwd") == str(tmp_path)
    assert shows("pwd", readable=()) == "/"


def test_inherited_descriptors_reach_the_command() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        code = f"import socket; s = socket.socket(fileno={theirs.fileno()}); s.sendall(s.recv(9)[::-1])"
        command = sandbox.command([sys.executable, "-S", "-c", code])
        with subprocess.Popen(command, pass_fds=[theirs.fileno()]) as process:
            theirs.close()
            ours.sendall(b"abc")
            assert ours.recv(9) == b"cba"
            assert ours.recv(9) == b""  # nothing else holds the other end
            assert process.wait(60) == 0


@pytest.mark.parametrize("victim", ["parent", "bwrap"])
def test_a_killed_parent_leaves_nobody_behind(victim: str) -> None:
    read, write = os.pipe()
    # Everything inside holds the pipe's other end; its end of file is the proof that all of it is gone.
    command = sandbox.command(["sh", "-c", "setsid sleep 1000 & (sleep 1000 &) ; echo ready; sleep 1000"])
    code = "import subprocess, sys; subprocess.run(sys.argv[2:], pass_fds=[int(sys.argv[1])])"
    middle = [sys.executable, "-c", code, str(write)] if victim == "parent" else []
    with subprocess.Popen([*middle, *command], pass_fds=[write], stdout=subprocess.PIPE, text=True) as process:
        os.close(write)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.kill()
        assert os.read(read, 1) == b""
    os.close(read)


def test_exit_statuses() -> None:
    assert run("exit 3").returncode == 3
    assert run("kill -SEGV $$").returncode == 128 + signal.SIGSEGV


def test_gpu_nodes_are_there(data: Path) -> None:
    # In a sandbox's own /dev a node can be made without touching the host's; a sandbox inside has to bring it along.
    code = (
        "import os, subprocess; from flowfn_runtime import sandbox\n"
        "for name in ('nvidia0', 'nvidiactl', 'ttyS9'): open('/dev/' + name, 'w').close()\n"
        "os.mkdir('/dev/dri'); open('/dev/dri/renderD128', 'w').close()\n"
        "subprocess.run(sandbox.command(['ls', '/dev', '/dev/dri']), check=True)\n"
        "subprocess.run(sandbox.command(['ls', '/dev'], devices=['/dev/ttyS9']), check=True)\n"
    )
    command = sandbox.command([sys.executable, "-c", code])
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    first, second, third = done.stdout.split("/dev")[1:3] + [done.stdout.rpartition("renderD128")[2]]
    assert "nvidia0\nnvidiactl\n" in first
    assert "ttyS9" not in first
    assert "renderD128" in second
    assert "ttyS9" in third
    assert "nvidia" not in third


def test_a_sandbox_inside_a_sandbox(data: Path) -> None:
    code = (
        "import subprocess; from flowfn_runtime import sandbox; from flowfn_runtime.sandbox import Bind\n"
        "command = sandbox.command(['cat', '/deep/new/file', '/train/file'], [Bind('/train', '/deep/new', True)])\n"
        "subprocess.run(command, check=True)"
    )
    command = sandbox.command([sys.executable, "-c", code], [Bind(str(data), "/train", True)])
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "contentcontent"), done.stderr


AS_USER = """
import os, shutil, subprocess, sys
from flowfn_runtime import sandbox
from flowfn_runtime.sandbox import Bind
os.setgroups([]); os.setgid(64321); os.setuid(64321)  # all is imported: the interpreter may be root's alone
base = sys.argv[1]
data = base + "/cache/data"
os.makedirs(data + "/sub"); open(data + "/file", "w").write("content"); os.chmod(data + "/file", 0o444)
os.makedirs(base + "/volume"); os.makedirs(base + "/home/secret")
sandbox.check()
binds = [Bind(data, "/train", True), Bind(base + "/volume", "/opt/deep/out", False),
         Bind(base + "/volume", "/train/sub/new", False), Bind(data + "/file", "/one", True)]
script = '''
cat /train/file; id -u; id -g; ls -A $FLOW_HOME; echo x >/opt/deep/out/x; cat /train/sub/new/x; echo t >/tmp/t
mkdir /train/no; mkdir /no; mkdir /opt/no; chmod u+w /train/file
for file in /train/file /one; do (echo x >>$file); done; cat /one; grep CapEff /proc/self/status
'''
run = subprocess.run(sandbox.command(["sh", "-c", script], binds), capture_output=True, text=True)
print(run.stdout, run.stderr, os.listdir(base + "/volume"), os.path.exists("/tmp/t"), sep="|")
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user; the other tests ran as a normal one")
def test_a_normal_user(tmp_path_factory: pytest.TempPathFactory) -> None:
    base = Path("/tmp") / f"flowfn-user-{os.getpid()}"  # pytest's own directory is root's alone
    base.mkdir()
    try:
        os.chown(base, 64321, 64321)
        env = {**os.environ, "FLOW_HOME": str(base / "home"), "FLOW_CACHE": str(base / "cache"), "HOME": str(base)}
        done = subprocess.run(
            [sys.executable, "-c", AS_USER, str(base)], env=env, cwd="/", capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        out, err, volume, leaked = done.stdout.strip().split("|")
        assert out.split() == ["content64321", "64321", "locks", "x", "contentCapEff:", "0000000000000000"]
        assert err.count("Read-only file system") == 6  # also of a file that is read-only in itself
        assert volume == "['x']"
        assert leaked == "False"
    finally:
        shutil.rmtree(base)


def test_what_cannot_be_built_is_refused(data: Path) -> None:
    with pytest.raises(SandboxError, match=r"/missing.*at /train.*does not exist"):
        sandbox.command(["true"], [Bind("/missing", "/train", True)])
    for target in ("/", "//", "/proc", "/proc/x", "/dev/../dev/", "/sys", "train", ""):
        with pytest.raises(SandboxError, match="can't be the target"):
            sandbox.command(["true"], [Bind(str(data), target, True)])


def test_a_machine_without_bubblewrap_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sandbox.check.cache_clear()
    (tmp_path / "apt-get").write_text("#!/bin/sh\n")
    (tmp_path / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SandboxError, match="no bwrap on PATH") as caught:
        sandbox.check()
    assert caught.value.hint == "apt-get install bubblewrap"
    (tmp_path / "apt-get").unlink()
    with pytest.raises(SandboxError, match="package manager"):
        sandbox.check()


def test_a_machine_without_user_namespaces_is_told_what_to_allow() -> None:
    # A user namespace in which no further namespace may be made.
    code = "from flowfn_runtime import sandbox; sandbox.check()"
    closed = 'echo 0 >/proc/sys/user/max_user_namespaces && echo 0 >/proc/sys/user/max_mnt_namespaces && exec "$@"'
    done = subprocess.run(
        ["unshare", "-U", "-r", "sh", "-c", closed, "sh", sys.executable, "-c", code], capture_output=True, text=True
    )
    assert "SandboxError: bubblewrap can't make a filesystem here: bwrap: " in done.stderr
    assert "the administrator has to allow user namespaces: sysctl -w user.max_user_namespaces=" in done.stderr


def test_the_environment_inside() -> None:
    given = {"TMPDIR": "/scratch", "MPLCONFIGDIR": "/mine", "A": "1"}
    inside = sandbox.environment(given)
    assert (inside["TMPDIR"], inside["MPLCONFIGDIR"], inside["A"]) == ("/tmp", "/mine", "1")
    assert inside["TRITON_CACHE_DIR"].startswith("/tmp/")
    assert given["TMPDIR"] == "/scratch"
