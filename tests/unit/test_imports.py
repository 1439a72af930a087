"""Who imports whom, and how much an import costs: counted in modules, which no machine's mood changes."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUNTIME = ROOT / "runtime" / "flowfn_runtime"
MODULES = sorted(RUNTIME.rglob("*.py"))

# Modules that are slow to import, and that neither `import flowfn` nor a worker's start has a use for.
HEAVY = ("asyncio", "botocore", "fsspec", "httpx", "multiprocessing", "numpy", "obstore", "pydantic", "s3fs", "yaml")

# An fsspec filesystem is a subclass of fsspec's; only fsspec, once somebody has imported it, imports these.
FILESYSTEMS = {"data/volumefs.py"}

# More than the interpreter itself loads at its start. A change that goes over one of these shows why it must.
CLIENT_MODULES = 30
DECORATED_MODULES = 100
WORKER_MODULES = 90


def imports(path: Path, *, at_import_time: bool) -> Iterator[str]:
    """The absolute names of the modules that a file imports; at import time only, or anywhere."""
    tree = ast.parse(path.read_text())
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:  # relative: within its own package
                parts = path.relative_to(RUNTIME.parent if RUNTIME in path.parents else ROOT).parts
                yield ".".join([*parts[: len(parts) - node.level], *([node.module] if node.module else [])])
            else:
                assert node.module is not None
                yield node.module
        elif at_import_time and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        elif at_import_time and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo.extend(node.orelse)
        else:
            todo.extend(ast.iter_child_nodes(node))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_the_runtime_never_imports_the_client(path: Path) -> None:
    tops = {name.split(".")[0] for name in imports(path, at_import_time=False)}
    assert not tops & {"flowfn", "flow"}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_the_runtime_imports_only_the_standard_library(path: Path) -> None:
    tops = {name.split(".")[0] for name in imports(path, at_import_time=True)}
    others = tops - set(sys.stdlib_module_names) - {"flowfn_runtime"}
    if str(path.relative_to(RUNTIME)) in FILESYSTEMS:
        others -= {"fsspec"}
    assert not others, "import these inside the functions that need them"


@pytest.mark.parametrize("path", [ROOT / "flowfn" / "spec.py", RUNTIME / "data" / "spec.py"], ids=name_of)
def test_specifications_do_no_io(path: Path) -> None:
    doing = {
        "io",
        "socket",
        "subprocess",
        "shutil",
        "tempfile",
        "pathlib",
        "sqlite3",
        "threading",
        "selectors",
        "fcntl",
    }
    assert not doing & {name.split(".")[0] for name in imports(path, at_import_time=False)}
    calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    assert not [call for call in calls if isinstance(call, ast.Name) and call.id == "open"]


def run(source: str, *arguments: str) -> list[str]:
    """The modules that a program of its own prints as JSON on its last line."""
    # -I: nothing of this environment, coverage's own start-up included, counts as flowfn's.
    ended = subprocess.run(
        [sys.executable, "-I", *arguments, "-c", source], capture_output=True, text=True, timeout=60, cwd="/"
    )
    assert ended.returncode == 0, ended.stderr
    loaded: list[str] = json.loads(ended.stdout.splitlines()[-1])
    return loaded


BEFORE = "import sys; before = set(sys.modules)\n"
AFTER = "\nloaded = sorted(set(sys.modules) - before)\nimport json; print(json.dumps(loaded))"


def heavy(loaded: list[str]) -> set[str]:
    return {name.split(".")[0] for name in loaded} & set(HEAVY)


def test_importing_flowfn_loads_little() -> None:
    loaded = run(f"{BEFORE}import flowfn{AFTER}")
    assert not heavy(loaded)
    assert len(loaded) <= CLIENT_MODULES, loaded


def test_decorating_a_function_loads_little() -> None:
    options = "gpu='a100:4', memory='32GiB', timeout=60, retries=2, mounts={'/data': 's3://bucket/prefix'}"
    loaded = run(f"{BEFORE}import flowfn as flow\n@flow.function({options})\ndef f(x): return x{AFTER}")
    assert not heavy(loaded)
    assert len(loaded) <= DECORATED_MODULES, loaded


def test_a_worker_loads_little(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import flowfn as flow\n"
        "@flow.function\n"
        "def loaded():\n"
        "    import sys\n"
        "    return sorted(sys.modules)\n"
        "import json; print(json.dumps(loaded.remote()))\n"
    )
    # As the worker's own process starts it: a bare interpreter has what every program has.
    bare = set(run("import sys, json; print(json.dumps(sorted(sys.modules)))"))
    loaded = [
        name for name in run(f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')") if name not in bare
    ]
    assert not heavy(loaded)
    assert "flowfn" not in loaded, "a worker has no use for the client"
    assert len(loaded) <= WORKER_MODULES, loaded


def test_every_public_name_is_there() -> None:
    import flowfn

    assert set(flowfn.__all__) <= set(dir(flowfn))
    for name in flowfn.__all__:
        assert getattr(flowfn, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        flowfn.no_such_name  # noqa: B018


@pytest.mark.parametrize("first", ["flowfn.function", "flowfn.executor", "flowfn.map", "flowfn.client"])
def test_importing_a_submodule_hides_no_public_name(first: str) -> None:
    names = run(
        f"import {first}, json, types, flowfn\n"
        "print(json.dumps([n for n in flowfn.__all__ if isinstance(getattr(flowfn, n), types.ModuleType)]))"
    )
    assert names == []
