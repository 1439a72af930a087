"""Which files git would ignore: the patterns of `.gitignore`, as gitignore(5) describes them. Pure.

`.flowignore` files hold the same kind of patterns, and are read after `.gitignore`, so that they can take back what
that one says (`!weights/`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

NEVER = (".git", ".hg", ".svn")  # part of no project, whatever is said
# Not part of a project either, unless a .flowignore takes it back: environments, caches, and what is there for secrets.
DEFAULTS = (
    "__pycache__/",
    "*.py[cod]",
    ".venv/",
    "venv/",
    "node_modules/",
    ".mypy_cache/",
    ".ruff_cache/",
    ".pytest_cache/",
    ".ipynb_checkpoints/",
    ".tox/",
    ".nox/",
    ".DS_Store",
    ".env",
    ".env.*",
    ".envrc",
    ".netrc",
    ".pypirc",
    ".aws/",
    ".ssh/",
)


class Rule(NamedTuple):
    """One line of an ignore file."""

    pattern: re.Pattern[str]  # matched against the whole path relative to the file's directory
    negated: bool
    directories_only: bool


class Rules:
    """The rules of one directory's ignore files; the last one that matches decides."""

    def __init__(self, lines: Iterable[str]) -> None:
        self.rules = tuple(rule for line in lines if (rule := parse(line)) is not None)

    def verdict(self, path: str, is_dir: bool) -> bool | None:
        """True: ignored, False: taken back, None: these rules don't say. `path` is relative to their directory."""
        for rule in reversed(self.rules):
            if (is_dir or not rule.directories_only) and rule.pattern.fullmatch(path):
                return not rule.negated
        return None


def parse(line: str) -> Rule | None:
    """The rule that a line of an ignore file means; None for a blank, a comment and what git can't read either."""
    line = line.rstrip("\r\n")
    # Blanks at the end don't count, unless a backslash keeps them.
    while line.endswith(" ") and not line.endswith("\\ "):
        line = line[:-1]
    if not line or line.startswith("#"):
        return None
    negated = line.startswith("!")
    line = line[negated:]
    directories_only = line.endswith("/")
    if directories_only:
        line = line[:-1]
    if not line:
        return None
    # A slash at the start or in the middle ties the pattern to the directory of the file.
    anchored = "/" in line
    line = line.removeprefix("/")
    expression = _translate(line)
    if expression is None:
        return None
    return Rule(re.compile(expression if anchored else f"(?:.*/)?{expression}", re.DOTALL), negated, directories_only)


def _translate(glob: str) -> str | None:
    out: list[str] = []
    i, n = 0, len(glob)
    while i < n:
        char = glob[i]
        if char == "*":
            end = i
            while end < n and glob[end] == "*":
                end += 1
            stars = end - i
            after = end == n or glob[end] == "/"
            before = i == 0 or glob[i - 1] == "/"
            if stars == 2 and before and after:
                if end == n:
                    out.append(".+" if i else ".*")  # a/**: everything below a, but not a
                else:
                    out.append("(?:.*/)?")  # **/a and a/**/b: any number of directories
                    end += 1
            else:
                out.append("[^/]*")
            i = end
        elif char == "?":
            out.append("[^/]")
            i += 1
        elif char == "[":
            found = _bracket(glob, i)
            if found is None:
                return None  # never closed: git matches nothing with it
            expression, i = found
            out.append(expression)
        elif char == "\\":
            if i + 1 == n:
                return None
            out.append(re.escape(glob[i + 1]))
            i += 2
        else:
            out.append(re.escape(char))
            i += 1
    return "".join(out)


_CLASSES = {
    "alpha": "a-zA-Z",
    "digit": "0-9",
    "alnum": "a-zA-Z0-9",
    "upper": "A-Z",
    "lower": "a-z",
    "space": r"\s",
    "xdigit": "0-9a-fA-F",
    "punct": r"!-/:-@\[-`{-~",
    "blank": r" \t",
}


def _bracket(glob: str, start: int) -> tuple[str, int] | None:
    i = start + 1
    negated = i < len(glob) and glob[i] in "!^"
    i += negated
    inner: list[str] = []
    first = True
    while i < len(glob):
        char = glob[i]
        if char == "]" and not first:
            body = "".join(inner)
            # A class never matches the slash, whatever it lists.
            return f"(?!/)[{'^' if negated else ''}{body}]", i + 1
        first = False
        if char == "[" and glob.startswith("[:", i) and (end := glob.find(":]", i)) > 0:
            name = glob[i + 2 : end]
            if name not in _CLASSES:
                return None
            inner.append(_CLASSES[name])
            i = end + 2
            continue
        if char == "\\":
            i += 1
            if i >= len(glob):
                return None
            char = glob[i]
        i += 1
        if glob.startswith("-", i) and i + 1 < len(glob) and glob[i + 1] != "]":
            high = glob[i + 1]
            i += 2
            if high == "\\" and i < len(glob):
                high = glob[i]
                i += 1
            if char <= high:
                inner.append(f"{re.escape(char)}-{re.escape(high)}")
            continue  # an empty range matches nothing
        inner.append(re.escape(char))
    return None
