"""Futures: start calls, do something else, take results as they come, cancel, and read what was printed.

python examples/futures.py
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import time

import flowfn as flow


@flow.function(retries=flow.Retries(max_retries=2, initial_delay=0.05), timeout=30)
def work(seconds: float) -> float:
    print(f"working for {seconds} s")
    time.sleep(seconds)
    return seconds


async def both() -> list[float]:
    return list(await asyncio.gather(work.spawn(0.1), work.spawn(0.2)))


if __name__ == "__main__":
    # A flow.Future is a concurrent.futures.Future: the standard library's functions take it.
    futures = [work.spawn(seconds) for seconds in (0.3, 0.2, 0.1)]
    for future in concurrent.futures.as_completed(futures):
        print("done:", future.result())

    # And it can be awaited.
    print("awaited:", asyncio.run(both()))

    # Running work is cancelled as well: its worker is ended, and another one takes its place.
    running = work.spawn(600)
    print("cancelled:", running.cancel(), running.status)

    print("it printed:", futures[0].logs())
