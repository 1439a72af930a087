from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_scene import Scene


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    """A place for real programs; whatever they do, nothing of them may be left at the end."""
    place = Scene(tmp_path)
    try:
        yield place
        place.check_nothing_left()
    finally:
        place.close()
