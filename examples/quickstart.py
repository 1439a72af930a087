"""Train on data in a bucket, sweep, keep the best model in a volume, and use it: the whole of flowfn in one file.

    python examples/quickstart.py                        # with an S3 server that this example starts on loopback
    python examples/quickstart.py s3://my-bucket/digits  # with a bucket of yours (the data is put there if missing)

The data are real: 1,797 handwritten digits, see data/README.md. The model is small: one hidden layer, in numpy.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gzip
import itertools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import fsspec
import numpy as np
import numpy.typing as npt
from loopback_s3 import s3_server

import flowfn as flow
from flowfn_runtime import paths

HERE = Path(__file__).parent
BUCKET = "s3://flowfn-quickstart/digits"
MOUNTS = {"/data": BUCKET, "/models": "volume://flowfn-quickstart"}

Array = npt.NDArray[np.float64]
T = TypeVar("T")


@dataclass(frozen=True)
class Trained:
    """What a call of `train` returns."""

    learning_rate: float
    hidden: int
    accuracy: float  # on digits that the training did not see, 0 to 1
    model: dict[str, Array]
    reading_s: float
    training_s: float
    where: str  # the process that ran it
    paths: str  # what it saw


@flow.function(cpu=1, mounts=MOUNTS, timeout=120)
def train(learning_rate: float, hidden: int = 32, epochs: int = 30) -> Trained:
    """Train on two thirds of the digits, measure on the rest. Runs in a worker, which has /data and /models."""
    started = time.perf_counter()
    pixels, digits = read(Path("/data/digits.csv.gz"))
    split = len(pixels) * 2 // 3
    read_at = time.perf_counter()
    model = fit(pixels[:split], digits[:split], learning_rate, hidden, epochs)
    accuracy = float(np.mean(predicted(model, pixels[split:]) == digits[split:]))
    done_at = time.perf_counter()
    seen = "; ".join(described(Path(target)) for target in MOUNTS)
    return Trained(learning_rate, hidden, accuracy, model, read_at - started, done_at - read_at, here(), seen)


@flow.function(mounts=MOUNTS)
def keep(best: Trained) -> str:
    """Write the model into the volume."""
    path = Path("/models/best.npz")
    np.savez(path, **best.model)  # type: ignore[arg-type, unused-ignore]  # numpy's stubs take arrays for options
    return f"{here()} wrote {path}, {path.stat().st_size:,} bytes"


@flow.function(mounts=MOUNTS)
def recognise(images: Array) -> list[int]:
    """Say which digits the images show, with the model in the volume."""
    with np.load("/models/best.npz") as model:
        return [int(digit) for digit in predicted(dict(model), images)]


# Ordinary functions: what the decorated ones use goes along with them.


def here() -> str:
    """Which process this is; a sandbox numbers its own."""
    return f"process {os.getpid()} of a sandbox"


def described(folder: Path) -> str:
    """What is in a folder, and whether it can be written to."""
    names = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing yet"
    return f"{folder} ({'writable' if os.access(folder, os.W_OK) else 'read-only'}) has {names}"


def read(path: Path) -> tuple[Array, npt.NDArray[np.int64]]:
    with gzip.open(path, "rt") as lines:
        table = np.loadtxt(lines, delimiter=",")
    return table[:, :-1] / 16, table[:, -1].astype(np.int64)


def fit(
    pixels: Array, digits: npt.NDArray[np.int64], learning_rate: float, hidden: int, epochs: int
) -> dict[str, Array]:
    """One hidden layer, by stochastic gradient descent in batches of 32."""
    random = np.random.default_rng(0)
    w1, b1 = random.normal(0, 0.2, (pixels.shape[1], hidden)), np.zeros(hidden)
    w2, b2 = random.normal(0, 0.2, (hidden, 10)), np.zeros(10)
    wanted = np.eye(10)[digits]
    for _ in range(epochs):
        for batch in np.array_split(random.permutation(len(pixels)), len(pixels) // 32):
            x = pixels[batch]
            inner = np.maximum(x @ w1 + b1, 0)
            wrong = (softmax(inner @ w2 + b2) - wanted[batch]) / len(batch)
            back = (wrong @ w2.T) * (inner > 0)
            w2 -= learning_rate * (inner.T @ wrong)
            b2 -= learning_rate * wrong.sum(0)
            w1 -= learning_rate * (x.T @ back)
            b1 -= learning_rate * back.sum(0)
    return {"w1": w1, "b1": b1, "w2": w2, "b2": b2}


def softmax(scores: Array) -> Array:
    powers: Array = np.exp(scores - scores.max(1, keepdims=True))
    shares: Array = powers / powers.sum(1, keepdims=True)
    return shares


def predicted(model: dict[str, Array], pixels: Array) -> npt.NDArray[np.intp]:
    inner: Array = np.maximum(pixels @ model["w1"] + model["b1"], 0)
    digits: npt.NDArray[np.intp] = np.argmax(inner @ model["w2"] + model["b2"], axis=1)
    return digits


def main() -> None:
    parser = argparse.ArgumentParser(description="Train on digits in a bucket, sweep, keep the best model, use it.")
    parser.add_argument("url", nargs="?", help="a bucket or prefix of yours, s3://...; default: a server on loopback")
    url = parser.parse_args().url
    began = time.perf_counter()
    with contextlib.ExitStack() as stack:
        if url:
            source = f"{url}, your bucket"
        else:
            url = BUCKET
            endpoint = stack.enter_context(s3_server("flowfn-quickstart"))
            source = f"{url}, on an S3 server that this example started: {endpoint}"
        run(url.rstrip("/"), source)
    print(f"\nAll of it took {time.perf_counter() - began:.1f} s. `flow volume ls` shows the volume that is left.")


def run(url: str, source: str) -> None:
    heading(1, "The data, in a bucket")
    target = fsspec.open(f"{url}/digits.csv.gz", "wb")
    if target.fs.exists(target.path):
        print("   there already:", source)
    else:
        with target as out:
            out.write((HERE / "data" / "digits.csv.gz").read_bytes())
        print("   put there:", source)

    # The same three functions, on the bucket that was chosen.
    mounts = {**MOUNTS, "/data": url}
    on_bucket = train.options(mounts=mounts)

    heading(2, "One call: train.remote(0.1)")
    first, took = timed(lambda: on_bucket.remote(0.1))
    inside = first.reading_s + first.training_s
    print(f"   here:        process {os.getpid()}; there is {'a' if Path('/data').exists() else 'no'} /data")
    print(f"   it ran in:   {first.where}; {first.paths}")
    print(f"   accuracy:    {first.accuracy:.1%} of the digits it had not seen")
    print(f"   time:        {took:.2f} s, {inside:.2f} s of it in the function ({first.reading_s:.2f} s reading,")
    print(f"                {first.training_s:.2f} s training); in the rest the worker started, and the bucket was")
    print(f"                staged into {paths.cache()}")
    again, took = timed(lambda: on_bucket.remote(0.1))
    inside = again.reading_s + again.training_s
    print(f"   once more:   {took:.2f} s, {inside:.2f} s of it in the function: no download, the worker is warm")

    heading(3, "A sweep: train.map(...), streamed in order, on all the workers at once")
    rates, sizes = zip(*itertools.product((0.03, 0.1, 0.3, 1.0), (8, 32, 64)), strict=True)
    sweep, took = timed(lambda: list(on_bucket.map(rates, sizes)))
    for rate in sorted({result.learning_rate for result in sweep}):
        row = [f"{r.hidden:3d} hidden {r.accuracy:.1%}" for r in sweep if r.learning_rate == rate]
        print(f"   learning rate {rate:<4}  {'   '.join(row)}")
    inside = sum(result.reading_s + result.training_s for result in sweep)
    workers = len({result.where for result in sweep})
    print(f"   {len(sweep)} calls on {workers} workers: {took:.2f} s for {inside:.2f} s of work")
    best = max(sweep, key=lambda result: result.accuracy)

    heading(4, "Futures: train.spawn(...), awaited")
    longer, took = timed(lambda: asyncio.run(train_longer(on_bucket, best)))
    for result, epochs in zip(longer, (60, 120), strict=True):
        print(f"   {epochs:3d} epochs: {result.accuracy:.1%}")
    print(f"   both at the same time: {took:.2f} s")
    best = max([best, *longer], key=lambda result: result.accuracy)

    heading(5, "A volume: one call writes the best model, another one uses it")
    print("  ", keep.options(mounts=mounts).remote(best))
    pixels, digits = read(HERE / "data" / "digits.csv.gz")
    sample = slice(-12, None)
    answer = recognise.options(mounts=mounts).remote(pixels[sample])
    print(f"   into {flow.get_volume('flowfn-quickstart').path}")
    print(f"   recognised: {' '.join(map(str, answer))}")
    print(f"   written:    {' '.join(map(str, digits[sample]))}")


async def train_longer(function: flow.Function[..., Trained], best: Trained) -> list[Trained]:
    futures = [function.spawn(best.learning_rate, best.hidden, epochs=epochs) for epochs in (60, 120)]
    return list(await asyncio.gather(*futures))


def heading(number: int, text: str) -> None:
    print(f"\n{number}  {text}", flush=True)


def timed(action: Callable[[], T]) -> tuple[T, float]:
    started = time.perf_counter()
    return action(), time.perf_counter() - started


if __name__ == "__main__":
    main()
