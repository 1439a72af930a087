"""The examples in docstrings run, each module's in a process of its own."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"flowfn": ROOT, "flowfn_runtime": ROOT / "runtime", "flow": ROOT}

RUN = """
import doctest, importlib, sys
module = importlib.import_module(sys.argv[1])
flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
failed = ran = 0
# As typed at a prompt: what an example defines belongs to __main__.
for test in doctest.DocTestFinder().find(module, sys.argv[1], extraglobs={"__name__": "__main__"}):
    result = doctest.DocTestRunner(optionflags=flags).run(test)
    failed, ran = failed + result.failed, ran + result.attempted
sys.exit(1 if failed or not ran else 0)
"""


def with_examples() -> list[str]:
    """The modules whose docstrings hold examples."""
    found = []
    for package, folder in PACKAGES.items():
        for path in sorted((folder / package).rglob("*.py")):
            tree = ast.parse(path.read_text())
            nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            docs = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, nodes)]
            if any(">>> " in text for text in docs):
                parts = path.relative_to(folder).with_suffix("").parts
                found.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return found


@pytest.mark.parametrize("module", with_examples())
def test_the_examples_of_a_module_run(module: str, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", RUN, module]
    ended = subprocess.run(command, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 0, ended.stdout + ended.stderr
