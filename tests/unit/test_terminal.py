"""What is shown on terminals (a real one: a pty) and what in pipes."""

from __future__ import annotations

import io
import os
import pty
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowfn import terminal


class Screen:
    """A terminal as `sys.stdout` and `sys.stderr`; `text()` is what was written to it."""

    def __init__(self) -> None:
        self._master, slave = pty.openpty()
        self.file = open(slave, "w", encoding="utf-8")

    def use(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """From here on; not in a fixture, after which pytest puts streams of its own there."""
        monkeypatch.setattr(sys, "stdout", self.file)
        monkeypatch.setattr(sys, "stderr", self.file)

    def text(self) -> str:
        self.file.flush()
        os.set_blocking(self._master, False)
        seen = b""
        try:
            while data := os.read(self._master, 65536):
                seen += data
        except OSError:
            pass
        return seen.decode(errors="replace").replace("\r\n", "\n")

    def close(self) -> None:
        self.file.close()
        os.close(self._master)


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Screen]:
    made = Screen()
    yield made
    monkeypatch.undo()
    made.close()


def test_a_pipe_gets_the_output_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    terminal.show_output("f", 1, "local pid 7", b"one\ntwo", False)
    terminal.show_output("f", 1, "local pid 7", b" and more\n", False)
    terminal.show_output("f", 1, "local pid 7", b"oh\n", True)
    progress = terminal.Progress("f", 10)
    progress.update(10)
    progress.close()
    assert out.getvalue() == "one\ntwo and more\n" and err.getvalue() == "oh\n"


def test_a_terminal_says_whose_line_it_is(screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    screen.use(monkeypatch)
    terminal.show_output("train", 3, "local pid 7", b"one\ntwo\n", False)
    lines = screen.text().split("\n")
    assert len(lines) == 3 and all("train#3" in line and "local pid 7" in line for line in lines[:2])
    assert lines[0].endswith("one") and lines[1].endswith("two")


def test_lines_in_pieces_are_shown_whole(screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    screen.use(monkeypatch)
    terminal.show_output("f", 11, "here", b"first ", False)
    terminal.show_output("g", 12, "there", b"another\n", False)
    terminal.show_output("f", 11, "here", b"half\nlast", False)
    terminal.end_output(11)
    text = screen.text()
    assert "first half\n" in text and "another\n" in text and "last\n" in text
    assert text.index("another") < text.index("first half")


def test_binary_and_very_long_lines_harm_nothing(screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    screen.use(monkeypatch)
    terminal.show_output("f", 21, "here", bytes(range(256)) + b"\n", False)
    screen.text()
    terminal.show_output("f", 21, "here", b"x" * 3000, False)
    assert screen.text() == ""
    terminal.show_output("f", 21, "here", b"x" * 3000, False)
    assert "x" * 1000 in screen.text(), "a line without an end is shown some time"
    terminal.end_output(21)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_streams_of_any_encoding(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding, write_through=True))
    terminal.show_output("f", 1, "x", "snow ☃\n".encode(), False)
    terminal.show_output("f", 1, "x", b"\xff\xfe\n", False)
    assert raw.getvalue().startswith(b"snow ") and raw.getvalue().count(b"\n") == 2


def test_a_character_that_comes_in_two_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    snow = "☃☃\n".encode()
    terminal.show_output("f", 31, "x", snow[:4], False)
    terminal.show_output("f", 31, "x", snow[4:], False)
    terminal.end_output(31)
    assert out.getvalue() == "☃☃\n"


def test_a_stream_that_is_closed_or_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    for stream in (closed, None):
        monkeypatch.setattr(sys, "stdout", stream)
        terminal.show_output("f", 1, "x", b"nobody hears\n", False)


def test_a_bar_and_output_do_not_mix(screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    screen.use(monkeypatch)
    monkeypatch.setattr(terminal, "REDRAW_S", 0.0)
    progress = terminal.Progress("sweep", 4)
    progress.update(1)
    assert "sweep" in screen.text()
    terminal.show_output("f", 1, "here", b"a line\n", False)
    text = screen.text()
    assert text.index("\x1b[K") < text.index("a line") < text.rindex("sweep")
    progress.update(3)
    progress.close()
    assert "4/4" in screen.text() and screen.text() == ""
    terminal.show_output("f", 1, "here", b"after\n", False)
    assert "sweep" not in screen.text()


@given(
    st.text(max_size=200),
    st.none() | st.integers(0, 10**9),
    st.integers(0, 10**10),
    st.integers(10, 300),
)
def test_a_bar_fits_its_line(name: str, total: int | None, done: int, width: int) -> None:
    progress = terminal.Progress(name, total)
    progress.done = done
    assert len(progress.text(width)) < width


@pytest.mark.parametrize(("seconds", "shown"), [(0, "0:00"), (61.9, "1:01"), (3600, "1:00:00"), (360000, "100:00:00")])
def test_durations_for_people(seconds: float, shown: str) -> None:
    assert terminal.clock(seconds) == shown


def test_staging_is_shown_to_its_end(screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    screen.use(monkeypatch)
    monkeypatch.setattr(terminal, "REDRAW_S", 0.0)
    state: dict[str, Any] = {"url": "s3://b/p", "total_bytes": 10}
    for done in (1, 5, 10):
        terminal.staging({**state, "done_bytes": done})
    assert "staging s3://b/p" in screen.text() and "s3://b/p" not in terminal._staging


def test_staging_that_was_given_up_leaves_the_screen_to_others(screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    screen.use(monkeypatch)
    monkeypatch.setattr(terminal, "REDRAW_S", 0.0)
    terminal.staging({"url": "s3://b/q", "total_bytes": 10, "done_bytes": 5})
    terminal.staging_over()
    progress = terminal.Progress("next", 3)
    progress.update(1)
    progress.close()
    shown = screen.text()
    assert "5/10" in shown and "next" in shown and not terminal._staging
