from __future__ import annotations

import json
import posixpath
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowfn_runtime.data.spec import (
    DOCKER,
    SYSTEM,
    Mount,
    conceals,
    normalise_target,
    parse_mounts,
    redact,
    within,
)
from flowfn_runtime.errors import ValidationError

segments = st.text(st.characters(blacklist_characters="/\0", blacklist_categories=["Cs"]), min_size=1, max_size=8)
paths = st.lists(st.one_of(segments, st.sampled_from([".", "..", "", "usr", "etc", "proc", "data"])), max_size=6).map(
    lambda parts: "/" + "/".join(parts)
)


def targets(value: object) -> list[tuple[str, str, bool | None]]:
    return [(mount.target, mount.source, mount.read_only) for mount in parse_mounts(value)]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, []),
        ("s3://b/p", [("/data", "s3://b/p", True)]),
        ("S3://b/p", [("/data", "s3://b/p", True)]),
        ("volume://models", [("/volumes", "volume://models", False)]),
        ("gs://b/sets/imagenet/", [("/mnt/imagenet", "gs://b/sets/imagenet/", True)]),
        ("https://h/a/b.bin?sig=1", [("/mnt/b.bin", "https://h/a/b.bin?sig=1", True)]),
        ("/srv/set", [("/mnt/set", "/srv/set", True)]),
        ("/srv/year=2024", [("/mnt/year=2024", "/srv/year=2024", True)]),
        ("/train=s3://b/year=2024", [("/train", "s3://b/year=2024", True)]),
        (["/train=/srv/a", "s3://b"], [("/train", "/srv/a", True), ("/data", "s3://b", True)]),
        (
            {"/train": "s3://b/t", "/models/": "volume://m"},
            [("/train", "s3://b/t", True), ("/models", "volume://m", False)],
        ),
        ({"/a": {"name": "m", "size_gb": 3}}, [("/a", "volume://m", False)]),
        ({"/a": {"volume_id": "vol_1"}}, [("/a", "volume://vol_1", False)]),
        ([{"name": "m", "mount_path": "/a"}], [("/a", "volume://m", False)]),
        ({"name": "m"}, [("/volumes/m", "volume://m", False)]),
        (Mount("/srv/out", "/out", read_only=False), [("/out", "/srv/out", False)]),
        ({"/b": Mount("s3://b", "/a", mode="lazy")}, [("/b", "s3://b", True)]),
        ({"/data/../x": Path("/srv")}, [("/x", "/srv", True)]),
        ({"/data": "s3://b", "/data/sub": "s3://c"}, [("/data", "s3://b", True), ("/data/sub", "s3://c", True)]),
        ({"/home/me/data": "s3://b"}, [("/home/me/data", "s3://b", True)]),
    ],
)
def test_every_way_to_write_a_mount(value: object, expected: object) -> None:
    assert targets(value) == expected


@pytest.mark.parametrize("system", [*SYSTEM, DOCKER, "/", "/var", "/var/lib"])
@pytest.mark.parametrize(
    "spelling", ["{}", "{}/", "/{}", "//x/..{}", "{}/.", "{}/../{}", "/data/..{}", "{}/sub/..", "/./{}"]
)
def test_the_system_can_not_be_hidden_however_it_is_spelled(system: str, spelling: str) -> None:
    target = spelling.replace("{}", system, 1).replace("{}", system.rpartition("/")[2])
    with pytest.raises(ValidationError, match="restricted") as caught:
        parse_mounts({target: "s3://b"})
    assert "/data" in str(caught.value)


@pytest.mark.parametrize(
    "target", ["/usr/../usr/share", "/proc/self", "/etc/docker", "/var/run/docker.sock", "/dev/shm/x"]
)
def test_nothing_is_mounted_inside_the_system(target: str) -> None:
    with pytest.raises(ValidationError, match="restricted"):
        parse_mounts({target: "volume://m"})


@pytest.mark.parametrize("target", ["data", "", ".", "~/data", "C:\\data", "/a\0b", 3, None])
def test_a_target_is_an_absolute_path(target: object) -> None:
    with pytest.raises(ValidationError, match="absolute path such as /data"):
        parse_mounts({target: "s3://b"})


@pytest.mark.parametrize(
    "value",
    [
        {"/data": 3},
        {"/data": ""},
        {"/data": "s3://"},
        {"/data": "volume://../x"},
        {"/data": "file://rel"},
        {"/data": "s3:/bucket/prefix"},
        "s3:bucket/prefix",
        {"/data": {"size_gb": 3}},
        {"/data": "s3://b", "/data/": "s3://c"},
        ["s3://a", "s3://b"],
        "gs:///",
        "/",
    ],
)
def test_what_is_refused(value: object) -> None:
    with pytest.raises(ValidationError):
        parse_mounts(value)


def test_buckets_are_read_only_and_volumes_are_not_lazy() -> None:
    with pytest.raises(ValidationError, match=r"/d can't be writable: s3://b"):
        Mount("s3://b", "/d", read_only=False)
    with pytest.raises(ValidationError, match="/d can't be lazy"):
        Mount("volume://b", "/d", mode="lazy")
    with pytest.raises(ValidationError, match='mode is "copy"'):
        Mount("s3://b", "/d", mode="eager")
    assert Mount("volume://m", "/d", read_only=True).read_only is True


def test_docker_directory_takes_a_volume_and_a_flag() -> None:
    (mount,) = parse_mounts({"/var/lib/docker/": {"name": "cache"}}, allow_docker_cache=True)
    assert mount.target == DOCKER
    assert Mount.from_dict(mount.to_dict()) == mount
    for value in ({DOCKER: "s3://b"}, {"/var/lib": "volume://m"}, {DOCKER + "/x": "volume://m"}):
        with pytest.raises(ValidationError, match="restricted"):
            parse_mounts(value, allow_docker_cache=True)
    with pytest.raises(ValidationError, match="restricted"):
        parse_mounts([mount])


def test_secrets_are_not_shown() -> None:
    mount = Mount(
        "https://me:hunter2@host/x?X-Amz-Signature=hunter2",
        "/d",
        storage_options={"key": "hunter2", "secret": "hunter2", "client_kwargs": {"p": "hunter2"}, "anon": True},
    )
    stored = mount.to_dict(secrets=False)
    assert "hunter2" not in repr(mount) + json.dumps(stored)
    assert stored["storage_options"] == {"anon": True}
    assert Mount.from_dict(json.loads(json.dumps(mount.to_dict()))) == mount
    assert redact("s3://bucket/a?b") == "s3://bucket/a?b"


def test_a_mount_can_be_hashed_with_options() -> None:
    assert len({Mount("s3://b", "/d", storage_options={"anon": True}), Mount("s3://b", "/d")}) == 2


@given(paths)
def test_an_accepted_target_is_normal_and_hides_nothing(path: str) -> None:
    try:
        target = normalise_target(path)
    except ValidationError:
        normal = "/" + posixpath.normpath(path).lstrip("/")
        assert any(within(system, normal) or within(normal, system) for system in (*SYSTEM, DOCKER))
        return
    assert target == normalise_target(target) == normalise_target(target + "/") == normalise_target("/" + target)
    assert target.startswith("/") and not target.endswith("/")
    assert not {".", "..", ""} & set(target[1:].split("/"))
    assert conceals(target, SYSTEM) is None


@given(st.text(max_size=30))
def test_any_string_parses_or_is_a_validation_error(text: str) -> None:
    for value in (text, {text: "s3://b"}, {"/data": text}, [text]):
        try:
            mounts = parse_mounts(value)
        except ValidationError:
            continue
        assert tuple(map(Mount.from_dict, [mount.to_dict() for mount in mounts])) == mounts


def test_the_module_needs_the_standard_library_only() -> None:
    code = "import sys, flowfn_runtime.data.spec; print({'fsspec', 's3fs', 'obstore', 'asyncio'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"
