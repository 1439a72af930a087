"""A program of our own that is connected to one Ray cluster and passes questions on to its keeper (`ray_keeper`).

A process can be connected to one cluster only, not at all when it was forked from one that is, and Ray ends it when the
cluster is lost. So who asks for tasks does it through this program: `Line` is its end, `main` runs in the program.
"""

from __future__ import annotations

import concurrent.futures
import os
import pickle
import socket
import struct
import subprocess
import sys
import threading
import time
from typing import IO, Any

from flowfn import threads
from flowfn_runtime.errors import BackendUnavailable, FlowError, ResourceUnavailable

LOOK_S = 5.0  # how often it is looked whether the cluster's head is there
KNOCK_S = 10.0  # for the address to answer
GONE_S = 15.0  # how long the head may be gone
END_S = 10.0
_SIZE = struct.Struct("<Q")


class Line:
    """One such program. Any thread may ask. It ends with this process, however that ends."""

    def __init__(self, address: str) -> None:
        knock(address)
        boot = f"import sys; sys.path[:] = {sys.path!r}; from flowfn.backends.ray_talk import main; main(sys.argv[1])"
        self._listens = False
        self._process = subprocess.Popen(
            [sys.executable, "-c", boot, address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the user's program
        )
        self._lock = threading.Lock()
        self._waiting: dict[int, concurrent.futures.Future[Any]] = {}
        self._number = 0
        self._lost: FlowError | None = None
        try:
            self.address: str = _answer(_receive(self._process.stdout))
        except EOFError:
            self.close()
            raise BackendUnavailable(f"the program that talks to the Ray cluster at {address} ended early") from None
        except BaseException:
            self.close()
            raise
        self._listens = True
        threads.start(self._listen)

    @property
    def usable(self) -> bool:
        return self._lost is None

    def ask(self, method: str, *arguments: Any) -> Any:
        """What the keeper answers. Raises BackendUnavailable or ResourceUnavailable."""
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        with self._lock:
            if self._lost is not None:
                raise self._lost
            self._number += 1
            number = self._number
            self._waiting[number] = future
            try:
                _send(self._process.stdin, (number, method, arguments))
            except OSError:
                pass  # it has ended, as will be told
        try:
            return _answer(future.result())
        finally:
            self._waiting.pop(number, None)

    def _listen(self) -> None:
        while True:
            try:
                number, *said = _receive(self._process.stdout)
            except (EOFError, OSError, ValueError):
                break
            future = self._waiting.get(number)
            if future is not None:
                future.set_result(said)
        with self._lock:
            lost = BackendUnavailable(f"the connection to the Ray cluster at {self.address} was lost")
            lost.uncertain = True
            self._lost = lost
            waiting = list(self._waiting.values())
        assert self._process.stdout
        self._process.stdout.close()
        for future in waiting:
            if not future.done():
                future.set_result([False, "lost", str(lost)])

    def close(self) -> None:
        """Let go of the program, which ends."""
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.close()
        except OSError:
            pass  # it has ended
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if not self._listens:  # else that does it
            self._process.stdout.close()

    def left(self) -> None:
        """In a forked child: it is the parent's, and must not be kept open from here."""
        assert self._process.stdin and self._process.stdout
        self._process.returncode = 0  # not ours to wait for
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for pipe in (self._process.stdin, self._process.stdout):
            os.dup2(null, pipe.fileno(), inheritable=False)  # not closed: a thread of the parent may hold its lock
        os.close(null)


def knock(address: str) -> str | None:
    """Raise BackendUnavailable if nobody listens at the address: Ray itself would try for minutes.

    Returns this machine's address on the way there.
    """
    host, _, port = address.rpartition("/")[2].rpartition(":")
    if not host or not port.isdigit():
        return None  # "auto", "local": Ray finds out
    try:
        with socket.create_connection((host.strip("[]"), int(port)), KNOCK_S) as link:
            own: str = link.getsockname()[0]
            return own
    except OSError as error:
        raise BackendUnavailable(
            f"no Ray cluster can be had at {address}: {error.strerror or error}",
            hint="is it running, and the address right? `ray status` tells",
        ) from None


def _answer(said: Any) -> Any:
    fine, *rest = said
    if fine:
        return rest[0]
    kind, text = rest
    if kind == "refused":
        raise ResourceUnavailable(text)
    error = BackendUnavailable(text)
    error.uncertain = kind == "lost"
    raise error


def _send(pipe: Any, value: Any) -> None:
    data = pickle.dumps(value, protocol=5)
    pipe.write(_SIZE.pack(len(data)) + data)
    pipe.flush()


def _receive(pipe: IO[bytes] | None) -> Any:
    assert pipe is not None
    head = pipe.read(_SIZE.size)
    if len(head) < _SIZE.size:
        raise EOFError
    (size,) = _SIZE.unpack(head)
    data = pipe.read(size)
    if len(data) < size:
        raise EOFError
    return pickle.loads(data)


# -- in the program ----------------------------------------------------------------------------------------------------


def main(address: str) -> None:
    """Entry point: be connected, and pass on what is asked until nobody is there to ask."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # Ray prints
    source = os.fdopen(os.dup(0), "rb")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    lock = threading.Lock()

    def say(*words: Any) -> None:
        with lock:
            _send(out, words)

    try:
        where, keeper = _connect(address)
    except Exception as error:
        text = str(error).strip() or type(error).__name__
        say(False, "unavailable", f"no Ray cluster can be had at {address}: {text}")
        return
    say(True, where)
    threads.start(lambda: _watch(where))

    def serve(number: int, method: str, arguments: Any) -> None:
        say(number, *_ask(keeper, method, arguments))

    while True:
        try:
            request = _receive(source)
        except (EOFError, OSError):
            os._exit(0)
        threads.start(lambda request=request: serve(*request))  # type: ignore[misc]


def _connect(address: str) -> tuple[str, Any]:
    """The cluster's address for others, and its keeper, which is started if there is none."""
    import ray

    from flowfn.backends import ray_keeper, ray_server, ray_shelf, ray_turns

    ray.init(address=address, namespace=ray_keeper.NAMESPACE, log_to_driver=False, logging_level="ERROR")
    for module in (ray_keeper, ray_server, ray_shelf, ray_turns):
        ray.cloudpickle.register_pickle_by_value(module)
    kept = ray.remote(ray_keeper.Keeper).options(
        name=ray_keeper.NAME,
        namespace=ray_keeper.NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        max_restarts=-1,
        max_concurrency=1000,
        num_cpus=0,
        resources={"node:__internal_head__": 0.001},
    )
    where = address if address.startswith("ray://") else ray.get_runtime_context().gcs_address
    return where, kept.remote()


def _ask(keeper: Any, method: str, arguments: Any) -> tuple[Any, ...]:
    import ray

    try:
        return True, ray.get(getattr(keeper, method).remote(*arguments))
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        text = str(cause).strip()
        if isinstance(cause, ConnectionError):
            return False, "unavailable", text
        return False, "refused", text if isinstance(cause, (ValueError, RuntimeError)) else f"{cause!r}"
    except Exception as error:
        return False, "lost", f"the Ray cluster does not answer: {type(error).__name__}: {str(error).strip()[:300]}"


def _watch(address: str) -> None:
    """End this program when the cluster is lost: Ray would wait for a minute."""
    seen = time.monotonic()
    while True:
        time.sleep(LOOK_S)
        try:
            knock(address)
            seen = time.monotonic()
        except BackendUnavailable:
            if time.monotonic() - seen > GONE_S:
                os._exit(1)
