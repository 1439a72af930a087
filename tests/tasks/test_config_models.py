"""`TaskConfig` and `VolumeSpec`: what they accept, what they refuse and how they say so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import flow
from flow import Flow, TaskConfig, VolumeSpec
from flowfn_runtime.errors import FlowError, ValidationError


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"comand": "x"}, "did you mean 'command'"),
        ({"command": ""}, "command: is empty"),
        ({"name": "-x"}, "name='-x'"),
        ({"name": "x" * 129}, "128"),
        ({"num_instances": 0}, "num_instances=0"),
        ({"num_instances": 101}, "100"),
        ({"ports": [80]}, "1024"),
        ({"ports": [70000]}, "65535"),
        ({"max_run_time_hours": 169}, "168"),
        ({"priority": "urgent"}, "'low', 'med' or 'high'"),
        ({"env": {"A": 1}}, "the value of A must be a string"),
        ({"env": {"A=B": "x"}}, "no name"),
        ({"instance_type": "zx81:lots"}, "zx81"),
        ({"working_dir": "/etc"}, "/etc"),
        ({"retries": 11}, "10 times"),
        ({"retries": {"max": 3}}, "max_retries"),
        ({"volumes": [{"nam": "x"}]}, "did you mean 'name'"),
        ({"volumes": [{"size_gb": 0, "mount_path": "/d"}]}, "size_gb=0"),
        ({"volumes": [{"size_gb": 16385, "mount_path": "/d"}]}, "16384"),
        ({"volumes": [{"name": "ab"}]}, "3 characters"),
        ({"volumes": [{"name": "-abc"}]}, "pattern"),
        ({"volumes": [{"name": "abc", "volume_id": "vol_1"}]}, "not both"),
        ({"volumes": [{"name": "abc", "interface": "tape"}]}, "'block' or 'file'"),
        ({"volumes": [{"mount_path": "/a"}, {"mount_path": "/a/"}]}, "same target /a"),
        ({"volumes": [{"mount_path": "/data"}], "data_mounts": "s3://b/x"}, "same target /data"),
        ({"volumes": [{"mount_path": "data"}]}, "absolute"),
        ({"volumes": [{"mount_path": "/proc/x"}]}, "/proc"),
        ({"data_mounts": {"/usr": "s3://b"}}, "/usr"),
    ],
)
def test_mistakes_name_the_field_and_what_it_accepts(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError) as caught:
        TaskConfig(**{"command": "true", **fields})
    assert says in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_mistakes_show_no_secret() -> None:
    for env in ({"TOKEN": "hush\0"}, {"TOKEN": ["hush"]}, "hush"):
        with pytest.raises(ValidationError) as caught:
            TaskConfig(command="true", env=env)
        assert "hush" not in str(caught.value)
    assert "hush" not in repr(TaskConfig(command="true", env={"TOKEN": "hush"}))


def test_what_is_accepted_comes_out_in_one_form() -> None:
    config = TaskConfig(
        command="\n    a\n      b\n    ",
        ports=[9000, 8080, 8080],
        volumes=["volume://data", {"name": "models"}, VolumeSpec(volume_id="vol_1", mount_path="/x")],
        retries=3,
        instance_type="8xH100",
        working_dir="src",
    )
    assert config.command == "a\n  b" and config.ports == [8080, 9000]
    assert [v.target for v in config.volume_specs()] == ["/volumes/data", "/volumes/models", "/x"]
    assert config.retry_policy().max_retries == 3
    assert config.gpu() == "h100:8"
    assert config.working_dir == "/workspace/src"
    assert VolumeSpec(target="/t", size_gb=2).mount_path == "/t"
    assert TaskConfig(command="x").gpu() == ""
    with pytest.raises(ValidationError):
        VolumeSpec(target="/t", mount_path="/u")


def test_yaml_there_and_back(tmp_path: Path) -> None:
    config = TaskConfig(
        name="job", command="true", env={"A": "b"}, volumes=[{"name": "data", "size_gb": 5, "mount_path": "/data"}]
    )
    config.to_yaml(tmp_path / "job.yaml")
    assert TaskConfig.from_yaml(tmp_path / "job.yaml") == config
    assert (tmp_path / "job.yaml").stat().st_mode & 0o077 == 0


def test_a_config_is_run_with_other_fields(tmp_path: Path) -> None:
    from flowfn.client import config_of

    base = TaskConfig(command="a", env={"A": "1"}, num_instances=2)
    other = config_of(base, command="b", gpu="a100")
    assert (other.command, other.num_instances, other.instance_type, other.env) == ("b", 2, "a100", {"A": "1"})
    assert base.command == "a"
    base.command = " c"
    base.ports = [9000, 9000]
    assert (base.command, base.ports, base.num_instances) == ("c", [9000], 2)
    for name, value in (("ports", [80]), ("comand", "x"), ("volumes", [{"mount_path": "/proc"}])):
        with pytest.raises(ValidationError):
            setattr(base, name, value)
    assert base.ports == [9000]


def test_two_names_of_one_option_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    client = Flow()
    with pytest.raises(ValidationError, match="mounts= and data="):
        client.submit("true", mounts="s3://a", data="s3://b")
    with pytest.raises(ValidationError, match="gpu= and instance_type="):
        client.submit("true", gpu="a100", instance_type="a100")
    with pytest.raises(ValidationError, match="did you mean 'num_instances'"):
        client.submit("true", num_instance=2)
    with pytest.raises(ValidationError, match="pass it to run"):
        client.submit(TaskConfig(command="true"))  # type: ignore[arg-type]
    with pytest.raises(FlowError):
        client.mount_volume("vol_1", "task_1")
    assert client.list_tasks() == []


def test_the_alias_is_flowfn_itself() -> None:
    import flowfn

    assert flow.Flow is flowfn.Flow and flow.function is flowfn.function and flow.TaskConfig is flowfn.TaskConfig
    assert flow.errors.ValidationError is flowfn.ValidationError
    assert "Flow" in dir(flow)
    with pytest.raises(AttributeError, match="module 'flow' has no attribute 'nothing'"):
        _ = flow.nothing


def test_importing_the_client_is_light() -> None:
    code = (
        "import sys; from flow import Flow, Task, run, invoke; Flow(); "
        "print([m for m in ('pydantic', 'yaml', 'fsspec', 'cloudpickle', 'sqlite3', 'httpx') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    code = "import sys; before = len(sys.modules); import flow; print(len(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 10
