from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flowfn import config
from flowfn.backends import registry
from flowfn.backends.local import LocalBackend
from flowfn.cli import backends
from flowfn_runtime.errors import ConfigError


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "project" / "deep"
    root.mkdir(parents=True)
    monkeypatch.chdir(root)
    return root.parent


def user(home: Path, text: str) -> None:
    home.mkdir(exist_ok=True)
    (home / "config.toml").write_text(text)


def test_defaults(project: Path) -> None:
    assert config.load() == config.Config()
    assert config.load().backend == "local"
    assert config.load().project == "default"


def test_environment_wins_over_project_over_user(
    project: Path, flow_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    user(flow_home, 'backend = "user"\nproject = "user"\nregion = "user"\n[backends.a]\ntype = "ssh"\n')
    (project / "pyproject.toml").write_text(
        '[tool.flow]\nbackend = "file"\nproject = "file"\n[tool.flow.backends.b]\ntype = "slurm"\n'
    )
    monkeypatch.setenv("FLOW_BACKEND", "env")
    loaded = config.load()
    assert (loaded.backend, loaded.project, loaded.region) == ("env", "file", "user")
    assert set(loaded.backends) == {"a", "b"}


def test_a_changed_file_is_read_again(flow_home: Path, project: Path) -> None:
    user(flow_home, 'project = "one"\n')
    assert config.load().project == "one"
    user(flow_home, 'project = "second"\n')
    assert config.load().project == "second"


def test_the_longest_storage_prefix_decides() -> None:
    loaded = config.Config(storage={"s3://": {"a": 1}, "s3://bucket": {"a": 2}, "s3://bucket/deep/": {"a": 3}})
    assert loaded.storage_options("s3://other/x") == {"a": 1}
    assert loaded.storage_options("s3://bucket") == {"a": 2}
    assert loaded.storage_options("s3://bucket-two/x") == {"a": 1}
    assert loaded.storage_options("s3://bucket/deep/file") == {"a": 3}
    assert loaded.storage_options("gs://bucket") == {}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('bakend = "x"', "did you mean 'backend'"),
        ("backend = 3", "non-empty string"),
        ("storage = 3", "table of tables"),
        ("backend = ", "not valid TOML"),
        ('project = "../x"', "not valid"),
    ],
)
def test_mistakes_are_named(flow_home: Path, project: Path, text: str, says: str) -> None:
    user(flow_home, text)
    with pytest.raises(ConfigError, match=says):
        config.load()


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ('type = "ssh"\nhosts = ["a"]\nconfg = "b"', "no option 'confg'; did you mean 'config'.*\n.*alive_interval"),
        ('type = "ssh"\nhosts = "a"', "hosts = 'a' is not accepted; accepted: a list of texts"),
        ('type = "ssh"\nhosts = ["a"]\nsessions = "many"', "sessions = 'many' .*accepted: a whole number"),
        ('type = "container"\nengine_limits = "no"', "engine_limits = 'no' .*accepted: true or false"),
        ('type = "slurm"\npartiton = "a"', "no option 'partiton'; did you mean 'partition'"),
        ('type = "shh"', "backend 'box' is of type 'shh', which there is not; did you mean 'ssh'"),
        ('hosts = ["a"]', "backend 'box' has no type"),
    ],
)
def test_mistakes_in_a_backends_options_are_named(flow_home: Path, project: Path, lines: str, says: str) -> None:
    user(flow_home, f"[backends.box]\n{lines}\n")
    with pytest.raises(ConfigError, match=says):
        registry.get("box")


def test_one_backend_that_is_broken_does_not_spoil_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(LocalBackend):
        def describe(self) -> str:
            raise RuntimeError("a mistake of its author's")

    monkeypatch.setitem(registry._made, "broken", Broken())
    row = backends.look("broken", config.Config())
    assert not row.ready and "RuntimeError: a mistake of its author's" in row.here


def test_secrets_are_not_in_the_repr() -> None:
    assert "hush" not in repr(config.Config(storage={"s3://b": {"secret": "hush"}}))


def test_no_toml_parser_is_imported_without_a_file(tmp_path: Path) -> None:
    code = "import sys; from flowfn import config; config.load(cwd='/'); print('tomllib' in sys.modules)"
    # A process that coverage measures has read coverage's own file.
    unmeasured = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    done = subprocess.run([sys.executable, "-c", code], env=unmeasured, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
