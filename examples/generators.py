"""A generator function streams: each item arrives when it is yielded, and a slow reader slows the writer down.

python examples/generators.py
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

import flowfn as flow


@flow.function
def countdown(n: int) -> Iterator[str]:
    for left in range(n, 0, -1):
        time.sleep(0.1)
        yield f"{left} to go"


@flow.function
def naturals() -> Iterator[int]:
    yield from itertools.count()


if __name__ == "__main__":
    started = time.perf_counter()
    for line in countdown.remote(3):
        print(f"{time.perf_counter() - started:4.1f} s  {line}")

    # It never ends of itself; leaving the loop ends it.
    print("the first ones:", list(itertools.islice(naturals.remote(), 5)))
