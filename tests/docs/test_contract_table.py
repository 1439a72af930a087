"""The table of the contract's cases in docs/backends.md is of the suite as it is."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("contract_table", ROOT / "scripts" / "contract_table.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_has_every_case_and_every_backend(script: ModuleType) -> None:
    assert not script.stale(script.PAGE.read_text()), "run make contract-table"


def test_no_case_failed_in_the_run_that_it_shows(script: ModuleType) -> None:
    columns = script.read(script.PAGE.read_text())
    failed = [
        (name, case) for name, column in columns.items() for case, mark in column.items() if mark == script.FAILED
    ]
    assert columns and not failed


def test_what_is_out_of_date_is_seen(script: ModuleType) -> None:
    page = script.PAGE.read_text()
    case = script.words(script.suite()["Identity"][0])
    assert script.stale(page.replace(f"| {case} |", "| another case |")) == [
        f"lacks {case!r}",
        "has 'another case'",
    ]


def test_reports_become_columns(script: ModuleType, tmp_path: Path) -> None:
    first, second, third, fourth = script.suite()["Values"][:4]
    where = 'classname="tests.engines.test_ssh_contract.TestSsh"'
    report = tmp_path / "report.xml"
    report.write_text(
        f"""<testsuites><testsuite><testcase {where} name="{first}[1]"/><testcase {where} name="{first}[2]"><failure/>
        </testcase><testcase {where} name="{second}"><skipped/></testcase><testcase {where} name="{third}"><properties>
        <property name="refused" value="gpu"/></properties></testcase><testcase {where} name="{fourth}"/>
        <testcase classname="tests.unit.test_x" name="{second}"/></testsuite></testsuites>"""
    )
    found = script.results(report)
    assert found == {"ssh": {first: "✗", second: "–", third: "refused", fourth: "✓"}}
    assert script.read(f"{script.BEGIN}\n{script.table(found)}\n{script.END}")["ssh"][script.words(third)] == "refused"
