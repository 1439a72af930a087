"""What a map decides: sizes of batches, who is tried again and when. Nothing runs here."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flowfn.call import retry_delay
from flowfn.map import BATCH_ITEMS, BATCH_S, WINDOW_ITEMS, batch_size
from flowfn.spec import Retries
from flowfn_runtime.exceptions import type_names

SECONDS = st.floats(0, 1e5)
WINDOWS = st.integers(1, WINDOW_ITEMS)
WORKERS = st.integers(1, 512)


@given(st.integers(1, BATCH_ITEMS), SECONDS, WINDOWS, WORKERS)
def test_a_batch_is_never_empty_nor_too_big(current: int, item_s: float, window: int, workers: int) -> None:
    size = batch_size(current, item_s, window, workers)
    assert 1 <= size <= BATCH_ITEMS
    assert size <= max(1, window // workers), "a batch must leave items of the window for other workers"
    assert size <= 4 * current, "one quick item says little about the next"


@given(st.integers(1, BATCH_ITEMS), st.floats(BATCH_S, 1e5), WINDOWS, WORKERS)
def test_long_items_go_one_by_one(current: int, item_s: float, window: int, workers: int) -> None:
    assert batch_size(current, item_s, window, workers) == 1


def test_tiny_items_soon_fill_a_batch() -> None:
    size = 1
    for _ in range(10):
        size = batch_size(size, 1e-7, WINDOW_ITEMS, 4)
    assert size == BATCH_ITEMS


@given(st.integers(1, BATCH_ITEMS), WINDOWS, WORKERS, SECONDS, SECONDS)
def test_slower_items_never_make_bigger_batches(
    current: int, window: int, workers: int, one: float, two: float
) -> None:
    slow, fast = max(one, two), min(one, two)
    assert batch_size(current, slow, window, workers) <= batch_size(current, fast, window, workers)


# retries


def test_only_so_often() -> None:
    types = type_names(ValueError())
    retries = Retries(2, initial_delay=1, jitter=0)
    assert [retry_delay(types, attempt, retries) for attempt in (1, 2, 3, 4)] == [1, 2, None, None]
    assert retry_delay(types, 1, None) is None


def test_only_failures_of_the_function() -> None:
    assert retry_delay([], 1, Retries(5)) is None, "types are empty for what is not the function's"


def test_only_the_types_that_are_named() -> None:
    retries = Retries(5, initial_delay=0, on=(LookupError, OSError))
    assert retry_delay(type_names(KeyError()), 1, retries) == 0
    assert retry_delay(type_names(FileNotFoundError()), 1, retries) == 0
    assert retry_delay(type_names(ValueError()), 1, retries) is None
    assert retry_delay(type_names(KeyboardInterrupt()), 1, Retries(1)) is None, "no Exception"


@given(st.integers(1, 50), st.floats(0, 10), st.floats(1, 3), st.floats(0, 1))
def test_delays_keep_their_bounds(attempt: int, initial: float, backoff: float, jitter: float) -> None:
    retries = Retries(50, initial_delay=initial, backoff=backoff, max_delay=20, jitter=jitter)
    delay = retry_delay(type_names(ValueError()), attempt, retries, seed="call")
    assert delay is not None and 0 <= delay <= 20
    assert delay == retry_delay(type_names(ValueError()), attempt, retries, seed="call")
