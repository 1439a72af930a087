"""A task of several nodes as a job of Ray: one rank on each of them, in an actor that holds the node's share.

The job's driver (`raytask`) has them placed, on nodes of their own, all at once or none. The task's supervisor is the
same as everywhere: for each rank it starts a stand-in, a process that writes what the rank writes, ends as it ends, and
has it end. Stand-ins reach the driver by a socket in the task's directory, since it alone is connected to Ray.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
import sys
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from . import taskdir
from .errors import TaskError
from .tasknode import Nodes

if TYPE_CHECKING:
    from .raytask import Courier

_SOCKET, _PLACED = "ranks", "placed"  # files of the task's directory
_HEAD = struct.Struct("<BI")  # what follows, and how long it is
_STATUS, _OUT, _ERR = 0, 1, 2
_LOST = 128 + signal.SIGKILL
_END_S = 20.0  # beside the time that the command is given
_BOOT = (
    "import sys; sys.path[:] = [p for p in sys.path if p]; sys.path.insert(0, sys.argv.pop(1)); "
    "from flowfn_runtime.rayranks import stand_in; stand_in()"
)


class Ranks(Nodes):
    """What the supervisor has of the nodes."""

    def acquire(self, report: Callable[[str], None]) -> None:
        from .watch import Watch

        report(f"it waits for room on {self._count} nodes")
        place = os.path.join(self._directory, _PLACED)
        with Watch(self._directory) as watch:
            while not os.path.exists(place):
                watch.wait()
        with open(place, encoding="utf-8") as file:
            if error := file.read():
                raise TaskError(f"Ray can't give the task its nodes: {error}")

    def build(self) -> None:
        from .taskbox import Command

        for rank in range(self._count):
            argv = [sys.executable, "-c", _BOOT, self._spec["runtime"], self._directory, str(rank)]
            self._commands.append(Command(argv, dict(os.environ)))


def stand_in() -> None:
    """Entry point: the task's directory, and the rank that this process stands for."""
    directory, rank = sys.argv[1:]
    os.chdir(directory)
    with socket.socket(socket.AF_UNIX) as link:
        link.connect(_SOCKET)
        signal.signal(signal.SIGTERM, lambda *_: link.send(b"T"))
        link.sendall(f"{rank}\n".encode())
        source = link.makefile("rb")
        while head := source.read(_HEAD.size):
            what, size = _HEAD.unpack(head)
            data = source.read(size)
            if what == _STATUS:
                os._exit(data[0])
            while data:
                data = data[os.write(what, data) :]
    os._exit(128 + signal.SIGTERM)  # the driver ends it, or has ended


# -- in the driver -----------------------------------------------------------------------------------------------------


class Gang:
    """The nodes of the job, from the moment they are asked for."""

    def __init__(self, courier: Courier, keeper: Any, task_id: str, plan: Mapping[str, Any]) -> None:
        self._courier = courier
        self._order = keeper, task_id, dict(plan)
        self._count: int = plan["nodes"]
        self._options: dict[str, Any] = plan["ranks"]  # of an actor, by which Ray knows what it takes
        self._directory = courier.directory
        before = os.getcwd()
        os.chdir(self._directory)  # a path of its own may be too long for a socket
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(_SOCKET)
        os.chdir(before)
        self._listener.listen(self._count)
        self._idle = threading.Event()  # nothing of the task is on its nodes
        self._idle.set()
        threading.Thread(target=self._run, daemon=True).start()

    def finish(self) -> None:
        """Return when nothing of the task is left on its nodes. The supervisor has ended."""
        self._idle.wait(self._order[2]["grace_s"] + 2 * _END_S)

    def _run(self) -> None:
        try:
            group, error = self._place(), ""
        except Exception as raised:
            group, error = None, str(raised) or type(raised).__name__
        taskdir.write_private(self._directory, f"{_PLACED}.new", error.encode())
        os.rename(os.path.join(self._directory, f"{_PLACED}.new"), os.path.join(self._directory, _PLACED))
        with self._listener:  # stand-ins can't come here any more when this thread has failed
            while group is not None:
                links = self._gather()
                self._idle.clear()
                try:
                    self._attempt(links, group)
                finally:
                    for link in links.values():
                        link.close()
                    self._idle.set()

    def _place(self) -> Any:
        """Nodes for all ranks, as soon as Ray has them."""
        import ray
        from ray.util.placement_group import placement_group

        options = self._options
        bundle = {"CPU": options["num_cpus"], "GPU": options.get("num_gpus"), "memory": options.get("memory")}
        bundle = {name: amount for name, amount in {**bundle, **(options.get("resources") or {})}.items() if amount}
        group = placement_group([bundle] * self._count, strategy="STRICT_SPREAD")
        ray.get(group.ready())
        return group

    def _gather(self) -> dict[int, socket.socket]:
        """Stand-ins of all ranks, of one attempt."""
        links: dict[int, socket.socket] = {}
        while len(links) < self._count:
            ready, _, _ = select.select([self._listener, *links.values()], [], [])
            if self._listener in ready:
                link, _ = self._listener.accept()
                if said := link.makefile("rb").readline():
                    links[int(said)] = link
            for rank, link in list(links.items()):
                if link in ready:  # it is to end, or has ended: so will the others
                    links.pop(rank).close()
        return links

    def _attempt(self, links: dict[int, socket.socket], group: Any) -> None:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        actor = ray.remote(_node_class())
        nodes = [
            actor.options(
                **self._options,
                max_concurrency=4,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, rank),
            ).remote(*self._order, rank)
            for rank in range(self._count)
        ]
        try:
            told = ray.get([node.prepare.remote() for node in nodes])
            self._courier.address = told[0]["address"]
            addresses = [one["address"] for one in told]
            ray.get([node.run.remote(addresses, told[0]["port"]) for node in nodes])
        except ray.exceptions.RayError as error:
            _say(links[0], _ERR, f"flow: the nodes can't be made ready: {error}\n".encode())
            for link in links.values():
                _say(link, _STATUS, bytes([1]))
        else:
            threads = [
                threading.Thread(target=work, args=(rank, nodes[rank], links[rank]), daemon=True)
                for rank in links
                for work in (self._follow, self._heed)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        for node in nodes:
            try:
                ray.get(node.close.remote(), timeout=self._order[2]["grace_s"] + _END_S)
            except ray.exceptions.RayError:
                pass  # it is gone
            ray.kill(node)

    def _follow(self, rank: int, node: Any, link: socket.socket) -> None:
        """Pass on what a rank writes, and how it ends."""
        import ray

        out = err = 0
        status: int | None = None
        try:
            while True:
                more_out, more_err, status = ray.get(node.more.remote(out, err))
                _say(link, _OUT, more_out)
                _say(link, _ERR, more_err)
                out, err = out + len(more_out), err + len(more_err)
                if status is not None and not more_out and not more_err:
                    break
            if rank == 0 and self._order[2]["call"]:
                self._fetch_result(node)
        except ray.exceptions.RayError as error:
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            _say(link, _ERR, f"flow: node {rank} is lost: {why}\n".encode())
            status = _LOST
        _say(link, _STATUS, bytes([status or 0]))
        try:
            link.shutdown(socket.SHUT_RD)  # nobody waits any more for what the stand-in may say
        except OSError:
            pass

    def _heed(self, _rank: int, node: Any, link: socket.socket) -> None:
        """Have a rank end when its stand-in is told to, or has ended."""
        try:
            link.recv(1)
        except OSError:
            pass
        node.term.remote()

    def _fetch_result(self, node: Any) -> None:
        import ray

        with open(os.path.join(self._directory, "result.part"), "wb") as file:
            while piece := ray.get(node.result.remote(file.tell())):
                file.write(piece)


def _node_class() -> type:
    """The actor, which goes to its node by value: there is nothing of ours before it has made the runtime ready."""

    class Node:
        def __init__(self, keeper: Any, task_id: str, plan: dict[str, Any], rank: int) -> None:
            self._order = keeper, task_id, plan, rank
            self._rank: Any = None

        def prepare(self) -> Any:
            import ray

            keeper, _, plan, _ = self._order
            boot: dict[str, Any] = {}
            exec(ray.get(keeper.boot.remote()), boot)
            place = boot["runtime"](keeper, plan)
            from flowfn_runtime.raynode import Rank

            self._rank = Rank(*self._order, place)
            return self._rank.prepare()

        def run(self, addresses: list[str], port: int) -> None:
            self._rank.run(addresses, port)

        def more(self, out: int, err: int) -> Any:
            return self._rank.more(out, err)

        def result(self, offset: int) -> Any:
            return self._rank.read("result.part", offset)

        def term(self) -> None:
            self._rank.term()

        def close(self) -> None:
            self._rank.close()

    return Node


def _say(link: socket.socket, what: int, data: bytes) -> None:
    if not data:
        return
    try:
        link.sendall(_HEAD.pack(what, len(data)) + data)
    except OSError:
        pass  # the stand-in has ended: the rank ends, too
