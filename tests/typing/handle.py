"""What a type checker must see in a Function's handle. Read by mypy --strict and by pyright; never run."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterator

from typing_extensions import assert_type

import flowfn as flow


@flow.function
def bare(x: int, *, scale: float = 1.0) -> str:
    return str(x * scale)


@flow.function(gpu="a100:4", cpu=2, memory="32GiB", timeout=60, retries=flow.Retries(max_retries=3), max_workers=2)
def with_options(x: int) -> list[float]:
    return [float(x)]


@flow.function
def no_arguments() -> None:
    return None


@flow.function
async def asynchronous(x: int) -> bytes:
    return bytes(x)


@flow.function(mounts={"/data": "s3://bucket/prefix"})
def generator(n: int) -> Iterator[str]:
    yield str(n)


class Model:
    @flow.function
    def predict(self, x: float) -> bool:
        return x > 0


assert_type(bare(1), str)
assert_type(bare.local(1, scale=2.0), str)
assert_type(bare.remote(1, scale=2.0), str)
assert_type(bare.spawn(1), flow.Future[str])
assert_type(bare.spawn(1).result(), str)
assert_type(bare.spawn(1).result(timeout=5), str)
assert_type(with_options.remote(1), list[float])
assert_type(no_arguments.spawn().result(), None)

# Options make another handle of the same type.
assert_type(bare.options(gpu="h100", timeout=5).remote(1, scale=3.0), str)
assert_type(bare.options(backend="slurm").spawn(1).result(), str)

for one in bare.map([1, 2, 3]):
    assert_type(one, str)
for one in bare.starmap([(1,), (2,)]):
    assert_type(one, str)
assert_type(bare.for_each([1, 2]), None)

# An async function's call is its result, once it has run in the worker.
assert_type(asynchronous.remote(1), bytes)
assert_type(asynchronous.spawn(1).result(), bytes)

# A generator function's call is an iterator.
for item in generator.remote(3):
    assert_type(item, str)

# A method has its instance as its first argument.
assert_type(Model().predict(1.0), bool)
assert_type(Model().predict.remote(1.0), bool)


async def awaiting() -> None:
    assert_type(await bare.spawn(1), str)
    assert_type(await asynchronous.spawn(1), bytes)
    async for one in bare.map([1, 2]):
        assert_type(one, str)


def as_standard_library(future: flow.Future[str]) -> concurrent.futures.Future[str]:
    return future


def as_executor() -> concurrent.futures.Executor:
    with flow.Executor(max_workers=2) as executor:
        assert_type(executor.submit(len, "abc").result(), int)
    return flow.Executor()


def takes_a_handle(function: flow.Function[[int], list[float]]) -> list[float]:
    return function.remote(1)


takes_a_handle(with_options)
