"""flowfn on an engine beside the engine by hand, doing the same work.

    python benchmarks/engines.py                       # every engine that is here
    python benchmarks/engines.py --engine slurm --rounds 5 --out engines.jsonl

Prints one JSON line for each peer and metric: the median over interleaved rounds, and the ratio to flowfn (above 1,
flowfn is ahead), then one for each target. An engine or peer that is missing is left out, and said to be. An engine's
part is one function in a module of its own, which starts the engine if need be; the cases are in `engines_common`.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable

from common import HERE, PeerMissing, Results

ENGINES = [name for name in ("slurm", "ssh", "container", "ray") if (HERE / f"engines_{name}.py").exists()]


def part(name: str) -> Callable[[Results, int], None]:
    """An engine's own."""
    function: Callable[[Results, int], None] = getattr(importlib.import_module(f"engines_{name}"), name)
    return function


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default=",".join(ENGINES), help="which, separated by commas")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", help="a file for the JSON lines, in place of standard output")
    arguments = parser.parse_args()
    with open(arguments.out, "w") if arguments.out else sys.stdout as out:
        results = Results(out)
        for name in arguments.engine.split(","):
            try:
                part(name)(results, arguments.rounds)
            except PeerMissing as error:
                results.left_out(name, "flowfn", str(error))


if __name__ == "__main__":
    main()
