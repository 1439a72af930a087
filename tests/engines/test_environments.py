"""Images on hosts without containers: environments that are built on a real SSH host, and on nodes of a real Slurm."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from slurm_cluster import SlurmCluster
from sshd import Sshd, wait_for_end

import flowfn as flow
from flowfn.backends.base import Backend
from flowfn.backends.slurm import SlurmBackend
from flowfn.backends.ssh import SshBackend

VERSION = f"{sys.version_info[0]}.{sys.version_info[1]}"
PACKAGE, RELEASE = "pyfiglet", "1.0.2"  # small, of pure Python, and nothing that this client has


def uv() -> str:
    from uv import find_uv_bin

    path: str = find_uv_bin()
    return path


def _reach() -> dict[str, str]:
    """As this machine reaches the package index, so does a host."""
    names = ("SSL_CERT_FILE", "PIP_CERT", "PIP_INDEX_URL", "UV_INDEX_URL", "UV_DEFAULT_INDEX", "UV_SYSTEM_CERTS")
    return {name: os.environ[name] for name in names if name in os.environ}


class Place:
    """Where workers run, as the tests of environments see it."""

    def __init__(self, make: Callable[[], Backend], cache: Path, files: Path) -> None:
        self.make = make
        self.cache = cache
        self.files = files  # a directory that workers may write to
        self.environments = cache / "environments"


@pytest.fixture(scope="module")
def host() -> Iterator[Sshd]:
    """An SSH host with uv on its PATH."""
    import engines
    import sshd

    engines.need(sshd.why_not())
    server = Sshd(**_reach())
    (server.root / "bin").mkdir()
    shutil.copy(uv(), server.root / "bin" / "uv")
    server.environ["PATH"] = f"/usr/bin:/bin:{server.root}/bin"
    server.start()
    yield server
    server.remove()


@pytest.fixture(params=["ssh", "slurm"])
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    made: list[Backend] = []
    if request.param == "ssh":
        server: Sshd = request.getfixturevalue("host")
        cache, files = server.root / "cache", server.files

        def make() -> Backend:
            made.append(SshBackend(server.url, config=str(server.config)))
            return made[-1]

    else:
        cluster: SlurmCluster = request.getfixturevalue("slurm_cluster")
        cache, files = cluster.root / "cache", cluster.root / "files"
        files.mkdir(exist_ok=True)

        def make() -> Backend:
            made.append(SlurmBackend(cluster.options()))
            return made[-1]

    for left in files.iterdir():
        left.unlink()
    yield Place(make, cache, files)
    flow.shutdown()
    for backend in made:
        backend.close()


def test_a_package_that_this_client_lacks(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ImportError):
        __import__(PACKAGE)

    image = flow.Image.python(VERSION).pip_install(f"{PACKAGE}=={RELEASE}").run("echo built >> $VIRTUAL_ENV/count")

    def draw() -> tuple[str, str]:
        import sys

        import pyfiglet  # type: ignore[import-not-found]

        return str(pyfiglet.figlet_format("flow")), sys.prefix

    drawn, prefix = flow.function(backend=place.make(), image=image)(draw).remote()
    assert "_" in drawn
    assert Path(prefix).parent == place.environments
    shown = capfd.readouterr().err
    assert f"step 1 of 2, pip_install('{PACKAGE}=={RELEASE}')" in shown  # progress
    assert f"{PACKAGE}=={RELEASE}" in shown.replace("step 1 of 2", "")  # and the installer's own log
    # Another client, as it were: nothing is built.
    flow.shutdown()
    assert flow.function(backend=place.make(), image=image)(draw).remote() == (drawn, prefix)
    assert "step 1" not in capfd.readouterr().err
    assert (Path(prefix) / "count").read_text() == "built\n"


def test_a_lock_file_of_uv(place: Place, tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(
        f'[project]\nname = "locked"\nversion = "1"\nrequires-python = ">={VERSION}"\n'
        f'dependencies = ["{PACKAGE}=={RELEASE}"]\n'
    )
    subprocess.run([uv(), "lock", "--quiet", "--project", str(tmp_path)], check=True)
    image = flow.Image.python(VERSION).uv_sync(tmp_path / "uv.lock")

    def version() -> str:
        from importlib.metadata import version

        return version("pyfiglet")

    assert flow.function(backend=place.make(), image=image)(version).remote() == RELEASE


def test_what_cannot_be_installed(place: Place) -> None:
    image = flow.Image.python(VERSION).run("true").pip_install(f"{PACKAGE}==0.0.0.1")
    f = flow.function(backend=place.make(), image=image)(lambda: 1)
    where = rf"step 2 of 2, pip_install\('{PACKAGE}==0\.0\.0\.1'\): status"
    with pytest.raises(flow.BackendError, match=where) as caught:
        f.remote()
    assert PACKAGE in str(caught.value).partition("\n")[2], "the end of the log is missing"
    assert not [path for path in place.environments.glob(f"{image.digest}-*") if path.is_dir()], "half of it was left"


def test_debian_packages(place: Place) -> None:
    f = flow.function(backend=place.make())(lambda: 1)
    assert f.options(image=flow.Image.python(VERSION).apt_install("coreutils")).remote() == 1
    missing = flow.Image.python(VERSION).apt_install("coreutils", "no-such-package")
    where = r"step 1 of 1, apt_install.*: this host has no no-such-package"
    with pytest.raises(flow.BackendError, match=where) as caught:
        f.options(image=missing).remote()
    assert "apt-get install no-such-package" in (caught.value.hint or "")


def test_two_at_once_build_once(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    """Of two clients the second waits, and is told so."""
    go, begun, count = (place.files / name for name in ("go", "begun", "count"))
    os.mkfifo(go)
    os.mkfifo(begun)
    for fifo in (go, begun):
        fifo.chmod(0o666)
    image = flow.Image.python(VERSION).run(f"echo x >> {count}; echo > {begun}; read _ < {go}")
    futures = [flow.function(backend=place.make(), image=image)(lambda: sys.prefix).spawn() for _ in range(2)]
    begun.read_text()
    shown = ""
    while "another worker is making this environment" not in shown:
        shown += capfd.readouterr().err
    go.write_text("\n")
    assert len({future.result(timeout=100) for future in futures}) == 1
    assert count.read_text() == "x\n"


def test_a_maker_that_is_killed(place: Place) -> None:
    """Nothing half-made is ever used, and what the killed one has started is waited for."""
    begun, go, first = (place.files / name for name in ("begun", "go", "first"))
    for fifo in (begun, go):
        os.mkfifo(fifo)
        fifo.chmod(0o666)
    # At first a program of its own goes on after its maker was killed, and writes into what it takes for its place.
    image = flow.Image.python(VERSION).run(
        f"if [ ! -e {first} ]; then touch {first} $VIRTUAL_ENV/half; "
        f"setsid sh -c 'read _ < {go}; touch $VIRTUAL_ENV/late' & echo > {begun}; wait; fi; touch $VIRTUAL_ENV/whole"
    )

    def there() -> list[str]:
        import os
        import sys

        return sorted(name for name in os.listdir(sys.prefix) if name in ("half", "late", "whole"))

    f = flow.function(backend=place.make(), image=image, retries=None)(there)
    future = f.spawn()
    begun.read_text()
    makers = _makers(place)
    assert makers
    for pid in makers:
        os.kill(pid, signal.SIGKILL)
    wait_for_end(makers)
    go.write_text("\n")
    try:
        got = future.result(timeout=100)  # tried again
    except flow.FlowError:
        got = f.remote()
    assert got == ["whole"]


def _makers(place: Place) -> list[int]:
    """The processes that make environments: those that hold the lock of one, and are no step's."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                held = [os.readlink(fd) for fd in (entry / "fd").iterdir()]
                if (entry / "comm").read_text().startswith("python"):
                    found += [int(entry.name)] if any(_is_lock(path, place) for path in held) else []
            except OSError:
                continue
    return found


def _is_lock(path: str, place: Place) -> bool:
    return path.startswith(f"{place.environments}/") and path.endswith(".making")


# what `Image.here` names


CLIENT = """
import sys
import flowfn as flow
from flowfn.backends.ssh import SshBackend

image = flow.Image.here()

def installed():
    import importlib.metadata
    import sys
    own = [path for path in sys.path if path.startswith(sys.prefix)]
    distributions = importlib.metadata.distributions(path=own)
    return sys.version_info[:2], {there.metadata["Name"]: there.version for there in distributions}

if __name__ == "__main__":
    print(image)
    f = flow.function(backend=SshBackend(sys.argv[1], config=sys.argv[2]), image=image)(installed)
    try:
        version, found = f.remote()
        print(version == sys.version_info[:2], *(f"{n}=={v}" for n, v in sorted(found.items())))
    except flow.FlowError as error:
        print(type(error).__name__, error)
    if "plain" in sys.argv:
        print(flow.function(backend=f.spec.backend)(lambda: sys.version_info[:2]).remote())
"""


def client(folder: Path, python: str, *packages: str) -> Callable[..., list[str]]:
    """A client of its own environment, which has these packages and what flowfn needs; run, it returns its lines."""
    project = folder / "project"
    project.mkdir()
    (project / "pyproject.toml").write_text(
        f'[project]\nname = "mine"\nversion = "1"\nrequires-python = ">=3.10"\ndependencies = {list(packages)!r}\n'
    )
    (project / "program.py").write_text(CLIENT)
    subprocess.run([uv(), "venv", "--quiet", "--python", python, str(folder / "venv")], check=True)
    needed = ["cloudpickle", "tblib", *packages]
    subprocess.run([uv(), "pip", "install", "--quiet", "--python", str(folder / "venv"), *needed], check=True)
    root = Path(flow.__file__).parents[1]

    def run(*arguments: str) -> list[str]:
        environ = {**os.environ, "PYTHONPATH": f"{root}:{root}/runtime", "FLOW_HOME": str(folder / "home")}
        command = [str(folder / "venv" / "bin" / "python"), "program.py", *arguments]
        done = subprocess.run(command, cwd=project, env=environ, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return run


def test_the_environment_of_the_client(host: Sshd, tmp_path: Path) -> None:
    run = client(tmp_path, sys.executable, f"{PACKAGE}=={RELEASE}")
    subprocess.run([uv(), "lock", "--quiet", "--project", str(tmp_path / "project")], check=True)
    image, found = run(host.url, str(host.config))
    assert "--require-hashes" in image and "locked.txt" in image  # the lock file of the project knows that package
    assert "cloudpickle==" in image  # and not these, which stay as they are all the same
    assert found.startswith("True ") and f"{PACKAGE}=={RELEASE}" in found and "cloudpickle==" in found
    # What the index has is not what was locked: it is refused.
    lock = tmp_path / "project" / "uv.lock"
    lock.write_text(re.sub("sha256:[0-9a-f]{64}", "sha256:" + "0" * 64, lock.read_text()))
    _, failed = run(host.url, str(host.config))[:2]
    assert failed.startswith("BackendError") and "step 1 of 2" in failed


def another_python() -> tuple[str, str]:
    """The version and path of a Python of another minor version than the tests'."""
    for minor in ("3.12", "3.13", "3.10"):
        if minor != VERSION:
            for root in sorted(Path("/root/.pyenv/versions").glob(f"{minor}.*")) + [Path("/usr"), Path("/usr/local")]:
                if (python := root / "bin" / f"python{minor}").exists():
                    return minor, str(python)
    pytest.skip("there is no Python of another version here")


def managed_python(host: Sshd, version: str, python: str) -> None:
    """Let the host's uv have that Python, as if it had fetched it."""
    base = Path(
        subprocess.run(
            [python, "-c", "import sys; print(sys.base_prefix)"], capture_output=True, text=True, check=True
        ).stdout.strip()
    )
    full = subprocess.run(
        [python, "-c", "import platform; print(platform.python_version())"], capture_output=True, text=True, check=True
    ).stdout.strip()
    target = host.root / "pythons" / f"cpython-{full}-linux-x86_64-gnu"
    left_out = shutil.ignore_patterns("test", "idlelib", "__pycache__", "site-packages", "*.a", "ensurepip", "config-*")
    shutil.copytree(base / "lib" / f"python{version}", target / "lib" / f"python{version}", ignore=left_out)
    (target / "bin").mkdir()
    shutil.copy(base / "bin" / f"python{version}", target / "bin")
    for library in (base / "lib").glob("libpython*.so*"):  # of builds that share it
        shutil.copy(library, host.root / "libraries")
    subprocess.run(["chown", "-R", host.user, host.root / "pythons"], check=True)


def test_a_python_that_uv_provides(tmp_path: Path, ssh_servers: Callable[..., Sshd]) -> None:
    """The host has another Python than the client: workers, and their environment, get the client's by uv."""
    version, python = another_python()
    run = client(tmp_path, python, f"{PACKAGE}=={RELEASE}")
    bare = ssh_servers(PATH="/usr/bin:/bin")
    _, error = run(bare.url, str(bare.config))[:2]
    assert error.startswith("VersionMismatch") and f"cpython {VERSION}" in error and f"cpython {version}" in error

    server = ssh_servers(**_reach(), UV_PYTHON_INSTALL_DIR="", UV_PYTHON_DOWNLOADS="never")
    (server.root / "bin").mkdir()
    shutil.copy(uv(), server.root / "bin" / "uv")
    server.stop()
    (server.root / "libraries").mkdir()
    server.environ |= {
        "PATH": f"/usr/bin:/bin:{server.root}/bin",
        "UV_PYTHON_INSTALL_DIR": f"{server.root}/pythons",
        "LD_LIBRARY_PATH": f"{server.root}/libraries",
    }
    server.start()
    lines = run(server.url, str(server.config))
    assert lines[1].startswith("VersionMismatch") and f"cpython {VERSION}" in lines[1]
    assert "uv there can't get it" in lines[1]  # and what uv said

    managed_python(server, version, python)
    _, found, plain = run(server.url, str(server.config), "plain")
    assert found.startswith("True ") and f"{PACKAGE}=={RELEASE}" in found
    assert plain == str(tuple(map(int, version.split("."))))


def test_the_documentation_runs_as_it_stands(host: Sshd, tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "images.md").read_text()
    blocks = re.findall(r"```python no-run\n(.*?)```", page, re.DOTALL)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "config.toml").write_text(
        f'[backends.box]\ntype = "ssh"\nhosts = ["{host.url}"]\nconfig = "{host.config}"\n'
    )
    (tmp_path / "page").mkdir()
    # The page names the version that the client has to have.
    (tmp_path / "page" / "page.py").write_text("\n".join(blocks).replace("3.11", VERSION))
    environ = {**os.environ, "FLOW_HOME": str(tmp_path / "home")}
    command = [sys.executable, "page.py"]
    done = subprocess.run(command, cwd=tmp_path / "page", env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().isdigit()
