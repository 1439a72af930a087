"""Containers: a `podman run` for each call by hand."""

from __future__ import annotations

import json
import sys

from common import HERE, PeerMissing, Results
from engines_common import Engine, measure, workplace


def container(results: Results, rounds: int) -> None:
    """All cases, with the tests' own Podman and image."""
    sys.path.insert(0, str(HERE.parent / "tests" / "engines"))
    import podman  # type: ignore[import-not-found,unused-ignore]

    from flowfn import Image

    if reason := podman.why_not():
        raise PeerMissing(reason)
    podman.ready()
    with workplace("bench-container-"):
        image = podman.backend().images.get(Image.from_registry(podman.BASE).pip_install("boto3"), podman.BASE)
        options = {"image": image, "network": "host", "engine": "podman", "engine_options": podman.OPTIONS}
        made = f"ContainerBackend(**{json.dumps(options)})"
        first = (
            "import flowfn as flow; from flowfn.backends.container import ContainerBackend\n"
            f"assert flow.function(backend={made})(abs).remote(-1) == 1"
        )
        run = ["podman", *podman.OPTIONS, "run", "-i", "--rm", "--network=host", "--pull=never"]
        run += ["--ulimit=nofile=1024:4096", "--ulimit=nproc=4096:4096", image, "python3", "-c"]

        def by_hand(program: str) -> list[str]:
            return [*run, program]

        backend = podman.backend(image=image)
        try:
            measure(results, rounds, Engine("container", backend, first, {"podman run": by_hand}))
        finally:
            backend.close()
