"""Measuring side by side: peers in processes of their own, asked in turn, round after round.

What is compared is measured minutes apart on a machine that has its moods: every round asks every peer, so that a slow
minute is slow for all of them. Numbers are medians over the rounds. Ratios say how much longer (or how much less) a
peer takes than flowfn: above 1, flowfn is ahead.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

HERE = Path(__file__).parent
# Ray opens ports and shared memory by name; in namespaces of its own it meets nobody else's.
NAMESPACES = ("unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc")


class PeerMissing(Exception):
    """The peer can't be measured here; the message says why."""


class Peer:
    """A library in a process of its own, that runs one case at a time when asked."""

    def __init__(self, name: str, *, workers: int, timeout_s: float) -> None:
        self.name = name
        self._timeout_s = timeout_s
        self._process = subprocess.Popen(
            [*isolation(name), sys.executable, str(HERE / "peers.py"), name, str(workers)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=sys.stderr if os.environ.get("BENCH_DEBUG") else subprocess.DEVNULL,
            env=environment(),
            start_new_session=True,
        )
        try:
            self._reply()  # it is ready, or says what it lacks
        except BaseException:
            self.close()
            raise

    def ask(self, case: str, **options: Any) -> dict[str, Any]:
        """Run a case once; returns variants and what was measured of each."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"case": case, **options}).encode() + b"\n")
        self._process.stdin.flush()
        return self._reply()

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(self._timeout_s):
                self.close()
                raise PeerMissing(f"no answer within {self._timeout_s:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise PeerMissing(f"its process ended with status {self._process.wait()}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise PeerMissing(reply["error"])
        return reply

    def close(self) -> None:
        """End the peer and all that it started."""
        with contextlib.suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            pass
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


def isolation(name: str) -> list[str]:
    """The words before a peer's command; raises PeerMissing where it must be isolated and can't be."""
    if name != "ray":
        return []
    words = [*NAMESPACES] if os.geteuid() == 0 else [NAMESPACES[0], "--map-root-user", *NAMESPACES[1:]]
    if shutil.which("unshare") is None or subprocess.run([*words, "true"], capture_output=True).returncode:
        raise PeerMissing("it runs in namespaces of its own only, and `unshare` can't make them here")
    return words


def environment() -> dict[str, str]:
    """Of every process that is measured."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("COVERAGE", "COV_"))}
    return {
        **kept,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # One thread a process: the processes are what is compared.
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }


def wall_s(command: Sequence[str]) -> tuple[float, str]:
    """How long a process takes from its start to its end, and the last line that it prints.

    `BENCH_STARTED` in its environment is the monotonic clock at its start.
    """
    started = time.monotonic()
    ended = subprocess.run(
        command,
        env={**environment(), "BENCH_STARTED": repr(started)},
        capture_output=True,
        text=True,
    )
    took = time.monotonic() - started
    if ended.returncode:
        raise PeerMissing((ended.stderr.strip().splitlines() or [f"status {ended.returncode}"])[-1][:200])
    return took, (ended.stdout.splitlines() or [""])[-1]


@dataclass
class Series:
    """The rounds of one peer in one case."""

    case: str
    peer: str
    metric: str
    unit: str
    higher_is_better: bool
    values: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.values)


class Results:
    """Everything measured so far: kept, printed as JSON lines, and shown."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._series: dict[tuple[str, str, str], Series] = {}
        self.missing: dict[tuple[str, str], str] = {}

    def add(
        self, case: str, peer: str, metric: str, unit: str, value: float, *, higher_is_better: bool = False
    ) -> None:
        series = self._series.setdefault((case, peer, metric), Series(case, peer, metric, unit, higher_is_better))
        series.values.append(value)

    def left_out(self, case: str, peer: str, why: str) -> None:
        """A peer that is not in this case: said, never silent."""
        self.missing[case, peer] = why
        self._print({"case": case, "peer": peer, "left_out": why})

    def get(self, case: str, peer: str, metric: str) -> float | None:
        """The median of the rounds; None if it was not measured."""
        series = self._series.get((case, peer, metric))
        return series.median if series else None

    def best(self, case: str, peers: Sequence[str], metric: str) -> float | None:
        """The best of several peers' medians."""
        series = [self._series[key] for peer in peers if (key := (case, peer, metric)) in self._series]
        if not series:
            return None
        medians = [one.median for one in series]
        return max(medians) if series[0].higher_is_better else min(medians)

    def print_case(self, case: str) -> None:
        """One JSON line for each peer and metric of the case."""
        for (of, peer, metric), series in self._series.items():
            if of == case:
                row: dict[str, Any] = {
                    "case": case,
                    "peer": peer,
                    metric: significant(series.median),
                    "unit": series.unit,
                    "lowest": significant(min(series.values)),
                    "highest": significant(max(series.values)),
                    "rounds": len(series.values),
                }
                compared = peer not in ("flowfn", "python") and series.unit != "MiB"
                if compared and (ours := self.get(case, "flowfn", metric)) and series.median > 0:
                    ratio = ours / series.median if series.higher_is_better else series.median / ours
                    row["ratio"] = significant(ratio)
                self._print(row)

    def print_target(self, text: str, value: float | None, limit: float, *, at_least: bool) -> bool | None:
        """One JSON line for a target. None where what it needs was not measured."""
        met = None if value is None else (value >= limit if at_least else value <= limit)
        self._print(
            {
                "target": text,
                "value": None if value is None else significant(value),
                "at_least" if at_least else "at_most": significant(limit),
                "met": met,
            }
        )
        return met

    def _print(self, row: Mapping[str, Any]) -> None:
        print(json.dumps(row, ensure_ascii=False), file=self._out, flush=True)


def significant(value: float, digits: int = 3) -> float:
    """Rounded to so many significant digits."""
    return float(f"{value:.{digits}g}")


def in_turn(rounds: int, actions: Mapping[str, Callable[[], None]]) -> Iterator[tuple[str, Exception]]:
    """Call every action once a round; one that fails is left out of the rounds that follow, and yielded."""
    actions = dict(actions)
    for _ in range(rounds):
        for name, action in list(actions.items()):
            try:
                action()
            except PeerMissing as error:
                del actions[name]
                yield name, error
