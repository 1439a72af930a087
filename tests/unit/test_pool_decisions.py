from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowfn.pool import Load, Ticket, to_start

COUNTS = st.integers(0, 100)


@given(COUNTS, COUNTS, COUNTS, st.integers(1, 100))
def test_never_more_workers_than_allowed_nor_than_calls(waiting: int, starting: int, alive: int, most: int) -> None:
    new = to_start(Load(waiting, starting, alive, most))
    assert new >= 0
    if new:
        assert alive + starting + new <= most
        assert starting + new <= waiting


@given(COUNTS, COUNTS, COUNTS, st.integers(1, 100))
def test_whoever_waits_gets_one_if_there_is_room(waiting: int, starting: int, alive: int, most: int) -> None:
    new = to_start(Load(waiting, starting, alive, most))
    if waiting > starting and alive + starting < most:
        assert new >= 1
    assert new == to_start(Load(waiting, starting, alive, most)), "a decision and nothing else"


@pytest.mark.parametrize(
    ("load", "new"),
    [
        (Load(waiting=0, starting=0, alive=0, most=4), 0),
        (Load(waiting=1, starting=0, alive=0, most=4), 1),
        (Load(waiting=9, starting=0, alive=0, most=4), 4),
        (Load(waiting=9, starting=2, alive=1, most=4), 1),
        (Load(waiting=2, starting=2, alive=0, most=4), 0),
        (Load(waiting=3, starting=0, alive=4, most=4), 0),
    ],
)
def test_by_example(load: Load, new: int) -> None:
    assert to_start(load) == new


def test_a_ticket_is_opened_once_however_often_it_is_tried() -> None:
    ticket = Ticket()
    openers = [threading.Thread(target=ticket.open) for _ in range(8)]
    for opener in openers:
        opener.start()
    ticket.wait()
    for opener in openers:
        opener.join()
