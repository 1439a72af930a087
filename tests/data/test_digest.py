"""The digest of a file that arrives in pieces, in any order."""

from __future__ import annotations

import hashlib
import os
import random
import threading
from pathlib import Path

import pytest

from flowfn_runtime.data import digest
from flowfn_runtime.data.connection import BUFFER_BYTES
from flowfn_runtime.data.digest import Digest, Spares

PART = 300_000


def arrive(made: Digest, fd: int, data: bytes, part: int, step: int) -> None:
    end = min((part + 1) * PART, len(data))
    for position in range(part * PART, end, step):
        piece = data[position : min(position + step, end)]
        os.pwrite(fd, piece, position)
        memory = memoryview(bytearray(BUFFER_BYTES))
        memory[: len(piece)] = piece
        if made.arrived(part, position + len(piece), memory[: len(piece)]) is None:
            memory[: len(piece)] = bytes(len(piece))  # it is received into again


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("threads", "spares"), [(1, 0), (3, 0), (1, 3), (3, 3), (3, 50)])
def test_parts_come_in_any_order(tmp_path: Path, seed: int, threads: int, spares: int) -> None:
    data = random.Random(seed).randbytes(random.Random(seed).randint(1, 12 * PART))
    parts = list(range(-(-len(data) // PART)))
    random.Random(seed).shuffle(parts)
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    made = Digest(fd, len(data), PART, Spares(spares))
    waiting = iter(parts)

    def work() -> None:
        for part in waiting:
            arrive(made, fd, data, part, 70_000)

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert made.result() == hashlib.md5(data).hexdigest()
    os.close(fd)


def test_nobody_runs_far_ahead_and_the_next_part_never_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "_AHEAD_BYTES", 2 * PART)
    data = os.urandom(6 * PART)
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    made = Digest(fd, len(data), PART, Spares(2))
    turns: list[int] = []
    for part in (0, 1, 2):
        made.wait_for_turn(part)

    def far() -> None:
        made.wait_for_turn(3)
        turns.append(3)

    thread = threading.Thread(target=far)
    thread.start()
    for part in (1, 2):
        arrive(made, fd, data, part, PART)
    thread.join(0.1)
    assert not turns  # nothing is hashed yet: the first part is missing
    arrive(made, fd, data, 0, PART)
    thread.join()
    assert turns == [3]
    for part in (3, 4, 5):
        arrive(made, fd, data, part, PART)
    assert made.result() == hashlib.md5(data).hexdigest()
    os.close(fd)


def test_giving_up_frees_whoever_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "_AHEAD_BYTES", PART)
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    made = Digest(fd, 10 * PART, PART, Spares(2))
    thread = threading.Thread(target=made.wait_for_turn, args=(9,))
    thread.start()
    made.close()
    thread.join()
    with pytest.raises(OSError, match="given up"):
        made.result()
    os.close(fd)


def test_a_file_that_can_not_be_read_is_an_error(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    made = Digest(fd, PART, PART, Spares(0))
    made.arrived(0, PART, memoryview(bytes(PART)))  # so it says, but nothing is there
    with pytest.raises(OSError, match="shorter"):
        made.result()
    os.close(fd)


def test_without_a_thread_the_result_is_made_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class NoThread(threading.Thread):
        def start(self) -> None:
            raise RuntimeError("can't start new thread")

    data = os.urandom(2 * PART)
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    with monkeypatch.context() as patch:
        patch.setattr(threading, "Thread", NoThread)
        made = Digest(fd, len(data), PART, Spares(1))
    for part in (1, 0):
        made.wait_for_turn(part)
        arrive(made, fd, data, part, PART)
    assert made.result() == hashlib.md5(data).hexdigest()
    os.close(fd)
