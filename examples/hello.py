"""The smallest example: the same function called here, in a worker, and many times at once.

python examples/hello.py
"""

from __future__ import annotations

import os

import flowfn as flow


@flow.function
def square(n: int) -> tuple[int, int]:
    return n * n, os.getpid()


if __name__ == "__main__":
    print("here:       ", square(7))
    print("in a worker:", square.remote(7))
    for result, pid in square.map(range(5)):
        print(f"map:         {result:2d} from process {pid}")
    try:
        square.remote("seven")  # type: ignore[arg-type]  # the type checker sees it as well
    except TypeError as error:
        print("an error:   ", error, "(with its own type, as from a local call)")
