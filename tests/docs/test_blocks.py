"""The code in README and docs runs as it stands.

Each page is one program: its ```python blocks one after another, in a folder of their own, as `__main__`. What a
block's first line may say beside the language:

- `title="train.py"` (any language): the block is written to that file instead of being run;
- `run` after `bash`: the block is run, with this environment's commands on the path;
- `no-run` after `python`: left alone; only for what needs a machine that a test can't have.

`<!-- test: s3 bucket/key ... -->` in a page starts an S3 server on loopback with these objects (a key that ends in `/`
is a bucket or prefix with nothing in it).
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
sys.path.append(str(ROOT / "examples"))

_FENCE = re.compile(r"^(?P<indent> *)(?P<fence>```+|~~~+)\s*(?P<info>.*)$")
_TITLE = re.compile(r'title="([^"]+)"')
_S3 = re.compile(r"<!--\s*test:\s*s3\s+(.*?)\s*-->", re.DOTALL)


@dataclass(frozen=True)
class Block:
    line: int  # of its first line of code, from 1
    words: tuple[str, ...]  # what stands after the fence
    title: str | None
    code: str


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a page."""
    found: list[Block] = []
    opening: re.Match[str] | None = None
    start = 0
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        fence = _FENCE.match(line)
        if opening is None:
            if fence:
                opening, start = fence, number + 1
        elif fence and not fence["info"] and fence["fence"].startswith(opening["fence"]):
            indent = len(opening["indent"])
            code = "\n".join(one[indent:] for one in lines[start - 1 : number - 1])
            title = _TITLE.search(opening["info"])
            words = tuple(_TITLE.sub("", opening["info"]).split())
            found.append(Block(start, words, title[1] if title else None, code))
            opening = None
    assert opening is None, f"a block that opens at line {start - 1} has no end"
    return found


def program(text: str) -> str:
    """The page as a Python program, whose line numbers are the page's."""
    lines = [""] * (len(text.splitlines()) + 1)
    used = False
    for block in blocks(text):
        language, *words = block.words or ("",)
        if block.title:
            write = f"_p = _Path({block.title!r}); _p.parent.mkdir(parents=True, exist_ok=True); "
            lines[block.line - 1] = write + f"_p.write_text({block.code + chr(10)!r})"
        elif language == "bash" and "run" in words:
            lines[block.line - 1] = f"_run(['bash', '-euo', 'pipefail', '-c', {block.code!r}], check=True)"
        elif language == "python" and "no-run" not in words:
            lines[block.line - 1 : block.line - 1 + len(block.code.splitlines())] = block.code.splitlines()
        else:
            continue
        used = True
    if not used:
        return ""
    assert not lines[0], "a page begins with its title"
    lines[0] = "from pathlib import Path as _Path; from subprocess import run as _run"
    return "\n".join(lines) + "\n"


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [page for page in PAGES if page.exists()], ids=name_of)
def test_the_blocks_of_a_page_run(page: Path, tmp_path: Path) -> None:
    text = page.read_text()
    source = program(text)
    if not source:
        return  # prose and pictures: nothing to run, and the parser has read it
    work = tmp_path / "work"
    work.mkdir()
    # Beside the folder, not in it: the page's project is what the page's blocks put there.
    script = tmp_path / f"{page.stem.lower()}.py"
    script.write_text(source)
    with contextlib.ExitStack() as stack:
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(work),
            "PYTHONWARNINGS": "error",
        }
        if objects := _S3.search(text):
            environment |= stack.enter_context(served(objects[1].split()))
        ended = subprocess.run(
            [sys.executable, str(script)],
            cwd=work,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=100,
        )
    assert ended.returncode == 0, f"{name_of(page)} (line numbers are the page's):\n{ended.stdout}\n{ended.stderr}"


@contextlib.contextmanager
def served(objects: list[str]):  # type: ignore[no-untyped-def]
    """An S3 server with these objects; yields the environment that leads to it."""
    import fsspec
    from loopback_s3 import s3_server

    with s3_server(*sorted({name.split("/")[0] for name in objects})):
        for name in objects:
            if not name.endswith("/"):
                # fsspec would give the next page this page's server.
                with fsspec.open(f"s3://{name}", "wb", skip_instance_cache=True) as file:
                    file.write(f"{name}\n".encode() * 20)
        yield {name: value for name, value in os.environ.items() if name.startswith("AWS_")}


def test_line_numbers_are_the_pages() -> None:
    page = (
        '# Title\n\ntext\n\n```python\nx = 1\n\n```\n\n```python title="a/b.py"\ny = 2\n```\n\n```python\n1 / 0\n```\n'
    )
    lines = program(page).splitlines()
    assert lines[5] == "x = 1"
    assert "a/b.py" in lines[10] and "y = 2" in lines[10]
    assert lines[14] == "1 / 0"


def test_a_block_marked_no_run_is_left_alone() -> None:
    assert program("# T\n\n```python no-run\n1 / 0\n```\n\n```text\nhello\n```\n") == ""


def test_a_block_without_an_end_is_an_error() -> None:
    with pytest.raises(AssertionError, match="no end"):
        blocks("# T\n\n```python\nx = 1\n")


def links() -> list[tuple[str, str]]:
    """Every link of every page to a file of the repository."""
    found = []
    for page in PAGES:
        if page.exists():
            for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
                if "://" not in target and not target.startswith("mailto:"):
                    found.append((name_of(page), target))
    return found


@pytest.mark.parametrize(("page", "target"), links())
def test_links_lead_somewhere(page: str, target: str) -> None:
    assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}, which is not there"
