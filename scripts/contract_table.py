#!/usr/bin/env python3
"""Write the table of the contract's cases by backend into docs/backends.md, from a run of the suite.

    scripts/contract_table.py                  # runs the suite on every engine that is here, then writes the table
    scripts/contract_table.py --junit a.xml b.xml   # of runs that were made already: pytest --junit-xml=a.xml ...
    scripts/contract_table.py --check          # says whether the table's cases are those of the suite

A backend's column is from its contract module, `tests/contract/test_local.py` or `tests/engines/test_NAME_contract.py`.
A backend that was not run keeps the column that it had.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "backends.md"
BEGIN, END = "<!-- contract table: begin (make contract-table) -->", "<!-- contract table: end -->"
BACKENDS = ("local", "container", "docker", "ssh", "slurm", "ray")
PASSED, REFUSED, LACKING, FAILED = "✓", "refused", "–", "✗"
WORST = (FAILED, LACKING, REFUSED, PASSED)


def suite() -> dict[str, list[str]]:
    """The cases by group, both in the order in which they run."""
    from flowfn.testing import BackendContract

    groups: dict[str, list[str]] = {}
    for group in reversed(BackendContract.__mro__[1:]):
        cases = [name for name in vars(group) if name.startswith("test_")]
        if cases:
            groups[group.__name__] = cases
    return groups


def modules() -> dict[str, Path]:
    """The contract modules of this repository by backend."""
    found = {name: ROOT / "tests" / "engines" / f"test_{name}_contract.py" for name in BACKENDS}
    found["local"] = ROOT / "tests" / "contract" / "test_local.py"
    return {name: path for name, path in found.items() if path.exists()}


def results(report: Path) -> dict[str, dict[str, str]]:
    """Of one report of pytest: by backend and case, how it went."""
    by_module = {
        str(path.relative_to(ROOT).with_suffix("")).replace("/", "."): name for name, path in modules().items()
    }
    found: dict[str, dict[str, str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        module, _, _ = case.get("classname", "").rpartition(".")
        if module not in by_module:
            continue
        name = case.get("name", "").partition("[")[0]
        mark = PASSED
        if case.find("failure") is not None or case.find("error") is not None:
            mark = FAILED
        elif case.find("skipped") is not None:
            mark = LACKING
        elif any(one.get("name") == "refused" for one in case.iter("property")):
            mark = REFUSED
        column = found.setdefault(by_module[module], {})
        column[name] = min(column.get(name, PASSED), mark, key=WORST.index)  # of several parameters the worst
    return found


def words(case: str) -> str:
    """A case's name, for people."""
    return case.removeprefix("test_").replace("_", " ")


def table(columns: dict[str, dict[str, str]]) -> str:
    """The table, as Markdown."""
    names = [name for name in BACKENDS if name in columns]
    rows = [f"| case | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for group, cases in suite().items():
        rows.append(f"| **{re.sub(r'(?<=[a-z])(?=[A-Z])', ' ', group).lower()}** |" + " |" * len(names))
        for case in cases:
            rows.append(f"| {words(case)} | {' | '.join(columns[name].get(case, '') for name in names)} |")
    return "\n".join(rows)


def read(page: str) -> dict[str, dict[str, str]]:
    """The columns that the page has, by words of the case."""
    inside = page.partition(BEGIN)[2].partition(END)[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in inside.strip().splitlines()]
    if len(lines) < 2:
        return {}
    names = lines[0][1:]
    columns: dict[str, dict[str, str]] = {name: {} for name in names}
    for case, *marks in lines[2:]:
        if not case.startswith("**"):
            for name, mark in zip(names, marks, strict=True):
                columns[name][case] = mark
    return columns


def stale(page: str) -> list[str]:
    """What is wrong with the table: cases that it lacks, or that the suite does not have any more."""
    wanted = {words(case) for cases in suite().values() for case in cases}
    columns = read(page)
    has = {case for column in columns.values() for case in column}
    said = [f"lacks {case!r}" for case in sorted(wanted - has)] + [f"has {case!r}" for case in sorted(has - wanted)]
    return said + [f"lacks the backend {name}" for name in modules() if name not in columns]


def run(names: Iterable[str], folder: Path) -> list[Path]:
    """Run the suites; returns the reports."""
    reports = []
    for name in names:
        report = folder / f"{name}.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junit-xml={report}"]
        subprocess.run([*command, "-o", "junit_family=xunit1", str(modules()[name])], cwd=ROOT)
        if report.exists():
            reports.append(report)
    return reports


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--junit", nargs="+", type=Path, help="reports of runs that were made already")
    parser.add_argument("--backend", nargs="+", choices=list(modules()), default=list(modules()), help="which to run")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the table is out of date")
    arguments = parser.parse_args()
    page = PAGE.read_text()
    if arguments.check:
        if wrong := stale(page):
            sys.exit("docs/backends.md is out of date (make contract-table):\n" + "\n".join(wrong))
        return
    by_words = read(page)
    columns = {
        name: {case: column.get(words(case), "") for cases in suite().values() for case in cases}
        for name, column in by_words.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        for report in arguments.junit or run(arguments.backend, Path(folder)):
            for name, column in results(report).items():
                columns[name] = {**columns.get(name, {}), **column}  # a later report has the last word
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{table(columns)}\n{END}{after}")


if __name__ == "__main__":
    main()
