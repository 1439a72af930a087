"""Which files are a project's: all below its root but for what `.gitignore` and `.flowignore` leave out."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from .errors import ValidationError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from . import ignore


def walk(root: str, exclude: set[str]) -> Iterator[tuple[str, os.stat_result, str | None]]:
    """Every file below `root` that is not ignored: its relative path, its status, and where it points if a link."""
    import stat

    from . import ignore

    git = _Levels(".gitignore").above(root)
    # Over git's rules, whatever those take back: what is never part of a project, and then .flowignore.
    flow = _Levels(".flowignore", [("", ignore.Rules(ignore.DEFAULTS))]).above(root)
    pending = [("", git, flow)]
    while pending:
        directory, git, flow = pending.pop()
        full = os.path.join(root, directory)
        git, flow = git.below(full, directory), flow.below(full, directory)
        try:
            entries = sorted(os.scandir(full), key=lambda entry: entry.name)
        except PermissionError:
            raise ValidationError(
                f"{full} can't be read, so the project can't go along",
                hint="Name it in .flowignore, or set code_root= to another directory.",
            ) from None
        except FileNotFoundError:
            if not directory:
                raise
            continue  # it was removed meanwhile
        for entry in entries:
            path = f"{directory}/{entry.name}" if directory else entry.name
            is_dir = entry.is_dir(follow_symlinks=False)
            if entry.path in exclude or entry.name in ignore.NEVER:
                continue
            ignored = flow.verdict(path, is_dir)
            if git.verdict(path, is_dir) if ignored is None else ignored:
                continue
            if is_dir:
                if not os.path.exists(os.path.join(entry.path, "pyvenv.cfg")):  # an environment by whatever name
                    pending.append((path, git, flow))
                continue
            try:
                status = entry.stat(follow_symlinks=False)
                link = os.readlink(entry.path) if stat.S_ISLNK(status.st_mode) else None
            except FileNotFoundError:
                continue  # it was removed meanwhile
            if link is not None or stat.S_ISREG(status.st_mode):
                yield path, status, link


class _Levels:
    """The rules of the ignore files of one name, from the outermost directory to the nearest, whose word counts most.

    Each level says where its rules' paths begin: a directory below the root, or with a leading slash, how the root is
    seen from a directory above it.
    """

    def __init__(self, name: str, levels: list[tuple[str, ignore.Rules]] | None = None) -> None:
        self._name = name
        self._levels = levels or []

    def below(self, directory: str, base: str) -> _Levels:
        """These, and those of `directory`, which is `base` below the root."""
        from . import ignore

        lines = _lines(os.path.join(directory, self._name))
        return _Levels(self._name, [*self._levels, (base, ignore.Rules(lines))]) if lines else self

    def above(self, root: str) -> _Levels:
        """These, and those of the git repository that `root` is part of, from its top to the directory above `root`."""
        from . import ignore

        found: list[tuple[str, ignore.Rules]] = []
        directory, seen_from = root, ""
        while not os.path.exists(os.path.join(directory, ".git")):
            parent = os.path.dirname(directory)
            if parent == directory:
                return self  # no repository: what lies above says nothing about this
            name = os.path.basename(directory)
            seen_from = f"{name}/{seen_from}" if seen_from else name
            directory = parent
            if lines := _lines(os.path.join(directory, self._name)):
                found.append(("/" + seen_from, ignore.Rules(lines)))
        if self._name == ".gitignore" and (lines := _lines(os.path.join(directory, ".git", "info", "exclude"))):
            found.append((f"/{seen_from}" if seen_from else "", ignore.Rules(lines)))
        return _Levels(self._name, [*self._levels, *found[::-1]])

    def verdict(self, path: str, is_dir: bool) -> bool | None:
        """True: ignored, False: taken back, None: nothing is said. `path` is relative to the root."""
        for base, rules in reversed(self._levels):
            if base.startswith("/"):
                seen = f"{base[1:]}/{path}"
            else:
                seen = path[len(base) + 1 :] if base else path
            verdict = rules.verdict(seen, is_dir)
            if verdict is not None:
                return verdict
        return None


def _lines(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read().splitlines()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError):
        return []
