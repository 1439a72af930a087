"""What an engine's tests do where the engine can't be had."""

from __future__ import annotations

import os

import pytest


def need(why_not: str | None) -> None:
    """Skip if there is a reason, visibly; where every engine has to be there (FLOW_REQUIRE_ENGINES=1) fail."""
    if why_not is None:
        return
    if os.environ.get("FLOW_REQUIRE_ENGINES") == "1":
        pytest.fail(f"FLOW_REQUIRE_ENGINES=1, and {why_not}", pytrace=False)
    pytest.skip(why_not)


def namespaces() -> str | None:
    """Why there can be no machines in network namespaces, or None."""
    import shutil

    if os.getuid() != 0:
        return "network namespaces with a link between them take root"
    return None if shutil.which("ip") else "there is no ip (apt-get install iproute2)"
