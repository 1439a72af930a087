"""Every block of the Flow SDK's guide to data handling runs as written, on this machine."""

from __future__ import annotations

import os
import shutil
import sys
import types
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import guide
import pytest
from s3 import S3Server

from flowfn.cli import main as flow_command
from flowfn.client import Flow
from flowfn.task import Task
from flowfn_runtime.data import volumes
from flowfn_runtime.errors import ResourceUnavailable, ValidationError, VolumeNotFound

Completed = Callable[[Task], str]

TRAIN = """
import argparse, errno, pathlib
parser = argparse.ArgumentParser()
parser.add_argument("--data", default="/data")
data = pathlib.Path(parser.parse_args().data)
print("files:", sorted(str(p.relative_to(data)) for p in data.rglob("*") if p.is_file()))
print("text:", [p.read_text() for p in sorted(data.rglob("*")) if p.is_file()])
try:
    (data / "written").write_text("x")
    print("written")
except OSError as error:
    print("refused:", errno.errorcode[error.errno])
"""


@pytest.fixture
def run_block(project: Path, client: Flow, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Runs a block as it stands, with the imports that the guide shows once; gives the names that it binds."""
    monkeypatch.setenv("FLOW_GPUS", "a100:32")

    def run(block: str, environ: Mapping[str, str] | None = None) -> dict[str, Any]:
        names: dict[str, Any] = {}
        exec("import flow, os\nfrom flow import Flow, TaskConfig, VolumeSpec, invoke", names)
        if environ is not None:
            names["os"] = types.SimpleNamespace(environ=environ)
        exec(block, names)
        return names

    return run


@pytest.fixture
def bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Makes a bucket of a given name with objects in it; the environment has the credentials for it."""
    from s3 import S3

    made: list[Path] = []

    def make(name: str, objects: Mapping[str, str], *, credentials: bool = True) -> None:
        there = S3(s3_server, name, f"http://127.0.0.1:{s3_server.port}")
        for variable, value in there.env.items():
            if credentials or variable not in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
                monkeypatch.setenv(variable, value)
        there.root.mkdir(exist_ok=True)
        made.append(there.root)
        for key, text in objects.items():
            there.put(key, text.encode())

    yield make
    for root in made:
        shutil.rmtree(root, ignore_errors=True)


def newest(client: Flow, count: int) -> list[Task]:
    return client.list_tasks(limit=count)[::-1]


def test_1_submit_mounts_one_source_and_several(
    project: Path, client: Flow, run_block: Any, bucket: Any, completed: Completed
) -> None:
    bucket("my-bucket", {"dataset/a.txt": "A", "dataset/deep/b.txt": "B"})
    bucket("datasets", {"train/x": "X", "validation/y": "Y"})
    (project / "train.py").write_text(
        "import sys, os\n"
        "if len(sys.argv) == 1:\n"
        "    print(os.listdir('/train'), os.listdir('/val'), os.environ['CUDA_VISIBLE_DEVICES'])\n"
        "    print('before:', os.listdir('/models'))\n"
        "    open('/models/weights', 'w').write('w')\n"
        "    sys.exit()\n" + TRAIN
    )
    run_block(guide.SUBMIT)
    single, several = newest(client, 2)
    out = completed(single)
    assert "files: ['a.txt', 'deep/b.txt']" in out
    assert "refused: EROFS" in out
    out = completed(several)
    assert "['x'] ['y']" in out
    assert len(out.splitlines()[0].split()[-1].split(",")) == 4
    assert "before: []" in out
    run_block(guide.SUBMIT)
    assert "before: ['weights']" in completed(newest(client, 1)[0])


def test_2_run_with_a_new_volume_and_one_by_id(
    project: Path, client: Flow, run_block: Any, completed: Completed
) -> None:
    (project / "train.py").write_text(
        "import os\nprint(os.listdir('/data'), os.listdir('/models'))\n"
        "open('/data/new', 'w').write('n'); open('/models/net', 'w').write('m')\n"
    )
    with pytest.raises(VolumeNotFound, match="vol_abc123"):
        run_block(guide.RUN)
    assert client.list_tasks() == []
    volume = client.create_volume(10)
    block = guide.RUN.replace("vol_abc123", volume.id)
    assert completed(run_block(block)["task"]).strip() == "[] []"
    assert completed(run_block(block)["task"]).strip() == "[] ['net']"
    assert Path(volume.path, "net").read_text() == "m"


def test_3_invoke_resolves_a_url_and_returns_anything(project: Path, client: Flow, run_block: Any, bucket: Any) -> None:
    bucket("bucket", {"input.csv": "a,b\n1,2\n"})
    (project / "process.py").write_text(
        "import numpy\n"
        "class Broken(Exception):\n"
        "    def __init__(self, code, *, hint): super().__init__(code); self.hint = hint\n"
        "def analyze_data(source, target):\n"
        "    text = open(source).read()\n"
        "    open(target, 'w').write(text.upper())\n"
        "    if text.startswith('bad'): raise Broken(7, hint='no')\n"
        "    return {'str': isinstance(source, str), 'url': source.url, 'target': open('/tmp/output.csv').read(),\n"
        "            'big': numpy.arange(2_000_000), 'path': source}\n"
    )
    result = run_block(guide.INVOKE)["result"]
    assert result["str"] and result["url"] == "s3://bucket/input.csv"
    assert result["target"] == "A,B\n1,2\n"
    assert result["big"].sum() == 1999999000000
    assert not Path("/tmp/output.csv").exists()
    bucket("bucket", {"input.csv": "bad"})
    with pytest.raises(Exception, match="7") as caught:
        run_block(guide.INVOKE)
    assert type(caught.value).__name__ == "Broken"
    assert caught.value.hint == "no"  # type: ignore[attr-defined]
    for wrong in (guide.INVOKE.replace("process.py", "proces.py"), guide.INVOKE.replace("analyze_data", "analyse")):
        with pytest.raises(ValidationError):
            run_block(wrong)
    assert len(client.list_tasks(limit=None)) == 2


def test_4_a_job_file_with_volumes(project: Path, client: Flow, run_block: Any) -> None:
    (project / "training.yaml").write_text(guide.YAML + "command: ls /data; touch /data/seen\n")
    assert flow_command(["run", "training.yaml"]) == 0
    assert [volume.name for volume in client.list_volumes()] == ["datasets"]
    assert flow_command(["run", "training.yaml"]) == 0
    assert newest(client, 1)[0].logs() == "seen\n"


def test_4_a_job_file_without_a_command_stays_up(project: Path, client: Flow, run_block: Any) -> None:
    import flow

    (project / "training.yaml").write_text(guide.YAML)
    task = flow.run("training.yaml", wait_until="running")
    assert task.status == "running"
    task.cancel().wait()
    assert task.status == "cancelled"


def test_5_a_volume_is_created_once_and_used_by_name(
    project: Path, client: Flow, run_block: Any, completed: Completed
) -> None:
    import flow

    (project / "train.py").write_text("import os; print(os.listdir('/data')); open('/data/kept', 'w').close()")
    names = run_block(guide.PRE_STAGED)
    assert completed(flow.run(names["config"])).strip() == "[]"
    assert completed(flow.run(names["config"])).strip() == "['kept']"
    assert run_block(guide.PRE_STAGED)["volume"].id == names["volume"].id
    assert [(v.name, v.size_gb) for v in client.list_volumes()] == [("imagenet-data", 1000)]


def test_6_a_bucket_with_neither_gpu_nor_target(
    project: Path, client: Flow, run_block: Any, bucket: Any, completed: Completed
) -> None:
    bucket("public-datasets", {"imagenet/n01.txt": "cat"})
    (project / "inference.py").write_text("print(open('/data/n01.txt').read())")
    assert completed(run_block(guide.S3_DIRECT)["task"]) == "cat\n"


def test_a_bucket_can_be_mounted_lazily(project: Path, client: Flow, bucket: Any, completed: Completed) -> None:
    import flow

    if not os.access("/dev/fuse", os.W_OK):
        pytest.skip("there is no FUSE here: modprobe fuse")
    bucket("public-datasets", {"imagenet/n01.txt": "cat"})
    mount = flow.Mount("s3://public-datasets/imagenet", "/data", mode="lazy")
    assert completed(client.submit("ls /data; cat /data/n01.txt", mounts=[mount])) == "n01.txt\ncat"


def test_7_the_second_task_reads_what_the_first_wrote(
    project: Path, client: Flow, run_block: Any, completed: Completed
) -> None:
    (project / "preprocess.py").write_text(
        "import sys, os, time; out = sys.argv[2]; time.sleep(0.5); os.makedirs(out); open(out + '/x', 'w').write('X')"
    )
    (project / "train.py").write_text("import sys; print(open(sys.argv[2] + '/x').read())")
    names = run_block(guide.TRANSFER)
    assert names["train"].status == "pending"
    assert completed(names["train"]) == "X\n"
    assert names["preprocess"].ended_at <= names["train"].started_at


def test_8_an_ephemeral_volume_is_gone_after_the_task(
    project: Path, flow_home: Path, client: Flow, run_block: Any, completed: Completed
) -> None:
    import flow

    (project / "process.py").write_text("open('/scratch/big', 'w').write('x' * 100000); print('ok')")
    assert completed(flow.run(run_block(guide.EPHEMERAL)["config"])) == "ok\n"
    assert client.list_volumes() == []
    assert not [path for path in flow_home.rglob("*") if path.name == "big"]


def test_9_a_region_that_is_not_the_volumes_is_refused(
    project: Path, client: Flow, run_block: Any, completed: Completed
) -> None:
    import flow

    here = client.create_volume(1, region="us-west-2")
    there = client.create_volume(1, region="eu-north-1")
    with pytest.raises(ValidationError, match="eu-north-1"):
        flow.run(run_block(guide.LOCALITY.replace("vol_abc123", there.id))["config"])
    assert client.list_tasks() == []
    config = run_block(guide.LOCALITY.replace("vol_abc123", here.id))["config"]
    completed(flow.run(config, command="touch /data/x"))
    assert Path(here.path, "x").exists()


def test_10_several_lines_in_one_shell_and_no_second_download(
    project: Path,
    client: Flow,
    run_block: Any,
    bucket: Any,
    completed: Completed,
    s3_server: S3Server,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from s3 import Proxy

    bucket("datasets", {"imagenet/a": "A", "imagenet/b": "B"})
    (project / "train.py").write_text(TRAIN)
    with Proxy(s3_server.port) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        out = completed(run_block(guide.CACHING)["task"])
        assert "total" in out and "files: ['a', 'b']" in out
        assert len(proxy.gets) == 2
        assert "files: ['a', 'b']" in completed(run_block(guide.CACHING)["task"])
        assert len(proxy.gets) == 2
    task = client.submit("cd /tmp\nx=1\necho $PWD $x")
    assert completed(task) == "/tmp 1\n"


def test_11_the_docker_cache_persists(project: Path, client: Flow, run_block: Any, completed: Completed) -> None:
    import flow

    config = run_block(guide.DOCKER)["config"]
    assert config.command == "docker build ."
    completed(flow.run(config, command="echo layer > /var/lib/docker/layer"))
    assert completed(flow.run(config, command="cat /var/lib/docker/layer")) == "layer\n"


def test_12_and_13_the_docker_cache_in_yaml_and_python(
    project: Path, client: Flow, run_block: Any, completed: Completed
) -> None:
    import flow

    (project / "train.py").write_text("open('/var/lib/docker/x', 'w').close(); print('ok')")
    (project / "job.yaml").write_text(guide.DOCKER_YAML)
    assert flow_command(["run", "job.yaml"]) == 0
    task = newest(client, 1)[0]
    assert task.name.startswith("docker-cache-example-") and task.logs() == "ok\n"
    assert completed(flow.run(run_block(guide.DOCKER_PYTHON)["config"])) == "ok\n"


SPELLINGS = [
    "/var/lib/docker",
    "/var/lib/docker/",
    "/var//lib/./docker",
    "/var/lib/x/../docker",
    "//var/lib/docker",
    "/var/lib/docker/overlay2",
    "/var/lib",
    "/var/run/docker.sock",
    "/run/docker.sock",
    "/etc/docker",
]


@pytest.mark.parametrize("target", SPELLINGS)
def test_11_to_13_the_docker_directory_is_refused_without_the_flag(client: Flow, target: str) -> None:
    from flow import TaskConfig

    with pytest.raises(ValidationError, match=r"restricted|hide|part of|holds"):
        TaskConfig(command="true", volumes=[{"size_gb": 1, "mount_path": target}])
    with pytest.raises(ValidationError):
        client.submit("true", mounts={target: "volume://docker-cache"})
    assert client.list_volumes() == []


@pytest.mark.parametrize("target", SPELLINGS[:5])
def test_11_to_13_the_docker_directory_is_for_one_node(client: Flow, target: str) -> None:
    from flow import TaskConfig

    volume = {"size_gb": 1, "mount_path": target}
    with pytest.raises(ValidationError, match="2 nodes"):
        TaskConfig(command="true", allow_docker_cache=True, num_instances=2, volumes=[volume])
    assert TaskConfig(command="true", allow_docker_cache=True, volumes=[volume])


@pytest.mark.parametrize("target", SPELLINGS[5:])
def test_the_flag_opens_that_directory_alone(client: Flow, target: str) -> None:
    from flow import TaskConfig

    with pytest.raises(ValidationError):
        TaskConfig(command="true", allow_docker_cache=True, volumes=[{"size_gb": 1, "mount_path": target}])


def test_14_credentials_in_env_read_the_bucket_and_show_nowhere(
    project: Path,
    flow_home: Path,
    tmp_path: Path,
    client: Flow,
    run_block: Any,
    bucket: Any,
    completed: Completed,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from s3 import KEY, SECRET

    bucket("private-bucket", {"data/secret.txt": "for your eyes"}, credentials=False)
    assert "AWS_SECRET_ACCESS_KEY" not in os.environ
    (project / "train.py").write_text(
        "import os, hashlib; print(open('/data/secret.txt').read(), len(os.environ['AWS_SECRET_ACCESS_KEY']))"
    )
    names = run_block(guide.CREDENTIALS, {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET})
    assert completed(names["task"]) == f"for your eyes {len(SECRET)}\n"
    flow_command(["status", names["task"].name])
    flow_command(["ps", "--json"])
    flow_command(["status", names["task"].name, "--json"])
    shown = "".join(capfd.readouterr()) + repr(names["task"]) + repr(names["task"].to_dict())
    assert "AWS_SECRET_ACCESS_KEY" in shown  # the name is no secret
    assert SECRET not in shown and KEY not in shown
    for root in (flow_home, tmp_path / "flow-cache"):
        for path in root.rglob("*"):
            if path.is_file() and not path.is_symlink():
                assert SECRET.encode() not in path.read_bytes(), path
    assert os.stat(flow_home / "tasks").st_mode & 0o077 == 0
    assert SECRET not in repr(flow_config(SECRET))


def flow_config(secret: str) -> Any:
    from flow import TaskConfig

    return TaskConfig(command="true", env={"TOKEN": secret})


def test_14_without_credentials_the_bucket_is_not_read(
    project: Path, client: Flow, run_block: Any, bucket: Any
) -> None:
    bucket("private-bucket", {"data/secret.txt": "x"}, credentials=False)
    (project / "train.py").write_text("print('must not run')")
    names = run_block(guide.CREDENTIALS, {"AWS_ACCESS_KEY_ID": "wrong", "AWS_SECRET_ACCESS_KEY": "wrong"})
    task = names["task"].wait(60)
    assert task.status == "failed" and "s3://private-bucket/data" in task.reason
    assert task.logs() == ""


def test_15_pre_staged_and_streamed(
    project: Path, client: Flow, run_block: Any, bucket: Any, completed: Completed
) -> None:
    bucket("ml-datasets", {"imagenet/a": "A"})
    (project / "train.py").write_text(TRAIN + "import os; print('gpus:', os.environ['CUDA_VISIBLE_DEVICES'])")
    run_block(guide.LARGE)
    staged, streamed = newest(client, 2)
    out = completed(staged)
    assert "written" in out and "gpus: \n" in out
    out = completed(streamed)
    assert "files: ['a']" in out and out.splitlines()[-1].count(",") == 7


def test_16_a_server_answers_at_its_endpoint(
    project: Path, client: Flow, run_block: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    import flow

    (project / "model_server.py").write_text(
        "import http.server, sys, os\n"
        "os.chdir('/models'); open('model', 'w').write('weights')\n"
        "server = http.server.ThreadingHTTPServer(('', int(sys.argv[2])), http.server.SimpleHTTPRequestHandler)\n"
        "print('ready', flush=True); server.serve_forever()\n"
    )
    port = 8080
    config = run_block(guide.SERVING)["serving_config"]
    task = flow.run(config)
    assert next(iter(task.logs(follow=True))) == "ready\n"
    assert task.endpoint(port) == f"http://127.0.0.1:{port}"
    assert urllib.request.urlopen(f"{task.endpoint(port)}/model").read() == b"weights"
    assert flow_command(["status", task.name]) == 0
    assert f"http://127.0.0.1:{port}" in capfd.readouterr().out
    with pytest.raises(ResourceUnavailable, match="8080"):
        flow.run(config)
    with pytest.raises(ValidationError, match="1024"):
        flow.TaskConfig(command="true", ports=[80])
    task.cancel().wait(30)
    assert flow.run(config).cancel().wait(30).status == "cancelled"


def test_17_a_pipeline_of_submits_on_one_volume(
    project: Path, client: Flow, run_block: Any, bucket: Any, completed: Completed
) -> None:
    if shutil.which("aws") is None:
        pytest.skip("the AWS command line is not installed: pip install awscli")
    bucket("raw-data", {"one.txt": "1", "sub/two.txt": "2"})
    (project / "process.py").write_text(
        "import sys, os, pathlib\n"
        "source, target = pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[4])\n"
        "target.mkdir()\n"
        "for p in source.rglob('*.txt'): (target / p.name).write_text(p.read_text() * 2)\n"
    )
    (project / "train.py").write_text(TRAIN)
    names = run_block(guide.PIPELINE)
    out = completed(names["train"])
    assert "text: ['11', '22']" in out
    assert names["download"].status == names["process"].status == "completed"
    assert names["download"].ended_at <= names["process"].started_at
    assert names["process"].ended_at <= names["train"].started_at


def test_18_four_nodes_know_their_ranks(
    project: Path, client: Flow, run_block: Any, completed: Completed, monkeypatch: pytest.MonkeyPatch
) -> None:
    import json

    import flow

    # What torchrun reads from its environment, on every node, without the 32 processes that it would start.
    (project / "torchrun").write_text(
        f"#!{sys.executable}\n"
        "import os, json, sys\n"
        "print(json.dumps([sys.argv[1:], dict(os.environ)]))\n"
        "open(f\"/checkpoints/{os.environ['FLOW_NODE_RANK']}\", 'w').close(); os.listdir('/data')\n"
    )
    (project / "torchrun").chmod(0o755)
    monkeypatch.setenv("PATH", f"/workspace{os.pathsep}{os.environ['PATH']}")
    task = flow.run(run_block(guide.DISTRIBUTED)["config"])
    completed(task)
    seen = [json.loads(task.logs(node=rank)) for rank in range(4)]
    assert all(arguments == ["--nproc_per_node=8", "train_ddp.py"] for arguments, _ in seen)
    environments = [environ for _, environ in seen]
    assert [environ["PET_NODE_RANK"] for environ in environments] == ["0", "1", "2", "3"]
    assert [environ["FLOW_NODE_RANK"] for environ in environments] == ["0", "1", "2", "3"]
    for name in ("FLOW_NODE_COUNT", "PET_NNODES"):
        assert {environ[name] for environ in environments} == {"4"}
    for name in ("MASTER_ADDR", "MASTER_PORT", "PET_MASTER_ADDR", "PET_MASTER_PORT", "PET_RDZV_ENDPOINT"):
        assert len({environ[name] for environ in environments}) == 1
    devices = [environ["CUDA_VISIBLE_DEVICES"].split(",") for environ in environments]
    assert sorted(device for share in devices for device in share) == sorted(map(str, range(32)))
    kept = volumes.get("checkpoints")
    assert sorted(os.listdir(kept.path)) == ["0", "1", "2", "3"]
    assert {v.name: v.interface for v in client.list_volumes()} == {"training-data": "file", "checkpoints": "file"}


TRAIN_DDP = """
import os, torch, torch.distributed as dist
torch.set_num_threads(1)
dist.init_process_group("gloo")
torch.manual_seed(0)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(3):
    loss = (model(torch.full((2, 4), float(dist.get_rank() + 1))) ** 2).mean()
    optimizer.zero_grad(); loss.backward(); optimizer.step()
total = torch.tensor([float(dist.get_rank())]); dist.all_reduce(total)
weight = next(model.parameters()).detach().sum().item()
print(f"rank {dist.get_rank()} of {dist.get_world_size()} sum {total.item():g} weight {weight:.6f}", flush=True)
if dist.get_rank() == 0:
    torch.save(model.module.state_dict(), "/checkpoints/model.pt")
dist.destroy_process_group()
"""


def test_18_torchrun_trains_on_four_nodes(project: Path, client: Flow, run_block: Any, completed: Completed) -> None:
    import importlib.util

    import flow

    if importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed: pip install torch")
    (project / "train_ddp.py").write_text(TRAIN_DDP)
    config = run_block(guide.DISTRIBUTED.replace("--nproc_per_node=8", "--nproc_per_node=1"))["config"]
    task = flow.run(config)
    completed(task)
    said = [line for rank in range(4) for line in task.logs(node=rank).splitlines() if line.startswith("rank")]
    assert sorted(line.split(" weight")[0] for line in said) == [f"rank {rank} of 4 sum 6" for rank in range(4)]
    assert len({line.rpartition(" ")[2] for line in said}) == 1
    assert os.path.exists(os.path.join(volumes.get("checkpoints").path, "model.pt"))


def test_volumes_belong_to_a_project(client: Flow, completed: Completed) -> None:
    completed(client.submit("echo mine > /volumes/x", mounts="volume://shared-name"))
    other = Flow(project="other")
    assert other.list_volumes() == [] and other.list_tasks() == []
    completed(other.submit("test ! -e /volumes/x", mounts="volume://shared-name"))
    with pytest.raises(VolumeNotFound):
        other.delete_volume(client.list_volumes()[0].id)


def test_tasks_have_filesystems_of_their_own(
    project: Path, flow_home: Path, client: Flow, completed: Completed, tmp_path: Path
) -> None:
    (project / "code.py").write_text("print('code')")
    mark = f"/tmp/mark-{os.getpid()}"
    first = client.submit(f"echo x > {mark}; echo x > /workspace/own; echo y >> code.py; cat code.py; sleep 60")
    assert next(iter(first.logs(follow=True))) == "print('code')y\n"
    out = completed(
        client.submit(
            f"cat code.py; echo; ls {mark}; ls /workspace; ls -A {flow_home}\n"
            "touch /usr/x /etc/x; ls /proc | grep -c '^[0-9]'"
        )
    )
    assert out.splitlines()[:2] == ["print('code')", "code.py"]
    assert first.task_id not in out
    assert int(out.splitlines()[-1]) < 10
    assert not Path(mark).exists() and not Path("/usr/x").exists() and not Path("/etc/x").exists()
    assert (project / "code.py").read_text() == "print('code')"
