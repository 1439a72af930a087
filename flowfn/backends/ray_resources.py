"""What a worker asks Ray for, and whether a cluster's nodes have it. Decisions only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from flowfn_runtime.errors import ResourceUnavailable
from flowfn_runtime.gpu_request import GpuRequest, model_of

if TYPE_CHECKING:
    from flowfn.spec import FunctionSpec

Node = Mapping[str, float]  # Ray's resources of one node

_ACCELERATOR = "accelerator_type:"
# Ray knows a GPU's model and not its memory: the least that a model comes with, in GB.
_LEAST_GB = {"t4": 16, "v100": 16, "p100": 12, "l4": 24, "a10": 24, "a10g": 24, "l40": 48, "l40s": 48, "a100": 40}
_LEAST_GB |= {"h100": 80, "h200": 141, "b100": 180, "b200": 180, "gh200": 96, "gb200": 180}


class Need(NamedTuple):
    """The options of a worker's Ray task, and how many of them the nodes have room for."""

    options: dict[str, Any]
    slots: int

    @property
    def amounts(self) -> dict[str, float]:
        """By the names of Ray's resources."""
        names = {"num_cpus": "CPU", "num_gpus": "GPU", "memory": "memory"}
        asked = {name: self.options[option] for option, name in names.items() if option in self.options}
        return {**asked, **self.options.get("resources", {})}

    def fits(self, node: Node) -> bool:
        """Whether a node with so much has room for one."""
        model = self.options.get("accelerator_type")
        if model and f"{_ACCELERATOR}{model}" not in node:
            return False
        return all(node.get(name, 0.0) >= amount for name, amount in self.amounts.items())

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.options.items())


def choose(
    spec: FunctionSpec, nodes: Iterable[Node], resources: Mapping[str, float] | None = None, *, count: int = 1
) -> Need:
    """What to ask for: of several kinds of GPUs the first that a node has. `resources`: custom ones, beside.

    Raises ResourceUnavailable, with what there is, if no node has enough; or less than `count` nodes.
    """
    nodes = list(nodes)
    options: dict[str, Any] = {"num_cpus": spec.cpu or 1}
    if spec.memory:
        options["memory"] = spec.memory
    if resources:
        options["resources"] = dict(resources)
    candidates = (
        [Need({**options, **gpu}, 0) for gpu in _gpu_options(spec.gpu, nodes)] if spec.gpu else [Need(options, 0)]
    )
    for need in candidates:
        times = [_times(need, node) for node in nodes]
        if sum(map(bool, times)) >= count:
            return need._replace(slots=sum(times))
    wanted = [f"gpu={' or '.join(map(str, spec.gpu))}"] if spec.gpu else []
    wanted += [f"cpu={spec.cpu:g}"] if spec.cpu else []
    wanted += [f"memory={spec.memory >> 20} MiB"] if spec.memory else []
    wanted += [f"{name}={amount:g}" for name, amount in (resources or {}).items()]
    who = "no node of the Ray cluster has" if count == 1 else f"there are no {count} nodes in the Ray cluster that have"
    raise ResourceUnavailable(f"{who} {', '.join(wanted) or 'a CPU'}", hint=f"there is: {summary(nodes)}")


def _gpu_options(requests: Iterable[GpuRequest], nodes: list[Node]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for request in requests:
        if request.model is None and request.memory_gb is None:
            found.append({"num_gpus": request.count})
            continue
        found += [
            {"num_gpus": request.count, "accelerator_type": name}
            for name in sorted({name for node in nodes for name in accelerators(node)})
            if _meets(request, name)
        ]
    return found


def _meets(request: GpuRequest, name: str) -> bool:
    """Whether GPUs that Ray calls so are what is asked for: "A100", "A100-80G", "TESLA-V100"."""
    model = model_of(name.replace("_", "-"))
    *_, last = name.lower().split("-")
    told = last.rstrip("b").rstrip("g")
    if told.isdigit() and last != told:
        memory = int(told)
    else:
        memory = _LEAST_GB.get(model, 0)
    return request.fits(model, memory * 10**9)


def _times(need: Need, node: Node) -> int:
    if not need.fits(node):
        return 0
    return int(min(node[name] // amount for name, amount in need.amounts.items() if amount))


def accelerators(node: Node) -> list[str]:
    """The models of a node's GPUs, as Ray calls them."""
    return [name[len(_ACCELERATOR) :] for name in node if name.startswith(_ACCELERATOR)]


def summary(nodes: Iterable[Node]) -> str:
    """What the nodes have, for people: "2 x (8 CPUs, 31.0 GiB), 1 x (16 CPUs, 4 a100, 60.0 GiB)"."""
    kinds: dict[str, int] = {}
    for node in nodes:
        parts = [f"{node.get('CPU', 0):g} CPUs"]
        if gpus := node.get("GPU"):
            models = "/".join(model_of(name.replace("_", "-")) for name in accelerators(node))
            parts.append(f"{gpus:g} {models or 'GPUs'}")
        parts.append(f"{node.get('memory', 0) / 2**30:.1f} GiB")
        text = ", ".join(parts)
        kinds[text] = kinds.get(text, 0) + 1
    return ", ".join(f"{count} x ({text})" for text, count in kinds.items()) or "no node"
