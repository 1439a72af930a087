"""flow.Executor is a concurrent.futures.Executor: what takes an executor runs on flowfn's workers.

python examples/executor.py
"""

from __future__ import annotations

import asyncio
import os

import flowfn as flow


def digits_of_factorial(n: int) -> int:
    product = 1
    for factor in range(2, n + 1):
        product *= factor
    return product.bit_length()


async def from_asyncio(executor: flow.Executor) -> list[int]:
    loop = asyncio.get_running_loop()
    return list(
        await asyncio.gather(*(loop.run_in_executor(executor, digits_of_factorial, n) for n in (500, 1000, 2000)))
    )


if __name__ == "__main__":
    with flow.Executor(max_workers=2) as executor:
        print("this process", os.getpid(), "- a worker", executor.submit(os.getpid).result())
        print("map:    ", list(executor.map(digits_of_factorial, range(100, 600, 100), chunksize=2)))
        print("asyncio:", asyncio.run(from_asyncio(executor)))
