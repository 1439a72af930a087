"""Clients that are killed or interrupted while the data of their functions is fetched."""

from __future__ import annotations

import http.server
import signal
import threading
from collections.abc import Iterator

import pytest
from fault_scene import BOUND_S, Scene


class _Slow(http.server.BaseHTTPRequestHandler):
    """A file that comes slowly, or of which the last byte does not come until it may."""

    protocol_version = "HTTP/1.1"
    size = 20_000_000
    flows = True
    asked = threading.Event()
    whole = threading.Event()

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(self.size))
        self.send_header("ETag", '"one"')
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        try:
            self.wfile.write(bytes(2_000_000))
            self.asked.set()
            for _ in range(2, 20):
                if self.flows:
                    self.whole.wait(0.2)
                self.wfile.write(bytes(1_000_000 - 1))
            self.whole.wait(BOUND_S)
            self.wfile.write(bytes(18))
        except OSError:
            pass

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def slow_url() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Slow)
    server.daemon_threads = True
    _Slow.asked.clear()
    _Slow.whole.clear()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/file.bin"
    finally:
        _Slow.whole.set()
        server.shutdown()
        thread.join()
        server.server_close()


CLIENT = """
import os, sys
import flowfn as flow
@flow.function(mounts={"/data": sys.argv[1]})
def size():
    return sum(os.path.getsize(os.path.join("/data", name)) for name in os.listdir("/data"))
print(size.remote())
"""


@pytest.mark.parametrize("flows", [True, False])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_client_that_ends_while_its_data_is_staged_leaves_nothing(
    scene: Scene, slow_url: str, number: signal.Signals, flows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Slow, "flows", flows)
    program = scene.start(CLIENT, slow_url)
    assert _Slow.asked.wait(BOUND_S), program.said()
    assert len(scene.processes()) >= 2
    program.kill(number)
    assert program.end().code in (-number, 1, 130)
    scene.check_nothing_left()
    # What has come may be left in the cache, held by nobody, for the next to sweep out.
    _Slow.whole.set()
    assert scene.run(CLIENT, slow_url).out == "20000000\n"
    assert _partial(scene) == []


def _partial(scene: Scene) -> list[str]:
    """What was fetched in part."""
    return [str(path) for path in scene.cache.rglob("building/*/**/*") if path.is_file()]
