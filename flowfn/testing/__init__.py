"""The contract of a backend as a test suite, for the backends of flowfn and for those of others.

```python
import pytest
from flowfn.testing import BackendContract

class TestMine(BackendContract):
    unsupported = {"gpu", "volumes"}

    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls):
        with started_cluster() as cluster:
            yield MyBackend(cluster.url)
```

Every case runs real calls on the backend. What it says it can't do (`unsupported`, see `FEATURES`) it must refuse
clearly; the cases that need it are skipped. docs/backends.md says more.
"""

from __future__ import annotations

try:
    import pytest
except ImportError as error:
    raise ImportError("flowfn.testing needs pytest: pip install pytest") from error

for _name in (
    "base",
    "calls",
    "control",
    "data",
    "failures",
    "kinds",
    "lifecycle",
    "losses",
    "maps",
    "output",
    "resources",
    "tasks",
):
    pytest.register_assert_rewrite(f"flowfn.testing.{_name}")

from .base import FEATURES, Contract, Meeting, needs  # noqa: E402
from .calls import Identity, Values  # noqa: E402
from .control import Cancelling, Futures, Timeouts  # noqa: E402
from .data import Mounts, Put, References  # noqa: E402
from .failures import Exceptions, Serialization  # noqa: E402
from .kinds import Generators, Kinds  # noqa: E402
from .lifecycle import CleaningUp, Executors, ProjectCode  # noqa: E402
from .losses import LostWorkers, Retrying, Versions  # noqa: E402
from .maps import Maps  # noqa: E402
from .output import Logs  # noqa: E402
from .resources import Cores, Environments, Gpus, Memory  # noqa: E402
from .tasks import Tasks  # noqa: E402

__all__ = ["FEATURES", "BackendContract", "Contract", "Meeting", "needs"]


# pytest runs the cases of the last base first: identity, before anything else is believed.
class BackendContract(
    CleaningUp,
    Tasks,
    Versions,
    References,
    Mounts,
    Gpus,
    Cores,
    Memory,
    Environments,
    Executors,
    ProjectCode,
    LostWorkers,
    Retrying,
    Timeouts,
    Cancelling,
    Futures,
    Put,
    Maps,
    Logs,
    Serialization,
    Exceptions,
    Generators,
    Kinds,
    Values,
    Identity,
):
    """All cases. Subclass it in a test module, and define a fixture `backend`.

    Attributes to override: `unsupported`, `gpus`, `address`. Fixtures to override: `backend`, and `scratch` if workers
    don't see this machine's temporary directory.
    """


def _check_names() -> None:
    """A case of the same name as another would take its place unseen."""
    seen: set[str] = set()
    for group in BackendContract.__bases__:
        cases = {name for name in vars(group) if name.startswith("test_")}
        assert not cases & seen, f"several cases have these names: {cases & seen}"
        seen |= cases


_check_names()
