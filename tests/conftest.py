from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def flow_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A flowfn home and cache of the test's own."""
    home = tmp_path / "flow-home"
    monkeypatch.setenv("FLOW_HOME", str(home))
    monkeypatch.setenv("FLOW_CACHE", str(tmp_path / "flow-cache"))
    for name in ("FLOW_BACKEND", "FLOW_GPUS", "FLOW_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    yield home
