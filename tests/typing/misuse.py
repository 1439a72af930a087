"""What a type checker must refuse: each line that ends in `# refused`, and no other. Never run."""

from __future__ import annotations

import flowfn as flow


@flow.function
def bare(x: int, *, scale: float = 1.0) -> str:
    return str(x * scale)


@flow.function(gpu="a100")
def with_options(x: int) -> list[float]:
    return [float(x)]


bare("one")  # refused
bare.local("one")  # refused
bare.remote("one")  # refused
bare.remote()  # refused
bare.remote(1, 2.0)  # refused
bare.remote(1, factor=2.0)  # refused
bare.spawn(1, scale="large")  # refused
with_options.remote([1])  # refused
with_options.options(timeout=3).remote("x")  # refused
number: int = bare.remote(1)  # refused
listed: list[int] = with_options.remote(1)  # refused
bare.no_such_method()  # refused


@flow.function(timeout_seconds=3)  # refused
def unknown_option(x: int) -> int:
    return x
