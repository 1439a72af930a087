"""What goes along with a task: the files that git would take, as they were when it was submitted."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flowfn.client import Flow
from flowfn.task import Task
from flowfn_runtime import project
from flowfn_runtime.errors import FlowError, ValidationError


def write(root: Path, *names: str, text: str = "") -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text or name)


def taken(root: Path, **options: Any) -> list[str]:
    return [entry.path for entry in project.snapshot(str(root), **options).files]


def test_what_is_taken(tmp_path: Path) -> None:
    write(
        tmp_path, "train.py", "pkg/a.py", "pkg/__pycache__/a.pyc", ".git/config", ".venv/x", "env/pyvenv.cfg", "env/x"
    )
    write(tmp_path, "data/big.bin", "data/keep.txt", "out/x", "logs/a.log", "logs/sub/b.log", "node_modules/x")
    write(tmp_path, ".env", "pkg/.env.local", ".ssh/id_ed25519")
    (tmp_path / ".gitignore").write_text("*.log\n/out/\n!keep.txt\n")
    (tmp_path / "data" / ".gitignore").write_text("*\n!keep.txt\n")
    (tmp_path / "link").symlink_to("train.py")
    os.mkfifo(tmp_path / "fifo")
    assert taken(tmp_path) == [".gitignore", "data/keep.txt", "link", "pkg/a.py", "train.py"]
    (tmp_path / ".flowignore").write_text("pkg\n!logs/a.log\n!node_modules/\n")
    assert taken(tmp_path) == [
        ".flowignore",
        ".gitignore",
        "data/keep.txt",
        "link",
        "logs/a.log",
        "node_modules/x",
        "train.py",
    ]


def test_rules_of_the_repository_above_count(tmp_path: Path) -> None:
    write(tmp_path, "sub/a.txt", "sub/b.log", "sub/deep/secret.txt", "sub/deep/c.txt")
    (tmp_path / ".gitignore").write_text("*.log\nsub/deep/secret.txt\n")
    assert taken(tmp_path / "sub") == ["a.txt", "b.log", "deep/c.txt", "deep/secret.txt"]
    (tmp_path / ".git").mkdir()
    assert taken(tmp_path / "sub") == ["a.txt", "deep/c.txt"]


def test_limits_name_what_is_large(tmp_path: Path) -> None:
    write(tmp_path, "a.py", "weights/w1", "weights/w2")
    (tmp_path / "weights" / "w1").write_bytes(b"x" * 5000)
    with pytest.raises(ValidationError, match="weights") as caught:
        taken(tmp_path, limit_bytes=4000)
    assert ".flowignore" in (caught.value.hint or "")
    write(tmp_path, *(f"many/{n}" for n in range(9)))
    with pytest.raises(ValidationError, match=r"more than 8 files .*many has most, 6"):
        taken(tmp_path, limit_files=8)
    (tmp_path / ".flowignore").write_text("many\n.flowignore\n")
    assert len(taken(tmp_path, limit_files=3)) == 3


def test_digests_stand_for_contents(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write(tmp_path / name, "a.py", "deep/b.py")
    one, two = (project.snapshot(str(tmp_path / name)) for name in ("one", "two"))
    assert one.digest == two.digest and one.root != two.root
    (tmp_path / "two" / "a.py").chmod(0o755)
    assert project.snapshot(str(tmp_path / "two")).digest != one.digest


def test_kept_laid_out_and_packed(tmp_path: Path) -> None:
    root = tmp_path / "root"
    write(root, "a.py", "same.py", text="print(1)")
    write(root, "deep/b.py", text="")
    write(root, "run.sh")
    (root / "run.sh").chmod(0o755)
    (root / "link").symlink_to("deep/b.py")
    snapshot = project.snapshot(str(root))
    here, there = str(tmp_path / "here"), str(tmp_path / "there")
    project.keep(snapshot, here)
    lacking = project.missing(snapshot.manifest(), there)
    assert len(lacking) == 3  # a.py and same.py are one content
    assert project.missing(snapshot.manifest(), here) == []
    packed = io.BytesIO()
    project.pack(snapshot, packed)
    packed.seek(0)
    assert project.unpack(packed, there) == snapshot.digest
    for number, store in enumerate((here, there)):
        target = tmp_path / f"target-{number}"
        target.mkdir()
        project.lay_out(snapshot.digest, store, str(target))
        assert project.snapshot(str(target)).digest == snapshot.digest
        (target / "a.py").write_text("changed")  # it is the task's own
        assert (target / "same.py").read_text() == "print(1)"
    # Only what is missing travels.
    (root / "a.py").write_text("print(2)")
    changed = project.snapshot(str(root))
    packed = io.BytesIO()
    have = {e.digest for e in changed.files} - set(project.missing(changed.manifest(), there))
    project.pack(changed, packed, skip=have)
    assert b"print(1)" not in packed.getvalue() and b"print(2)" in packed.getvalue()
    packed.seek(0)
    assert project.unpack(packed, there) == changed.digest


def test_what_was_tampered_with_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "root"
    write(root, "a.py", text="print('good')")
    packed = io.BytesIO()
    project.pack(project.snapshot(str(root)), packed)
    bad = packed.getvalue().replace(b"print('good')", b"print('evil')")
    with pytest.raises(FlowError):
        project.unpack(io.BytesIO(bad), str(tmp_path / "store"))
    assert not list((tmp_path / "store").rglob("trees/*"))
    for path in ("../out", "/etc/x", "a/../../x"):
        evil = project.Snapshot(str(root), "", (project.Entry(path, "0" * 64, 0),))
        with pytest.raises(FlowError, match="no path inside"):
            project.missing(evil.manifest(), str(tmp_path))


def test_a_file_that_changes_meanwhile_is_noticed(tmp_path: Path) -> None:
    write(tmp_path / "root", "a.py")
    snapshot = project.snapshot(str(tmp_path / "root"))
    (tmp_path / "root" / "a.py").write_text("other")
    with pytest.raises(ValidationError, match=r"a\.py"):
        project.keep(snapshot, str(tmp_path / "store"))


def test_files_that_vanish_while_they_are_looked_for_are_none_of_it(tmp_path: Path) -> None:
    (tmp_path / "stays.py").write_text("x = 1\n")
    done = threading.Event()

    def edit() -> None:
        while not done.is_set():
            (tmp_path / "d").mkdir()
            for name in (".swap", "4913", "d/part"):
                (tmp_path / name).write_text("x")
            shutil.rmtree(tmp_path / "d")
            for name in (".swap", "4913"):
                (tmp_path / name).unlink()

    editor = threading.Thread(target=edit)
    editor.start()
    try:
        for _ in range(300):
            assert "stays.py" in {entry.path for entry in project.snapshot(str(tmp_path)).files}
    finally:
        done.set()
        editor.join()


def test_the_task_keeps_the_code_it_was_submitted_with(
    project: Path, client: Flow, completed: Callable[[Task], str]
) -> None:
    (project / "main.py").write_text("import helper; print(helper.value)")
    (project / "helper.py").write_text("value = 'first'")
    (project / ".gitignore").write_text("secret\n")
    (project / "secret").write_text("x")
    holder = client.submit("echo up; sleep 0.4", mounts="volume://gate")
    task = client.submit("python main.py; ls; ls -A", mounts="volume://gate")
    (project / "helper.py").write_text("value = 'second'")
    out = completed(task)
    assert out.startswith("first\n") and "secret" not in out
    assert holder.status == "completed"
    deep = project / "deep"
    deep.mkdir()
    (deep / "x.py").write_text("")
    assert completed(client.submit("ls", code_root="deep")) == "x.py\n"
    assert completed(client.submit("ls; pwd", upload_code=False)) == "/workspace\n"
    assert completed(client.submit("pwd; ls main.py", working_dir="/srv/app")) == "/srv/app\nmain.py\n"


# -- against git itself

NAMES = st.sampled_from(["a", "b", "ab", "a.txt", "b.txt", "c.log", "x y", "[z]", "d-e", "#h", "!n"])
PATHS = st.lists(NAMES, min_size=1, max_size=4).map("/".join)
ATOMS = st.sampled_from(
    [
        "a",
        "b",
        "ab",
        "*",
        "**",
        "?",
        ".txt",
        "*.log",
        "[ab]",
        "[!a]",
        "[a-c]",
        "/",
        "/",
        "\\*",
        "x y",
        "[z]",
        "\\#h",
        "[",
        "]",
    ]
)
PATTERNS = st.builds(
    lambda negated, atoms, slash, blank: ("!" if negated else "") + "".join(atoms) + ("/" if slash else "") + blank,
    st.booleans(),
    st.lists(ATOMS, min_size=1, max_size=5),
    st.booleans(),
    st.sampled_from(["", "", " "]),
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    patterns=st.lists(PATTERNS, min_size=1, max_size=5),
    inner=st.lists(PATTERNS, max_size=2),
    paths=st.lists(PATHS, min_size=1, max_size=10),
)
def test_the_same_files_as_git(
    tmp_path_factory: pytest.TempPathFactory, patterns: list[str], inner: list[str], paths: list[str]
) -> None:
    root = tmp_path_factory.mktemp("git")
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    (root / ".gitignore").write_text("\n".join(patterns) + "\n")
    for path in paths:
        try:
            write(root, path)
        except (FileExistsError, NotADirectoryError, IsADirectoryError):
            continue  # an earlier one is in its place, of the other kind
    if inner and (root / "a").is_dir():
        (root / "a" / ".gitignore").write_text("\n".join(inner) + "\n")
    done = subprocess.run(
        ["git", "-C", str(root), "ls-files", "--others", "--exclude-standard", "-z"], capture_output=True, check=True
    )
    assert taken(root) == sorted(path for path in done.stdout.decode().split("\0") if path)
