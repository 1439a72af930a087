from __future__ import annotations

import logging
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from flowfn.cli import main
from flowfn_runtime.data import volumes
from flowfn_runtime.errors import FlowError, ValidationError, VolumeError, VolumeInUse, VolumeNotFound

Run = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def python() -> Iterator[Run]:
    """Starts Python processes with pipes; those still there at the end are killed."""
    with ExitStack() as stack:

        def start(code: str, *args: str) -> subprocess.Popen[str]:
            pipes: dict[str, int] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
            process = subprocess.Popen([sys.executable, "-c", code, *args], text=True, **pipes)  # type: ignore[call-overload]
            stack.enter_context(process)
            stack.callback(process.kill)
            return process  # type: ignore[no-any-return]

        yield start


@pytest.fixture
def hold(python: Run) -> Run:
    """Starts a process that has attached a volume, and holds it until its stdin ends."""
    code = """
import sys
from flowfn_runtime.data import volumes
held = volumes.attach(sys.argv[1], exclusive=sys.argv[2] == "exclusive")
print("held", flush=True)
sys.stdin.read()
"""

    def start(name: str, how: str) -> subprocess.Popen[str]:
        process = python(code, name, how)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    return start


# -- registry


def test_a_volume_is_found_by_name_and_by_id(flow_home: Path) -> None:
    made = volumes.create("models", size_gb=5, interface="file", region="us-west-2")
    assert volumes.get("models") == made == volumes.get(made.id)
    assert (made.size_gb, made.interface, made.region, made.project) == (5, "file", "us-west-2", "default")
    assert made.path == str(flow_home / "volumes" / made.id / "data")
    assert os.listdir(made.path) == []
    assert volumes.list_volumes() == [made]


def test_only_the_owner_can_enter(flow_home: Path) -> None:
    made = volumes.create("models")
    for directory in (flow_home, flow_home / "volumes", Path(made.path).parent):
        assert directory.stat().st_mode & 0o777 == 0o700
    assert (flow_home / "volumes" / "registry.db").stat().st_mode & 0o777 == 0o600


def test_names_belong_to_a_project() -> None:
    ours, theirs = volumes.create("models"), volumes.create("models", project="other")
    assert ours.id != theirs.id and ours.path != theirs.path
    assert volumes.get("models", "other") == theirs
    for stranger in (theirs.id, "no-such"):
        with pytest.raises(VolumeNotFound):
            volumes.get(stranger)
        with pytest.raises(VolumeNotFound):
            volumes.delete(stranger)
    with pytest.raises(VolumeNotFound):
        volumes.attach(theirs.id)
    assert volumes.list_volumes() == [ours]
    assert volumes.list_volumes(None) == [ours, theirs]


def test_a_missing_volume_names_the_nearest() -> None:
    volumes.create("pretrained")
    with pytest.raises(VolumeNotFound, match=r"no volume 'pretraned'\n.*did you mean 'pretrained'"):
        volumes.get("pretraned")
    assert issubclass(VolumeNotFound, LookupError)


def test_a_name_is_made_once() -> None:
    first = volumes.create("models")
    with pytest.raises(VolumeError, match=first.id):
        volumes.create("models")
    assert volumes.find_or_create("models", size_gb=7) == first


def test_unnamed_volumes_are_many() -> None:
    first, second = volumes.create(), volumes.create()
    assert first.id != second.id and first.name is None and first.label == first.id


@pytest.mark.parametrize(
    "name", ["ab", "a" * 65, "-abc", "abc-", "Abc", "a_b", "a/b", "../..", "", "abc\n", "vol_1234"]
)
def test_bad_names(name: str) -> None:
    with pytest.raises(ValidationError):
        volumes.create(name)


@pytest.mark.parametrize("name", ["abc", "a" * 64, "0-9", "exp-001"])
def test_good_names(name: str) -> None:
    assert volumes.create(name).name == name


@pytest.mark.parametrize("options", [{"size_gb": 0}, {"size_gb": 16385}, {"size_gb": 1.5}, {"interface": "nfs"}])
def test_bad_options(options: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        volumes.create("abc", **options)  # type: ignore[arg-type]


def test_fifty_processes_ask_for_the_same_name_and_get_one_volume(python: Run) -> None:
    code = """
import sys
from flowfn_runtime.data import volumes
sys.stdin.readline()
for n in range(4):
    volumes.create()
print(volumes.find_or_create("shared").id)
"""
    processes = [python(code) for _ in range(50)]
    for process in processes:  # they start together
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    ends = [process.communicate(timeout=100) for process in processes]
    assert {process.returncode for process in processes} == {0}, [err for _, err in ends]
    assert len({out for out, _ in ends}) == 1
    assert len(volumes.list_volumes()) == 50 * 4 + 1


# -- use


def test_shared_users_share_and_an_exclusive_one_does_not() -> None:
    with volumes.attach("models") as one, volumes.attach("models") as two:
        assert one.path == two.path
        with pytest.raises(VolumeInUse, match=str(os.getpid())):
            volumes.attach("models", exclusive=True)
    with volumes.attach("models", exclusive=True), pytest.raises(VolumeInUse):
        volumes.attach("models")
    volumes.attach("models", exclusive=True).close()


def test_attach_makes_a_named_volume_but_never_an_id() -> None:
    with pytest.raises(VolumeNotFound):
        volumes.attach("models", create=False)
    with pytest.raises(VolumeNotFound):
        volumes.attach("vol_0123456789abcdef")
    with volumes.attach("models", size_gb=3) as held:
        assert volumes.get("models") == held.volume
        assert held.volume.size_gb == 3


def test_a_volume_in_use_is_not_deleted(hold: Run) -> None:
    user = hold("models", "shared")
    volume = volumes.get("models")
    assert volumes.in_use(volume)
    with pytest.raises(VolumeInUse, match=f"by process {user.pid}"):
        volumes.delete("models")
    assert os.path.isdir(volume.path)
    user.communicate("")
    assert not volumes.in_use(volume)
    volumes.delete("models")
    assert not os.path.exists(os.path.dirname(volume.path))
    assert volumes.list_volumes() == []
    with pytest.raises(VolumeNotFound):
        volumes.delete("models")


def test_a_killed_user_frees_the_volume(hold: Run) -> None:
    user = hold("models", "exclusive")
    with pytest.raises(VolumeInUse):
        volumes.attach("models")
    user.kill()
    user.wait()
    volumes.attach("models", exclusive=True).close()


def test_a_child_that_inherits_the_lock_holds_the_volume_after_its_parent_is_killed(python: Run) -> None:
    code = """
import os, subprocess, sys
from flowfn_runtime.data import volumes
held = volumes.attach("models", exclusive=True)
child = subprocess.Popen(["cat"], pass_fds=[held.fd])  # ends with our stdin
print(child.pid, flush=True)
os.kill(os.getpid(), 9)
"""
    parent = python(code)
    assert parent.stdin is not None and parent.stdout is not None
    child = int(parent.stdout.readline())
    assert parent.wait() == -signal.SIGKILL
    with pytest.raises(VolumeInUse):
        volumes.attach("models")
    released = subprocess.Popen(
        [sys.executable, "-c", "from flowfn_runtime.data import volumes; volumes.attach('models', wait=True)"]
    )
    os.kill(child, signal.SIGKILL)
    assert released.wait(timeout=60) == 0  # it slept in the kernel until the child was gone


def test_who_waits_for_a_volume_that_is_deleted_gets_a_new_one(hold: Run, flow_home: Path) -> None:
    user = hold("models", "shared")
    old = volumes.get("models")
    with ThreadPoolExecutor() as pool:
        waiting = [pool.submit(volumes.attach, "models", exclusive=True, wait=True) for _ in range(1)]
        # The row goes while the other thread waits for the lock or is about to.
        with sqlite3.connect(flow_home / "volumes" / "registry.db") as db:
            db.execute("UPDATE volumes SET name = NULL, deleted_at = 1 WHERE id = ?", (old.id,))
        db.close()
        user.communicate("")
        with waiting[0].result(timeout=60) as held:
            assert held.volume.id != old.id
            assert os.path.isdir(held.path)


def test_attaching_and_deleting_race_and_no_user_loses_its_files(python: Run) -> None:
    code = """
import os, sys
from flowfn_runtime.data import volumes
from flowfn_runtime.errors import VolumeInUse, VolumeNotFound
for n in range(30):
    if sys.argv[1] == "delete":
        try:
            volumes.delete("models")
        except (VolumeInUse, VolumeNotFound):
            pass
    else:
        with volumes.attach("models", wait=True) as held:
            path = os.path.join(held.path, f"{os.getpid()}-{n}")
            open(path, "w").close()
            volumes.get("models")
            os.stat(path)
"""
    processes = [python(code, what) for what in ("delete", "attach", "delete", "attach", "attach", "attach")]
    ends = [process.communicate(timeout=100) for process in processes]
    assert {process.returncode for process in processes} == {0}, [err for _, err in ends]


def test_delete_takes_read_only_directories_along() -> None:
    volume = volumes.create("models")
    inner = Path(volume.path, "a", "b")
    inner.mkdir(parents=True)
    (inner / "file").write_text("x")
    Path(volume.path, "link").symlink_to("/etc")
    inner.chmod(0o500)
    inner.parent.chmod(0o500)
    volumes.delete("models")
    assert not os.path.exists(os.path.dirname(volume.path))
    assert os.path.isdir("/etc")


def test_a_killed_deleter_leaves_work_that_the_next_one_finishes(flow_home: Path) -> None:
    half = volumes.create("half")
    with sqlite3.connect(flow_home / "volumes" / "registry.db") as db:  # where the deleter was killed
        db.execute("UPDATE volumes SET name = NULL, deleted_at = 1 WHERE id = ?", (half.id,))
    db.close()
    assert volumes.list_volumes() == []
    with pytest.raises(VolumeNotFound):
        volumes.attach(half.id)
    volumes.delete(volumes.create("half").id)
    assert not os.path.exists(os.path.dirname(half.path))


def test_data_lost_from_outside_is_said_and_the_volume_can_be_forgotten() -> None:
    volume = volumes.create("models")
    shutil.rmtree(volume.path)
    with pytest.raises(VolumeError, match="is gone"):
        volumes.attach("models")
    shutil.rmtree(os.path.dirname(volume.path))
    volumes.delete("models")
    assert volumes.list_volumes() == []


# -- size


def test_usage_counts_blocks_and_hard_links_once(caplog: pytest.LogCaptureFixture) -> None:
    volume = volumes.create("models", size_gb=1)
    file = Path(volume.path, "file")
    file.write_bytes(os.urandom(1 << 20))
    Path(volume.path, "again").hardlink_to(file)
    Path(volume.path, "away").symlink_to("/usr")
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
    assert 1 << 20 <= volumes.usage_bytes(volume) <= (1 << 20) + (64 << 10)
    with caplog.at_level(logging.WARNING, "flowfn"):
        volumes.check_size(volume)
        assert not caplog.records
        with Path(volume.path, "big").open("wb") as big:
            os.posix_fallocate(big.fileno(), 0, 1_100_000_000)
        assert volumes.check_size(volume) > 10**9
        assert "more than its size of 1 GB" in caplog.text
        caplog.clear()
        assert main(["volume", "du", "models"]) == 0
    assert "more than its size of 1 GB" in caplog.text


# -- a home that doesn't work


def test_a_newer_registry_is_left_alone(flow_home: Path) -> None:
    volumes.create("models")
    with sqlite3.connect(flow_home / "volumes" / "registry.db") as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    for use in (volumes.list_volumes, lambda: volumes.create("other")):
        with pytest.raises(VolumeError, match="newer flowfn"):
            use()


def test_a_damaged_registry_is_said(flow_home: Path) -> None:
    volumes.create("models")
    (flow_home / "volumes" / "registry.db").write_bytes(b"no database at all" * 1000)
    with pytest.raises(VolumeError, match="damaged"):
        volumes.list_volumes()


def test_a_writer_killed_in_a_transaction_harms_nobody(python: Run, flow_home: Path) -> None:
    volumes.create("models")
    code = """
import os
from flowfn_runtime.data import volume_db
def work(db):
    db.execute("PRAGMA cache_spill = 1")
    db.execute("PRAGMA cache_size = 1")
    db.execute("UPDATE volumes SET name = 'other'")
    for n in range(2000):  # more than the cache holds, so that the file itself is changed before the commit
        db.execute("INSERT INTO volumes VALUES (?, 'p', ?, 1, 'file', '', 0, NULL)", (str(n), 'x' * 500 + str(n)))
    os.kill(os.getpid(), 9)
volume_db.write(work)
"""
    process = python(code)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert os.path.exists(flow_home / "volumes" / "registry.db-journal")
    assert [volume.name for volume in volumes.list_volumes(None)] == ["models"]
    volumes.create("more")


@pytest.fixture
def bwrap() -> str:
    path = shutil.which("bwrap")
    if not path:
        pytest.skip("needs bubblewrap")
    return path


def test_a_read_only_home_can_be_read_and_attached_but_not_changed(bwrap: str, flow_home: Path) -> None:
    volumes.create("models")
    code = """
from flowfn_runtime.data import volumes
from flowfn_runtime.errors import FlowError
print([volume.name for volume in volumes.list_volumes()])
with volumes.attach("models"):
    try:
        volumes.create("other")
    except FlowError as error:
        print(type(error).__name__, error)
"""
    argv = [bwrap, "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc", sys.executable, "-c", code]
    done = subprocess.run(argv, text=True, capture_output=True)
    assert done.stdout.startswith("['models']\nVolumeError volumes can't be changed: "), done.stderr
    assert "not writable" in done.stdout and "FLOW_HOME" in done.stdout


def test_a_home_that_was_never_made_reads_as_empty(flow_home: Path) -> None:
    assert volumes.list_volumes() == []
    with pytest.raises(FlowError):
        volumes.get("models")
    assert not flow_home.exists()


def test_a_full_disk_is_said_and_the_registry_survives(bwrap: str, tmp_path: Path) -> None:
    code = """
import os
from flowfn_runtime.data import volumes
from flowfn_runtime.errors import VolumeError
first = volumes.create("models")
with open(os.environ["FLOW_HOME"] + "/fill", "wb", buffering=0) as fill:
    try:
        while True:
            fill.write(bytes(1024))
    except OSError:
        pass
made = 0
try:
    for _ in range(1000):
        volumes.create()
        made += 1
except VolumeError as error:
    print(type(error).__name__, error)
assert volumes.get("models") == first
assert len(volumes.list_volumes()) == made + 1
os.remove(os.environ["FLOW_HOME"] + "/fill")
volumes.create("other")
"""
    disk = tmp_path / "disk"
    disk.mkdir()
    argv = [bwrap, "--bind", "/", "/", "--dev", "/dev", "--proc", "/proc", "--size", "262144", "--tmpfs", str(disk)]
    done = subprocess.run(
        [*argv, "--setenv", "FLOW_HOME", f"{disk}/home", sys.executable, "-c", code], text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert "VolumeError volumes can't be changed: the disk of" in done.stdout


def test_sqlite_is_not_imported_before_it_is_needed() -> None:
    code = "import sys, flowfn_runtime.data.volumes; sys.exit('sqlite3' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
