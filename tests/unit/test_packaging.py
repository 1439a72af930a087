"""What is in the wheel, and that it runs where nothing else is installed."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_holds_the_three_packages_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {name for name in tops if not name.endswith(".dist-info")} == {"flowfn", "flowfn_runtime", "flow"}
    for package in ("flowfn", "flowfn_runtime", "flow"):
        assert f"{package}/py.typed" in names
    in_tree = {
        str(path.relative_to(root))
        for root, package in ((ROOT, "flowfn"), (ROOT / "runtime", "flowfn_runtime"), (ROOT, "flow"))
        for path in (root / package).rglob("*.py")
    }
    assert in_tree == {name for name in names if name.endswith(".py")}


def test_the_wheel_says_its_licence_and_its_command(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (info,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
    metadata = archive.read(f"{info}/METADATA").decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert "Apache License" in archive.read(f"{info}/licenses/LICENSE").decode()
    entry_points = archive.read(f"{info}/entry_points.txt").decode()
    assert "flow = flowfn.cli:main" in entry_points
    assert "[flowfn.backends]" in entry_points


def test_it_is_imported_where_nothing_else_is_installed(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=False, symlinks=True)
    python = environment / "bin" / "python"
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True
    ).stdout.strip()
    zipfile.ZipFile(wheel).extractall(site)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("COV", "PYTHON"))}
    program = "import flowfn, flowfn_runtime.errors; print(flowfn.__file__, flowfn.__version__)"
    ended = subprocess.run([python, "-c", program], cwd=tmp_path, env=clean, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith(str(environment))
    assert ended.stdout.split()[-1] == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_every_extra_that_a_message_advises_exists() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    advised = set()
    for path in [*(ROOT / "flowfn").rglob("*.py"), *(ROOT / "runtime").rglob("*.py"), *(ROOT / "flow").rglob("*.py")]:
        for part in path.read_text().split("flowfn[")[1:]:
            advised |= {name.strip() for name in part.split("]")[0].split(",")}
    assert {name for name in advised if name.isidentifier()} <= set(extras)
