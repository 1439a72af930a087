"""The door at which workers on Ray are handed in: who comes, and who is sent away."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from typing import Any

import engines
import pytest
import ray_cluster

FAMILIES = ["here", "elsewhere"]


@pytest.fixture
def door(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    engines.need(ray_cluster.why_not())
    from flowfn.backends import ray_door

    monkeypatch.setattr(ray_door, "SECRET_S", 0.5)
    monkeypatch.setenv("XDG_RUNTIME_DIR", f"/tmp/ray-door-{os.getpid()}")  # short enough
    made = ray_door.Door("127.0.0.1")
    yield made
    made.close()
    os.rmdir(os.path.dirname(made.path))
    os.rmdir(os.environ["XDG_RUNTIME_DIR"])


def reach(order: dict[str, Any], where: str) -> socket.socket | None:
    from flowfn.backends import ray_lease

    doors = [one for one in order["doors"] if (one[0] == socket.AF_UNIX) == (where == "here")]
    return ray_lease.reach({**order, "doors": doors, "connect_s": 5.0})


def enter(door: Any, where: str = "elsewhere") -> None:
    """Somebody with a lease is let in, and a word and a stream arrive."""
    lease = door.lease()
    link = reach(door.order(lease), where)
    assert link is not None
    words = json.dumps({"host": "there"}).encode() + b"\n"
    near, far = socket.socketpair()
    with link, near, far:
        if where == "here":
            socket.send_fds(link, [words], [far.fileno()])
            link = near
        else:
            link.sendall(words)
        assert lease.happened.wait(30)
        said, [fd] = lease.take()
        assert said == {"host": "there"} and os.get_blocking(fd)
        with socket.socket(fileno=fd) as stream:
            link.sendall(b"from there")
            assert stream.recv(10) == b"from there"
            stream.sendall(b"from here")
            assert link.recv(10) == b"from here"


def stranger(door: Any) -> socket.socket:
    return socket.create_connection(door.addresses[1][1])


def is_sent_away(link: socket.socket) -> bool:
    try:
        return link.recv(100) == b""
    except ConnectionResetError:
        return True


@pytest.mark.parametrize("where", FAMILIES)
def test_who_has_a_lease_is_let_in(door: Any, where: str) -> None:
    for _ in range(3):
        enter(door, where)


@pytest.mark.parametrize("where", FAMILIES)
def test_another_secret(door: Any, where: str) -> None:
    lease = door.lease()
    order = door.order(lease)
    number, secret = order["secret"]
    for wrong in ([number, "0" * 32], [number, ""], ["0" * 16, secret], ["", secret], [secret, number]):
        assert reach({**order, "secret": wrong}, where) is None
    assert reach({**order, "answering": "0" * 32}, where) is None  # it is another one that answers
    assert lease.take() is None
    enter(door)


@pytest.mark.parametrize("noise", [b"\0" * 50 + b"\n", b"\xff\xfe \n", b"x" * 100_000, b"GET / HTTP/1.1\r\n", b"\n"])
def test_noise(door: Any, noise: bytes) -> None:
    with stranger(door) as link:
        try:
            link.sendall(noise)
        except (BrokenPipeError, ConnectionResetError):
            pass
        assert is_sent_away(link)
    enter(door)


def test_silence(door: Any) -> None:
    with stranger(door) as link, stranger(door) as other:
        other.sendall(b"0123")
        enter(door)  # nobody is held up
        assert is_sent_away(link) and is_sent_away(other)


def test_a_crowd(door: Any) -> None:
    links = [stranger(door) for _ in range(300)]
    enter(door)
    assert is_sent_away(links[0])
    enter(door)
    for link in links:
        link.close()


def test_noise_after_the_secret(door: Any) -> None:
    lease = door.lease()
    for noise in (b"{", b"no json\n", b"[" * 15_000 + b"\n", b"{}\n{}\n", b"x" * 20_000):
        link = reach(door.order(lease), "elsewhere")
        assert link is not None
        with link:
            link.sendall(noise)
            if noise != b"{":
                assert is_sent_away(link)
    assert lease.take() is None
    enter(door)


def test_what_is_not_wanted_any_more(door: Any) -> None:
    for give_up in (door.forget, lambda lease: lease.give_up()):
        lease = door.lease()
        link = reach(door.order(lease), "elsewhere")
        assert link is not None
        with link:
            give_up(lease)
            link.sendall(b"{}\n")
            assert is_sent_away(link)
    assert reach(door.order(lease), "elsewhere") is None


def test_an_address_of_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    engines.need(ray_cluster.why_not())
    from flowfn.backends import ray_door

    made = ray_door.Door("192.0.2.1")
    assert [family for family, _ in made.addresses] == [socket.AF_UNIX]
    made.close()


def test_its_end(door: Any) -> None:
    lease = door.lease()
    link = reach(door.order(lease), "elsewhere")
    assert link is not None
    door.close()
    assert is_sent_away(link)
    for thread in threading.enumerate():
        if thread.name == "flowfn-ray-door":
            thread.join()
    assert reach(door.order(lease), "elsewhere") is None and not os.path.exists(door.path)
    link.close()


@pytest.mark.parametrize(("tls", "is_one"), [("1", False), ("true", False), ("0", True)])
def test_rays_own_encryption(tls: str, is_one: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Ray would say in secret is not said in plain text."""
    engines.need(ray_cluster.why_not())
    from flowfn.backends.ray_session import Session

    monkeypatch.setenv("RAY_USE_TLS", tls)
    assert (Session(None).own_address() is not None) is is_one
