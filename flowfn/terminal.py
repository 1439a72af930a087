"""What a person sees: the output of calls, and progress bars. A pipe or a log gets the output and nothing else."""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

_lock = threading.Lock()
_bar: Progress | None = None  # the one that is drawn now
_partial: dict[tuple[int, bool], bytes] = {}  # of marked lines: what came without its end
_marks: dict[int, tuple[str, str]] = {}
_PARTIAL_BYTES = 1 << 12
REDRAW_S = 0.1


def forget() -> None:
    """In a forked child: nobody holds the lock, and nothing is drawn."""
    global _lock, _bar
    _lock = threading.Lock()
    _bar = None
    _partial.clear()


def show_output(name: str, call: int, where: str, data: bytes, stderr: bool) -> None:
    """Forward what a call printed. On a terminal each line says which call and worker it is of."""
    file = sys.stderr if stderr else sys.stdout
    if file is None:
        return
    with _lock:
        key = (call, stderr)
        data = _partial.pop(key, b"") + data
        if not _is_terminal(file):
            if cut := _incomplete(data):  # a character that came in part
                data, _partial[key] = data[:-cut], data[-cut:]
                _marks[call] = name, where
            _write(file, data)
            return
        lines = data.split(b"\n")
        rest = lines.pop()
        if len(rest) > _PARTIAL_BYTES:
            lines.append(rest)
        elif rest:
            _partial[key] = rest
            _marks[call] = name, where
        mark = f"\x1b[2m[{name}#{call} {where}]\x1b[0m ".encode() if call else f"\x1b[2m[{where}]\x1b[0m ".encode()
        if lines:
            _erase()
            _write(file, b"".join(mark + line + b"\n" for line in lines))
            _draw()


def end_output(call: int) -> None:
    """The call is done: a last line without its end is shown now."""
    if not _partial:
        return
    for stderr in (False, True):
        if _partial.get((call, stderr)):
            name, where = _marks.get(call, ("", ""))
            end = b"\n" if _is_terminal(sys.stderr if stderr else sys.stdout) else b""
            if not end:
                _write(sys.stderr if stderr else sys.stdout, _partial.pop((call, stderr)))
            else:
                show_output(name, call, where, end, stderr)
    _marks.pop(call, None)


def _write(file: Any, data: bytes) -> None:
    # What is not text is shown as far as it can be; in a notebook there is no buffer beneath to write bytes to.
    text = data.decode(errors="replace")
    try:
        try:
            file.write(text)
        except UnicodeEncodeError:
            encoding = getattr(file, "encoding", None) or "ascii"
            file.write(text.encode(encoding, errors="replace").decode(encoding))
        file.flush()
    except (OSError, ValueError):
        pass  # nobody listens any more


def _incomplete(data: bytes) -> int:
    """How many bytes at the end are the beginning of a UTF-8 character."""
    for length in range(1, min(3, len(data)) + 1):
        byte = data[-length]
        if byte >= 0xC0:
            return length if length < (2 if byte < 0xE0 else 3 if byte < 0xF0 else 4) else 0
        if byte < 0x80:
            return 0
    return 0


def _is_terminal(file: Any) -> bool:
    try:
        return bool(file.isatty())
    except (AttributeError, ValueError):
        return False


class Progress:
    """A progress bar on standard error, if that is a terminal, from the first second on. Elsewhere it does nothing."""

    def __init__(self, name: str, total: int | None = None, *, unit: str = "") -> None:
        self.name = name
        self.total = total
        self.unit = unit
        self.done = 0
        self.started = time.monotonic()
        self._drawn = self.started
        self._visible = False
        self._enabled = _is_terminal(sys.stderr)

    def update(self, count: int) -> None:
        """So many more are done."""
        self.done += count
        if not self._enabled:
            return
        now = time.monotonic()
        if now - self._drawn >= REDRAW_S:
            self._drawn = now
            with _lock:
                global _bar
                if _bar is None or _bar is self:
                    _bar = self
                    _draw()

    def close(self) -> None:
        """Leave the last state on the screen."""
        global _bar
        if not self._enabled:
            return
        with _lock:
            if _bar is self:
                _draw()
                _bar = None
                sys.stderr.write("\n")
                sys.stderr.flush()

    def text(self, width: int) -> str:
        """The bar, at most `width` characters wide."""
        seconds = max(time.monotonic() - self.started, 1e-6)
        rate = self.done / seconds
        if self.total:
            share = min(1.0, self.done / self.total)
            left = (self.total - self.done) / rate if rate else 0.0
            room = max(5, min(30, width - len(self.name) - 50))
            bar = ("█" * int(room * share)).ljust(room, "░")
            text = f"{self.name} {bar} {self.done:,}/{self.total:,} {rate:,.1f}/s {clock(left)} left"
        else:
            text = f"{self.name} {self.done:,} done, {rate:,.1f}/s, {clock(seconds)}"
        return text[: width - 1]


def clock(seconds: float) -> str:
    """Seconds as minutes and seconds, for people."""
    whole = int(seconds)
    hours, whole = divmod(whole, 3600)
    return f"{hours}:{whole // 60:02}:{whole % 60:02}" if hours else f"{whole // 60}:{whole % 60:02}"


def _draw() -> None:
    if _bar is not None:
        import shutil

        sys.stderr.write("\r\x1b[K" + _bar.text(shutil.get_terminal_size().columns))
        sys.stderr.flush()


def _erase() -> None:
    if _bar is not None:
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()


_staging: dict[str, Progress] = {}


def staging(progress: dict[str, Any]) -> None:
    """Show how far the staging of a mount is."""
    url = progress["url"]
    bar = _staging.get(url)
    if bar is None:
        bar = _staging[url] = Progress(f"staging {url}", progress.get("total_bytes") or None)
    bar.total = progress.get("total_bytes") or None
    bar.update(progress["done_bytes"] - bar.done)
    if bar.total is not None and bar.done >= bar.total:
        bar.close()
        _staging.pop(url, None)


def staging_over() -> None:
    """A worker is there, or was given up: bars of what it staged are not left on the screen. Others' come again."""
    for url in list(_staging):
        if (bar := _staging.pop(url, None)) is not None:
            bar.close()
