"""One process of a crew: reads its share of the work from stdin, does it as the parent would, and reports on stdout.

It ends when stdin does, so nothing outlives a parent that was killed.
"""

from __future__ import annotations

import gc
import os
import pickle
import sys
import threading
from typing import IO

from flowfn_runtime.data import transfer
from flowfn_runtime.data.depot import Depot, ObjectJob
from flowfn_runtime.data.model import Object
from flowfn_runtime.data.sources import open_source


def main() -> None:
    """Be one, and end."""
    _work(sys.stdin.buffer, sys.stdout.buffer)
    # Not by way of the interpreter's end, which would wait for the thread that reads stdin.
    os._exit(0)


def _work(stdin: IO[bytes], stdout: IO[bytes]) -> None:
    root, recipe, share = pickle.load(stdin)
    gc.disable()  # what it would look for ends with the process
    threading.Thread(target=_end_with_parent, args=(stdin,), daemon=True).start()
    source = open_source(*recipe)
    depot = Depot(root, source.url)
    jobs = [ObjectJob(depot, Object(*object), name, path) for object, name, path in share]
    numbers = {id(job): number for number, job in enumerate(jobs)}

    def tell(kind: str, value: object) -> None:
        pickle.dump((kind, value), stdout, protocol=5)
        stdout.flush()

    try:
        fetched = transfer.fetch(
            source, jobs, progress=lambda progress: tell("progress", (progress.done_bytes, progress.done_objects))
        )
        deferred = [numbers[id(job)] for job in depot.deferred]
        tell("done", (fetched, [job.arrived for job in jobs], deferred))
    except BaseException as error:
        tell("failed", error)


def _end_with_parent(stdin: IO[bytes]) -> None:
    stdin.read()
    os._exit(1)
