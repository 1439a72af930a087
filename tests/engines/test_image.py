"""Images: how they are written down, named, and turned into a Dockerfile."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import flowfn as flow

VERSION = f"{sys.version_info[0]}.{sys.version_info[1]}"


def test_steps_make_a_dockerfile(tmp_path: Path) -> None:
    (tmp_path / "requirements.txt").write_text("idna\n")
    image = (
        flow.Image.python(VERSION)
        .apt_install("git")
        .pip_install("numpy>=2", requirements=tmp_path / "requirements.txt")
        .env(NAME='a "value"')
        .run("make all")
    )
    lines = image.containerfile().splitlines()
    assert lines[0] == f"FROM docker.io/library/python:{VERSION}-slim"
    assert lines[1].startswith("RUN apt-get update") and " git " in lines[1]
    assert lines[2] == "COPY flowfn-1-requirements.txt /tmp/flowfn-1-requirements.txt"
    assert lines[3].endswith("'numpy>=2' -r /tmp/flowfn-1-requirements.txt")
    assert lines[4:] == ['ENV NAME="a \\"value\\""', "RUN make all"]
    assert image.context() == {"flowfn-1-requirements.txt": "idna\n"}
    assert image.variables == {"NAME": 'a "value"'}


def test_the_digest_is_of_all_that_counts(tmp_path: Path) -> None:
    one = flow.Image.python(VERSION).pip_install("numpy")
    assert one.digest == flow.Image.python(VERSION).pip_install("numpy").digest
    others = [one.env(A="1"), one.run("true"), flow.Image.python(VERSION).pip_install("numpy>1")]
    assert len({one.digest, *(other.digest for other in others)}) == 4
    assert len({one, flow.Image.python(VERSION).pip_install("numpy")}) == 1


def test_values_of_variables_are_not_shown() -> None:
    assert "hidden" not in repr(flow.Image.python(VERSION).env(NAME="hidden"))


def test_images_of_containers(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM scratch\n")
    assert flow.Image.from_registry("r.example/a:1").run("x").containerfile() == "FROM r.example/a:1\nRUN x\n"
    assert flow.Image.from_dockerfile(tmp_path / "Dockerfile").containerfile() == "FROM scratch\n"


def test_here_names_this_environment_exactly() -> None:
    from importlib.metadata import version

    (step,) = flow.Image.here().steps
    assert f"pytest=={version('pytest')}" in step.args
    assert not any(arg.startswith("flowfn") for arg in step.args)


@pytest.mark.parametrize(
    "make",
    [
        lambda: flow.Image.python("three"),
        lambda: flow.Image.python(VERSION).pip_install(),
        lambda: flow.Image.python(VERSION).pip_install("-r x"),
        lambda: flow.Image.python(VERSION).apt_install("a; rm -rf /"),
        lambda: flow.Image.python(VERSION).env({"A=B": "c"}),
        lambda: flow.Image.from_registry("-v"),
        lambda: flow.Image.from_dockerfile("/no/such/Dockerfile"),
        lambda: flow.Image.python(VERSION).uv_sync("/no/such/uv.lock"),
    ],
)
def test_nonsense_is_refused(make: object) -> None:
    assert callable(make)
    with pytest.raises(flow.ValidationError):
        make()
