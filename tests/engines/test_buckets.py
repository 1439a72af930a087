"""What this machine's configuration says of buckets holds for workers elsewhere: of mounts, and of volumes in a bucket.

What a worker wrote to such a volume is in the bucket when its call or task is over, for hosts that share nothing.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import engines
import fsspec.config
import podman
import pytest
from slurm_cluster import SlurmCluster
from sshd import Sshd

import flowfn as flow
from flowfn.backends.local import LocalBackend
from flowfn.backends.slurm import SlurmBackend
from flowfn.backends.ssh import SshBackend
from flowfn.client import Flow
from flowfn_runtime.data import volumes

WAIT_S = 60.0
Look = Callable[[], str]


@pytest.fixture(params=["local", "container", "ssh", "slurm"])
def backend(request: pytest.FixtureRequest) -> Iterator[flow.Backend]:
    made: flow.Backend
    if request.param == "local":
        flow.shutdown()
        made = LocalBackend()
    elif request.param == "container":
        engines.need(podman.why_not())
        podman.ready()
        made = podman.backend()
    elif request.param == "ssh":
        server: Sshd = request.getfixturevalue("ssh_server")
        made = SshBackend(server.url, config=str(server.config), python=server.python("boto3"))
    else:
        cluster: SlurmCluster = request.getfixturevalue("slurm_cluster")
        made = SlurmBackend(cluster.options())
    yield made
    flow.shutdown()
    made.close()


@pytest.fixture
def elsewhere(exact_s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Look:
    """What a file of the volume "notes" holds, as a host sees it that has not seen the volume before.

    Where the volumes are and how their bucket is reached is configured; who asks is in the environment.
    """
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", exact_s3.options["key"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", exact_s3.options["secret"])
    config = (
        f'volumes = "{exact_s3.url}/volumes"\n'
        f'[storage."{exact_s3.url}"]\nendpoint_url = "{exact_s3.options["endpoint_url"]}"\nregion = "us-east-1"\n'
    )

    def be_on(host: str, patch: pytest.MonkeyPatch) -> None:
        (tmp_path / host).mkdir()
        (tmp_path / host / "config.toml").write_text(config)
        patch.setenv("FLOW_HOME", str(tmp_path / host))

    def look() -> str:
        with monkeypatch.context() as patch:
            be_on(f"host-{len(list(tmp_path.iterdir()))}", patch)
            with volumes.attach("notes") as held:
                return Path(held.path, "note").read_text()

    be_on("client", monkeypatch)
    return look


SECRETS = ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"]


def make(backend: flow.Backend) -> Any:
    def note(text: str) -> None:
        with open("/notes/note", "a") as file:
            file.write(text)

    return flow.function(backend=backend, mounts={"/notes": "volume://notes"}, secrets=SECRETS)(note)


@pytest.mark.parametrize("how", ["flow", "fsspec", "environment"])
def test_mounts(
    backend: flow.Backend, exact_s3: Any, elsewhere: Look, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = exact_s3.options["endpoint_url"]
    if how != "flow":
        (tmp_path / "client" / "config.toml").unlink()
    if how == "fsspec":
        monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": endpoint})
        monkeypatch.setenv("FSSPEC_S3_REGION", "us-east-1")
    elif how == "environment":
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
    exact_s3.put("set/a", b"1")

    def read() -> str:
        with open("/data/a") as file:
            return file.read()

    function = flow.function(backend=backend, mounts=f"{exact_s3.url}/set/", secrets=SECRETS)(read)
    assert function.remote() == "1"
    assert function.submit().result(WAIT_S) == "1"


def test_lazy_mounts(backend: flow.Backend, exact_s3: Any, elsewhere: Look) -> None:
    for name in ("a", "b"):
        exact_s3.put(f"set/{name}", name.encode() * 3_000_000)

    def read() -> tuple[list[str], bytes]:
        import os

        with open("/data/b", "rb") as file:
            file.seek(2_999_998)
            return sorted(os.listdir("/data")), file.read()

    mount = flow.Mount(f"{exact_s3.url}/set/", "/data", mode="lazy")
    function = flow.function(backend=backend, mounts=[mount], secrets=SECRETS)(read)
    if backend.name == "ssh" and not os.stat("/dev/fuse").st_mode & stat.S_IWOTH:  # it logs in as nobody special
        with pytest.raises(flow.SandboxError, match="keeps /dev/fuse for others than this user"):
            function.remote()
        return
    assert function.remote() == (["a", "b"], b"bb")
    assert function.submit().result(WAIT_S) == (["a", "b"], b"bb")


def test_the_store(backend: flow.Backend, exact_s3: Any, elsewhere: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that a worker made is in the result, and then only in the store."""
    monkeypatch.setenv("FLOW_STORE", f"{exact_s3.url}/store")

    def make() -> Any:
        import tempfile

        from flowfn_runtime.data.references import File

        path = f"{tempfile.mkdtemp()}/made"
        with open(path, "w") as file:
            file.write("there")
        return File(path)

    function = flow.function(backend=backend, secrets=SECRETS)(make)
    for made in (function.remote(), function.submit().result(WAIT_S)):
        with made.open("r") as file:
            assert file.read() == "there"
        assert made.url.startswith(exact_s3.url) or backend.name in ("local", "container")  # on this host


def test_calls(backend: flow.Backend, elsewhere: Look) -> None:
    function = make(backend)
    function.remote("one ")
    assert elsewhere() == "one "
    function.remote("two")
    assert elsewhere() == "one two"


def test_tasks(backend: flow.Backend, elsewhere: Look) -> None:
    make(backend).submit("one ").result(WAIT_S)
    assert elsewhere() == "one "
    make(backend).submit("two").result(WAIT_S)
    assert elsewhere() == "one two"


@pytest.mark.parametrize("interface", ["block", "file"])
def test_a_task_of_several_nodes(slurm_cluster: SlurmCluster, elsewhere: Look, interface: str) -> None:
    task = flow.TaskConfig(
        command='[ "$FLOW_NODE_RANK" = 0 ] || printf "from another node" > /notes/note',
        num_instances=2,
        volumes=[flow.VolumeSpec(name="notes", mount_path="/notes", interface=interface)],
        backend=SlurmBackend(slurm_cluster.options()),
        env={name: os.environ[name] for name in SECRETS},
        upload_code=False,
    )
    with Flow() as client:
        ended = client.run(task).wait(WAIT_S)
    assert ended.state == "completed", ended.logs(stderr=True)
    assert elsewhere() == "from another node"
