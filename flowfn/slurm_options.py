"""What may be said of Slurm jobs (`flow.Slurm`), and what a function's resources are in Slurm's words. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from flowfn.spec import parse_timeout
from flowfn_runtime.errors import ResourceUnavailable, ValidationError
from flowfn_runtime.gpu_request import GpuRequest, describe, model_of

if TYPE_CHECKING:
    from flowfn.backends.base import Backend
    from flowfn.spec import FunctionSpec

WORKERS = 32  # jobs of one function at a time, where nobody says more
# Compiled when they are needed, as most programs need none.
_SLURM_TIME = r"\d+-\d+(:\d+){0,2}|\d+(:\d+){1,2}"  # days-hours[:minutes[:seconds]], [hours:]minutes:seconds
# What the backend says itself, or what would come between a worker and its stream.
_NOT_EXTRA = (
    r"-[ioeJnNlLZuQvIWT]|--(input|output|error|job-name|ntasks|nodes|label|pty|unbuffered|quiet|multi-prog|immediate|"
    r"wait|threads|open-mode|no-allocate|jobid|array|bcast|chdir|export|parsable|test-only)\b"
)


# Nothing here is a dataclass: importing what makes these would delay the start of srun.
class _Options(NamedTuple):
    partition: str | None = None  # one, or several separated by commas; None: the cluster's default
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None  # features of nodes, as in `sbatch --constraint`
    reservation: str | None = None
    time: str | float | None = (
        None  # limit of a worker's job: seconds, "90m", "4h", or as Slurm writes it, "1-12:00:00"
    )
    extra: Sequence[str] = ()  # further options for srun, such as ["--exclusive"] or "--exclude=node7"
    workers: int = WORKERS  # jobs of one function at a time, unless it says max_workers=
    wait: str | float | None = None  # how long a job may be queued before the call fails; None: as long as it takes
    python: str | None = None  # interpreter on the nodes; None: this one if it is there, else one of its version
    cache: str | None = None  # directory on the nodes in place of ~/.cache/flowfn
    home: str | None = None  # directory on the nodes in place of ~/.flowfn
    login: str | None = None  # a login node, "user@host:port", that is reached by ssh; None: this machine is one
    ssh_config: str | None = None  # a file in place of ~/.ssh/config
    allocation: bool | None = None  # run within the job that this process runs in; None: if there is one that has room


class Slurm(_Options):
    """Where and how Slurm runs workers: `backend=flow.Slurm(partition="gpu", time="4h")`.

    Two of the same options are the same backend, and share workers. What a function needs (`gpu=`, `cpu=`, `memory=`)
    it says itself. Raises ValidationError, naming the option.
    """

    __slots__ = ()

    if not TYPE_CHECKING:  # its signature is that of the fields

        def __new__(cls, *args, **given):
            made = super().__new__(cls, *args, **given)
            made._check()
            return super().__new__(cls, **{**made._asdict(), "extra": parse_extra(made.extra)})

    def _check(self) -> None:
        for option in (*_PLAIN, "python", "cache", "home", "login", "ssh_config"):
            value = getattr(self, option)
            if value is not None and (not isinstance(value, str) or not value.strip() or value.startswith("-")):
                raise ValidationError(f"{option}={value!r} is not accepted; accepted: a name")
        if isinstance(self.workers, bool) or not isinstance(self.workers, int) or self.workers < 1:
            raise ValidationError(f"workers={self.workers!r} is not accepted; accepted: a whole number, 1 or more")
        job_time(self.time)
        parse_timeout(self.wait, option="wait")

    def make_backend(self) -> Backend:
        """The backend of these options; flowfn calls this once."""
        from flowfn.backends.slurm import SlurmBackend

        return SlurmBackend(self)

    @property
    def anywhere(self) -> bool:
        """Whether nothing is said of where jobs run, so that one that is there will do."""
        return self.login is None and not any(getattr(self, name) for name in (*_PLAIN, "time"))

    @property
    def wait_s(self) -> float | None:
        """`wait` in seconds."""
        return parse_timeout(self.wait, option="wait")

    def arguments(self) -> list[str]:
        """These options as srun takes them."""
        said = [f"--{name}={value}" for name in _PLAIN if (value := getattr(self, name)) is not None]
        if (limit := job_time(self.time)) is not None:
            said.append(f"--time={limit}")
        return [*said, *self.extra]


_PLAIN = ("partition", "account", "qos", "constraint", "reservation")


def parse_extra(extra: Any) -> tuple[str, ...]:
    """Further options of srun, from one text or several. Raises ValidationError for those that can't be."""
    if isinstance(extra, str):
        import shlex

        extra = shlex.split(extra)
    words = list(extra)
    for word in words:
        if not isinstance(word, str):
            raise ValidationError(f"extra: {word!r} is not accepted; accepted: options of srun, as text")
        if re.match(_NOT_EXTRA, word):
            raise ValidationError(
                f"extra: {word!r} is not accepted: it would come between a worker and this process",
                hint="what may be said with an option of flow.Slurm or of the function is said there",
            )
    return tuple(words)


def job_time(time: Any) -> str | None:
    """A time limit as Slurm writes it. Seconds are rounded up to whole ones. Raises ValidationError."""
    if time is None or (isinstance(time, str) and re.fullmatch(_SLURM_TIME, time.strip())):
        return time.strip() if time else None
    if isinstance(time, str) and time.strip().lower() in ("unlimited", "infinite"):
        return "UNLIMITED"
    try:
        seconds = parse_timeout(time, option="time")
    except ValidationError as error:
        raise ValidationError(f'{error.message}, or as Slurm writes it, "1-12:00:00"') from None
    assert seconds is not None
    whole = math.ceil(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


class Node(NamedTuple):
    """One node of one partition, as sinfo says."""

    partition: str
    default: bool  # whether the partition is the cluster's default
    name: str
    state: str
    cpus: int
    memory_mib: int
    gpus: tuple[tuple[str, int], ...]  # type as the cluster names it ("" if it does not), count

    @property
    def up(self) -> bool:
        """Whether jobs may start on it: not down, drained or reserved for something else."""
        return re.match(r"idle|mix|alloc|comp|plan", self.state) is not None and not self.state.endswith("*")


SINFO = "%R|%P|%N|%T|%c|%m|%G"  # the format that `nodes_of` reads, a line for each node of a partition


def nodes_of(listing: str) -> list[Node]:
    """The nodes in what `sinfo -h -N -o SINFO` printed."""
    nodes = []
    for line in listing.splitlines():
        fields = line.strip().split("|")
        if len(fields) == 7:
            partition, marked, name, state, cpus, memory, gres = fields
            nodes.append(
                Node(partition, marked.endswith("*"), name, state, _number(cpus), _number(memory), gpus_of(gres))
            )
    return nodes


def gpus_of(gres: str) -> tuple[tuple[str, int], ...]:
    """The GPUs in a list of generic resources: `gpu:a100:4(S:0-1),gpu:2,tpu:1` has four a100, and two without type."""
    found = []
    for item in re.sub(r"\([^)]*\)", "", gres).split(","):
        name, *rest = item.split(":")
        if name == "gpu":
            count = rest.pop() if rest and re.fullmatch(r"\d+", rest[-1]) else "1"
            found.append((":".join(rest), int(count)))
    return tuple(found)


ALLOCATION = "this job"  # what the part of a cluster that a job has is called, in the place of a partition


def within(environ: Mapping[str, str]) -> str | None:
    """The number of the job whose allocation a process may use: one of salloc's, or of a batch script.

    Not that of a task which srun started: it has the job's cores itself, and what it waits for would wait for it.
    """
    step = environ.get("SLURM_STEP_ID", "")
    task = step.isdigit() and int(step) < 0xFFFFFFF0  # beyond are Slurm's own: batch, interactive and so on
    return None if task else environ.get("SLURM_JOB_ID")


_HELD = r"(?m)^\s+Nodes=(\S+) CPU_IDs=(\S+) Mem=(\d+) GRES=(\S*)"


def allocated(listing: str, expand: Callable[[str], Iterable[str]]) -> list[Node]:
    """What a job has of its nodes, in what `scontrol show job -d` printed. `expand` makes names of `n[1-3]`."""
    nodes = []
    for names, cores, memory, gres in re.findall(_HELD, listing):
        spans = [span.split("-") for span in cores.split(",")]
        cpus = sum(int(span[-1]) - int(span[0]) + 1 for span in spans)
        for name in expand(names):
            nodes.append(Node(ALLOCATION, True, name, "alloc", cpus, int(memory), gpus_of(gres)))
    return nodes


def _number(text: str) -> int:
    match = re.match(r"\d+", text)
    return int(match[0]) if match else 0


def fits(request: GpuRequest, kind: str) -> bool:
    """Whether GPUs of a type fit a request. What a cluster calls its GPUs may say their memory: `a100-80gb`."""
    memory = re.search(r"(\d+)g(i?b)?(?![a-z0-9])", kind.lower())
    return request.fits(model_of(kind.replace("_", " ")) if kind else "", int(memory[1]) * 10**9 if memory else 0)


class Need(NamedTuple):
    """What one worker takes, in Slurm's words."""

    cpus: int = 1
    memory_mib: int | None = None
    gpu: str = ""  # type as the cluster names it, "" for any
    gpu_count: int = 0

    def workers_on(self, node: Node) -> int:
        """How many such workers a node holds."""
        counts = [node.cpus // self.cpus]
        if self.memory_mib:
            counts.append(node.memory_mib // self.memory_mib)
        if self.gpu_count:
            counts.append(sum(n for kind, n in node.gpus if kind == self.gpu or not self.gpu) // self.gpu_count)
        return min(counts)

    def arguments(self) -> list[str]:
        """As srun takes it."""
        said = [f"--cpus-per-task={self.cpus}"]
        if self.memory_mib:
            said.append(f"--mem={self.memory_mib}M")
        if self.gpu_count:
            said.append("--gres=gpu:" + (f"{self.gpu}:" if self.gpu else "") + str(self.gpu_count))
        return said

    def step_arguments(self, job: str) -> list[str]:
        """As srun takes it for a step of a job: that much of it, and no more."""
        return [f"--jobid={job}", "--exact", *self.arguments(), *([] if self.gpu_count else ["--gres=none"])]


def needs(spec: FunctionSpec, nodes: Iterable[Node]) -> list[Need]:
    """What a worker of the spec takes on these nodes: for each GPU request, in order, the types there that fit."""
    cpus = math.ceil(spec.cpu or 1)
    memory = math.ceil(spec.memory / 2**20) if spec.memory else None
    if not spec.gpu:
        return [Need(cpus, memory)]
    kinds = dict.fromkeys(kind for node in nodes for kind, _ in node.gpus)
    found: list[Need] = []
    for request in spec.gpu:
        if request.model is None and request.memory_gb is None:
            found.append(Need(cpus, memory, "", request.count))
        else:
            found += [Need(cpus, memory, kind, request.count) for kind in kinds if fits(request, kind)]
    return found


def choose(spec: FunctionSpec, nodes: Sequence[Node]) -> tuple[Need, int]:
    """What a worker asks for, and how many of them the nodes hold at once (at least 1: they may be up again later).

    Raises ResourceUnavailable, naming what was asked for and what there is, if no node could ever run one.
    """
    for need in needs(spec, nodes):
        most = [(need.workers_on(node), node) for node in nodes]
        if any(count for count, _ in most):
            alone = {node.name: count for count, node in most if node.up}  # a node may be in several partitions
            return need, max(1, sum(alone.values()))
    asked = [f"gpu={describe(spec.gpu)}"] if spec.gpu else []
    asked += [f"cpu={spec.cpu:g}"] if spec.cpu else []
    asked += [f"memory={spec.memory / 2**30:.4g}GiB"] if spec.memory else []
    raise ResourceUnavailable(
        f"no node of the cluster has {', '.join(asked) or 'a core'}; there is: {summary(nodes)}",
        hint="ask for what one node has, or name another partition=",
    )


def partition_nodes(nodes: Sequence[Node], partition: str | None) -> list[Node]:
    """The nodes of some partitions, of the default one if none is named. Raises ResourceUnavailable."""
    names = partition.split(",") if partition else [node.partition for node in nodes if node.default][:1]
    if unknown := [name for name in names if name not in {node.partition for node in nodes}]:
        raise ResourceUnavailable(
            f"there is no partition {unknown[0]!r}; there is: {summary(nodes)}",
            hint="name one of these with partition=",
        )
    return [node for node in nodes if node.partition in names] if names else list(nodes)


def summary(nodes: Iterable[Node]) -> str:
    """What there is, for messages: `gpu (2 nodes of 64 cores, 500 GiB, a100:4)`."""
    groups: dict[str, dict[str, int]] = {}
    for node in nodes:
        gpus = [f"{kind or 'gpu'}:{count}" for kind, count in node.gpus]
        what = ", ".join([f"{node.cpus} cores", f"{node.memory_mib / 1024:.3g} GiB", *gpus])
        kinds = groups.setdefault(node.partition, {})
        kinds[what] = kinds.get(what, 0) + 1
    texts = [
        f"{name} (" + "; ".join(f"{n} {'node' if n == 1 else 'nodes'} of {what}" for what, n in kinds.items()) + ")"
        for name, kinds in groups.items()
    ]
    return ", ".join(texts) or "nothing"
