"""Tables, JSON and times as the verbs print them."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from typing import Any


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    import json

    print(json.dumps(value, indent=2 if sys.stdout.isatty() else None, default=str))


def table(headers: Sequence[str], rows: Sequence[Sequence[object]], *, empty: str = "") -> None:
    """Columns under their headers; on a terminal the last one is cut to fit. `empty` is said if there is no row."""
    if not rows:
        if empty and sys.stdout.isatty():
            print(empty, file=sys.stderr)
        elif not sys.stdout.isatty():
            print("  ".join(headers))
        return
    texts = [[_plain(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in [list(headers), *texts]) for column in range(len(headers))]
    limit = _width()
    for number, row in enumerate([list(headers), *texts]):
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        if limit and len(line) > limit:
            line = line[: limit - 1] + "…"
        print(_bold(line) if number == 0 else line)


def fields(pairs: Sequence[tuple[str, object]]) -> None:
    """Names and values, one pair a line; pairs whose value is None or "" are left out."""
    shown = [(name, value) for name, value in pairs if value not in (None, "")]
    width = max(len(name) for name, _ in shown) + 2
    for name, value in shown:
        print(f"{name + ':':{width}}{value}")


def _plain(cell: object) -> str:
    text = "" if cell is None else str(cell)
    # Nothing that a task was named or printed may move the terminal's cursor.
    return "".join(c if c.isprintable() else "?" for c in text)


def _width() -> int:
    """The terminal's width; 0 where the output is no terminal."""
    if not sys.stdout.isatty():
        return 0
    try:
        return os.get_terminal_size().columns
    except OSError:
        return 0


def _bold(text: str) -> str:
    return f"\033[1m{text}\033[0m" if sys.stdout.isatty() and "NO_COLOR" not in os.environ else text


def note(text: str) -> None:
    """Something said beside the output, to stderr."""
    print(f"flow: {text}", file=sys.stderr, flush=True)


def duration(seconds: float | None) -> str:
    """3.2s, 4m10s, 2h05m, 3d04h; "" for None."""
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{rest:02}s"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours}h{minutes:02}m"
    days, hours = divmod(hours, 24)
    return f"{days}d{hours:02}h"


def ago(moment: float | None) -> str:
    """How long ago that was."""
    return "" if moment is None else duration(max(0.0, time.time() - moment))


def date(moment: float | None) -> str | None:
    """A moment in local time, to the second."""
    if moment is None:
        return None
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))


def size(size_bytes: float) -> str:
    """A size in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size_bytes < 1024:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.1f} TiB"
