"""Options of a function: what is accepted, what it means, and what a refusal says."""

from __future__ import annotations

import pickle
import subprocess
import sys
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowfn.spec import (
    Environment,
    FunctionSpec,
    GpuRequest,
    Resources,
    Retries,
    parse_cpu,
    parse_gpu,
    parse_memory,
    parse_retries,
    parse_timeout,
)
from flowfn_runtime.errors import ConfigError, ValidationError
from flowfn_runtime.gpu_request import MAX_COUNT, model_of, parse_slots


@pytest.mark.parametrize(
    ("value", "canonical"),
    [
        ("a100", "a100"),
        ("A100", "a100"),
        ("a100:4", "a100:4"),
        ("4xa100", "a100:4"),
        ("4 x A100", "a100:4"),
        ("8xh100", "h100:8"),
        ("h100x8", "h100:8"),
        ("a100-80gb:2", "a100-80gb:2"),
        ("2xA100-80GB", "a100-80gb:2"),
        ("a100-80gb.sxm.4x", "a100-80gb:4"),
        ("h100-80gb.sxm.8x", "h100-80gb:8"),
        ("b200-192gb.8x", "b200-192gb:8"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("gpu:2", "gpu:2"),
        ("any", "gpu"),
        ("GPU", "gpu"),
        ("anyx2", "gpu:2"),
        (3, "gpu:3"),
        ("2", "gpu:2"),
        ("24gb", "gpu-24gb"),
        ("rtx4090", "rtx4090"),
        ("rtx4090x2", "rtx4090:2"),
        ("gtx1080", "gtx1080"),
        ("l40s", "l40s"),
        ("t4:1", "t4"),
        ("a100x", "a100x"),
        ("a100-mig-1g.5gb:2", "a100-mig-1g.5gb:2"),
    ],
)
def test_gpu_forms(value: Any, canonical: str) -> None:
    (request,) = parse_gpu(value)
    assert str(request) == canonical
    assert parse_gpu(canonical) == (request,)


@pytest.mark.parametrize("value", ["cpu", "CPU", "", "  ", "none", None, 0, "0", [], ()])
def test_no_gpu(value: Any) -> None:
    assert parse_gpu(value) == ()


def test_a_list_holds_fallbacks_in_order_and_once() -> None:
    assert parse_gpu(["h100:2", "A100", 4, "2xh100", GpuRequest("l4")]) == (
        GpuRequest("h100", None, 2),
        GpuRequest("a100"),
        GpuRequest(None, None, 4),
        GpuRequest("l4"),
    )


@pytest.mark.parametrize(
    "value",
    [
        *("a100:0", "a100:-1", "4xa100:2", "a100:4:4", "4x", "x4", ":4", "sxm", "4090", "a100:many", "a100,h100"),
        *("cpu:4", "a1x2-sxm", "a100-40gb-80gb", "a100-0gb", "a100;rm", "a\n", "à100", "a" * 65, "a100:99999999999"),
        *(-1, True, 1.5, b"a100", {"a100": 4}, object(), ["a100", "cpu"], ["a100", None], [0]),
    ],
)
def test_a_refused_gpu_names_option_value_and_what_is_accepted(value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_gpu(value)
    assert f"gpu={value!r}" in str(caught.value)
    assert '"a100:4"' in str(caught.value)


def test_fallbacks_do_not_nest() -> None:
    with pytest.raises(ConfigError, match="gpu="):
        parse_gpu([["a100"]])


_alphabet = st.sampled_from("axgh0148:.-_ ,*bspmcie")
_pieces = st.sampled_from(
    ["a100", "h100", "gpu", "any", "80gb", "sxm4", "4x", "x8", ":2", "-", ".", "mig", "1g.5gb", "0"]
)


@given(st.text() | st.text(_alphabet) | st.lists(_pieces).map("".join))
def test_any_text_is_read_or_refused_and_what_is_read_is_read_back(text: str) -> None:
    try:
        requests = parse_gpu(text)
    except ConfigError:
        return
    for request in requests:
        assert parse_gpu(str(request)) == (request,)
        assert parse_gpu(str(request).upper()) == (request,)
        assert 1 <= request.count <= MAX_COUNT


@given(
    st.builds(
        GpuRequest,
        st.none() | st.sampled_from(["a100", "h100", "l40s", "rtx-a6000", "rtx-4090", "v100", "gb200", "a10g"]),
        st.none() | st.integers(1, 999),
        st.integers(1, MAX_COUNT),
    )
)
def test_the_canonical_form_is_read_back(request: GpuRequest) -> None:
    assert parse_gpu(str(request)) == (request,)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner),
    )
)
def test_options_raise_nothing_but_config_errors(value: Any) -> None:
    for option in ("gpu", "cpu", "memory", "env", "secrets", "timeout", "retries", "max_workers", "name", "backend"):
        try:
            spec = FunctionSpec.from_options(**{option: value})
        except ConfigError as error:
            assert option in str(error)
        else:
            hash(spec.shape)


@pytest.mark.parametrize(
    ("device", "model"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100 80GB PCIe", "a100"),
        ("Tesla V100-SXM2-16GB", "v100"),
        ("Tesla T4", "t4"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA RTX A6000", "rtx-a6000"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx-6000-ada"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 NVL", "h100"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "a100-mig-1g.5gb"),
        ("", "gpu"),
    ],
)
def test_model_of_a_device_name(device: str, model: str) -> None:
    assert model_of(device) == model


GB = 10**9


@pytest.mark.parametrize(
    ("asked", "model", "memory", "fits"),
    [
        ("a100", "a100", 85 * GB, True),
        ("a100-80gb", "a100", 85 * GB, True),
        ("a100-80gb", "a100", 42 * GB, False),
        ("a100-40gb", "a100", 85 * GB, True),
        ("a100-80gb", "a100", 0, False),
        ("a10", "a100", 85 * GB, False),
        ("a100", "a10", 24 * GB, False),
        ("h100", "gh200", 96 * GB, False),
        ("a10g-24gb", "a10g", 23_835_000_000, True),
        ("any", "l4", 0, True),
        ("gpu-40gb", "l4", 24 * GB, False),
        ("rtx4090", "rtx-4090", 25 * GB, True),
        ("a6000", "rtx-a6000", 48 * GB, True),
        ("a100", "a100-mig-1g.5gb", 5 * GB, False),
        ("mig-1g.5gb", "a100-mig-1g.5gb", 5 * GB, True),
        ("a100-mig-1g.5gb", "a100-mig-1g.5gb", 5 * GB, True),
        ("any", "a100-mig-1g.5gb", 5 * GB, True),
    ],
)
def test_which_device_fits(asked: str, model: str, memory: int, fits: bool) -> None:
    assert parse_gpu(asked)[0].fits(model, memory) is fits


def test_declared_slots() -> None:
    assert parse_slots("a100:4, h100-80gb:2,") == [GpuRequest("a100", None, 4), GpuRequest("h100", 80, 2)]
    assert parse_slots("none") == []
    with pytest.raises(ConfigError, match="FLOW_GPUS="):
        parse_slots("a100:4,what?")


@pytest.mark.parametrize(
    ("value", "size"),
    [
        *[("32GiB", 32 << 30), ("32Gi", 32 << 30), ("512MB", 512_000_000), ("1.5 gib", 3 << 29), ("2T", 2 * 10**12)],
        *[(1 << 30, 1 << 30), ("2048KiB", 2 << 20), ("2000000", 2_000_000), (None, None)],
    ],
)
def test_memory(value: Any, size: int | None) -> None:
    assert parse_memory(value) == size


@pytest.mark.parametrize("value", ["", "GiB", "-1GiB", "32 Gib Gib", "32X", "nan", 1.5, True, [], "0", 0, 32, "1KiB"])
def test_refused_memory(value: Any) -> None:
    with pytest.raises(ValidationError, match=r'memory=.*accepted: .*"32GiB"'):
        parse_memory(value)


def test_a_forgotten_unit_is_guessed() -> None:
    with pytest.raises(ValidationError) as caught:
        parse_memory(32)
    assert 'memory="32GiB"' in str(caught.value)


def test_cpu() -> None:
    assert parse_cpu(4) == 4.0
    assert parse_cpu(0.5) == 0.5
    assert parse_cpu(None) is None
    for value in (0, -1, "4", True, float("nan"), float("inf")):
        with pytest.raises(ValidationError, match="cpu="):
            parse_cpu(value)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [(90, 90), (0.5, 0.5), ("10m", 600), ("1.5h", 5400), ("1 d", 86400), (timedelta(minutes=2), 120), (None, None)],
)
def test_timeout(value: Any, seconds: float | None) -> None:
    assert parse_timeout(value) == seconds


@pytest.mark.parametrize("value", [0, -1, "", "10", "10y", True, float("nan"), float("inf"), timedelta(0), b"1s"])
def test_refused_timeout(value: Any) -> None:
    with pytest.raises(ValidationError, match=r"timeout=.*accepted: seconds \(more than 0\)"):
        parse_timeout(value)


def test_retries() -> None:
    assert parse_retries(None) is parse_retries(0) is parse_retries(Retries(0)) is None
    assert parse_retries(3) == Retries(3)
    for value in (-1, True, "3", 1.5):
        with pytest.raises(ValidationError, match=r"retries=.*flow\.Retries"):
            parse_retries(value)


def test_retry_delays_grow_to_their_maximum() -> None:
    retries = Retries(10, initial_delay=1, backoff=2, max_delay=10, jitter=0)
    assert [retries.delay(n) for n in (1, 2, 3, 4, 5, 5000)] == [1, 2, 4, 8, 10, 10]
    assert Retries(1, initial_delay=0).delay(1) == 0


@given(st.integers(1, 10**6), st.text(), st.floats(0, 1))
def test_jitter_is_in_its_range_and_comes_from_the_seed(attempt: int, seed: str, jitter: float) -> None:
    retries = Retries(3, jitter=jitter)
    full = Retries(3, jitter=0).delay(attempt)
    assert full * (1 - jitter) <= retries.delay(attempt, seed) <= full
    assert retries.delay(attempt, seed) == retries.delay(attempt, seed)


def test_jitter_spreads_calls() -> None:
    delays = [Retries(3, jitter=1.0).delay(1, call) for call in range(100)]
    assert min(delays) < 0.2 < 0.8 < max(delays)


def test_which_errors_are_retried() -> None:
    retries = Retries(2, on=(ConnectionError,))
    assert retries.should_retry(1, ConnectionResetError())
    assert retries.should_retry(2, ConnectionResetError())
    assert not retries.should_retry(3, ConnectionResetError())
    assert not retries.should_retry(1, ValueError())
    assert Retries(1, on=OSError).on == (OSError,)  # type: ignore[arg-type]
    assert Retries(1, on=[OSError]).on == (OSError,)  # type: ignore[arg-type]
    assert not Retries(1).should_retry(1, KeyboardInterrupt())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"max_retries": -1}, "max_retries=-1"),
        ({"max_retries": 1, "backoff": 0.5}, "backoff=0.5"),
        ({"max_retries": 1, "jitter": 2}, "jitter=2"),
        ({"max_retries": 1, "initial_delay": -1}, "initial_delay=-1"),
        ({"max_retries": 1, "max_delay": float("nan")}, "max_delay=nan"),
        ({"max_retries": 1, "on": ()}, r"on=\(\)"),
        ({"max_retries": 1, "on": ("x",)}, "on="),
    ],
)
def test_refused_retries(options: Any, named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        Retries(**options)


def test_a_spec_from_every_option() -> None:
    spec = FunctionSpec.from_options(
        gpu="a100:4",
        cpu=8,
        memory="32GiB",
        env={"A": "1"},
        secrets=["HF_TOKEN"],
        timeout="10m",
        retries=2,
        image="docker.io/library/python:3.12",
        max_workers=3,
        idle_timeout=0,
        backend="local",
        name="train",
    )
    assert spec.resources == Resources((GpuRequest("a100", None, 4),), 8.0, 32 << 30)
    assert (spec.timeout, spec.retries, spec.idle_timeout, spec.name) == (600.0, Retries(2), 0.0, "train")
    assert FunctionSpec.from_options() == FunctionSpec()


def test_mounts() -> None:
    spec = FunctionSpec.from_options(mounts={"/train": "s3://bucket/train", "/models": "volume://m"})
    assert [(mount.target, mount.read_only) for mount in spec.mounts] == [("/train", True), ("/models", False)]
    assert spec.shape == FunctionSpec.from_options(mounts=list(spec.mounts)).shape
    assert spec.shape != FunctionSpec().shape
    with pytest.raises(ValidationError):
        FunctionSpec.from_options(mounts={"/proc": "s3://bucket/train"})


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *[("env", {"A": 1}), ("env", {"": "1"}), ("env", {"A=B": "1"}), ("env", ["A"]), ("env", {"A": "a\0b"})],
        *[("secrets", [""]), ("secrets", {"A": 1}), ("secrets", 3), ("max_workers", 0), ("max_workers", True)],
        *[("name", ""), ("name", "-a"), ("name", "a/b"), ("name", 3), ("backend", ""), ("backend", 3), ("image", "")],
        *[("idle_timeout", -1)],
    ],
)
def test_refused_options_are_named(option: str, value: Any) -> None:
    with pytest.raises(ValidationError, match=f"{option}.*accepted: "):
        FunctionSpec.from_options(**{option: value})


def test_an_unknown_option_names_the_nearest() -> None:
    with pytest.raises(
        ValidationError, match=r"gpus='a100' is no option.*accepted: gpu, cpu(.|\n)*did you mean gpu=\?"
    ):
        FunctionSpec.from_options(gpus="a100")
    with pytest.raises(ValidationError) as caught:
        FunctionSpec.from_options(quantum_flux=1)
    assert caught.value.hint is None


def test_values_of_env_and_secrets_are_never_shown() -> None:
    spec = FunctionSpec.from_options(env={"TOKEN": "hunter2"}, secrets={"KEY": "hunter2"})
    for text in (repr(spec), str(spec), repr(spec.env), repr(spec.shape), repr(spec.environment({}))):
        assert "hunter2" not in text
    assert "TOKEN=***" in repr(spec)
    for options in (
        {"secret": "hunter2"},
        {"secrets": ["A=hunter2!"]},
        {"secrets": ["hunter2 "]},
        {"env": "hunter2 "},
        {"envs": {"A": "hunter2"}},
        {"env": {"A": b"hunter2"}},
    ):
        with pytest.raises(ValidationError) as caught:
            FunctionSpec.from_options(**options)
        assert "hunter2" not in str(caught.value)


def test_the_environment_of_a_worker() -> None:
    spec = FunctionSpec.from_options(env={"A": "1", "B": "1"}, secrets=["B", "C"])
    assert spec.environment({"B": "2", "C": "3", "D": "4"}) == Environment({"A": "1", "B": "2", "C": "3"})
    with pytest.raises(ValidationError, match="C not set") as caught:
        spec.environment({"B": "2"})
    assert "secrets={'C': value}" in str(caught.value)
    assert FunctionSpec.from_options(secrets={"A": "x"}).environment({}) == Environment({"A": "x"})
    assert FunctionSpec.from_options(secrets="HF_TOKEN").secrets == ("HF_TOKEN",)


def test_replace_keeps_what_is_not_named_and_checks_what_is() -> None:
    spec = FunctionSpec.from_options(gpu="a100", timeout=5)
    assert spec.replace(timeout=None) == FunctionSpec.from_options(gpu="a100")
    with pytest.raises(ValidationError, match="timeout="):
        spec.replace(timeout=-5)


@pytest.mark.parametrize(
    "options",
    [
        *[{"gpu": "a100"}, {"cpu": 2}, {"memory": "1GiB"}, {"env": {"A": "1"}}, {"env": {"A": "2"}}],
        *[{"secrets": ["A"]}, {"secrets": {"A": "1"}}, {"image": "x"}, {"backend": "ssh"}],
        *[{"max_workers": 1}, {"idle_timeout": 1}],
    ],
)
def test_what_decides_the_shape(options: Any) -> None:
    base = FunctionSpec.from_options(env={"Z": "0"})
    assert base.replace(**options).shape != base.shape
    assert base.replace(**options).shape == base.replace(**options).shape
    assert hash(base.replace(**options).shape) == hash(base.replace(**options).shape)


def test_what_does_not_decide_the_shape() -> None:
    assert FunctionSpec.from_options(timeout=5, retries=2, name="x").shape == FunctionSpec().shape
    assert FunctionSpec.from_options(gpu="4xA100").shape == FunctionSpec.from_options(gpu="a100:4").shape


def test_an_unhashable_image_is_its_own_shape() -> None:
    class Image:
        __hash__ = None  # type: ignore[assignment]

    image = Image()
    assert FunctionSpec.from_options(image=image).shape == FunctionSpec.from_options(image=image).shape
    assert FunctionSpec.from_options(image=image).shape != FunctionSpec.from_options(image=Image()).shape


def test_a_spec_survives_pickling() -> None:
    spec = FunctionSpec.from_options(gpu=["a100", "h100"], env={"A": "1"}, retries=Retries(2, on=OSError))  # type: ignore[arg-type]
    shape = spec.shape
    copy = pickle.loads(pickle.dumps(spec))
    assert copy == spec
    assert copy.shape == shape
    # Another process hashes text otherwise; the key must not keep this one's hash.
    code = (
        "import pickle, sys\n"
        "from flowfn.spec import FunctionSpec\n"
        "spec = pickle.load(sys.stdin.buffer)\n"
        "print(spec.shape == FunctionSpec.from_options(gpu=spec.gpu, env=spec.env, retries=spec.retries).shape)"
    )
    run = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(spec), capture_output=True, check=True)
    assert run.stdout == b"True\n"


def test_importing_the_spec_stays_light() -> None:
    code = (
        "import sys, dataclasses, re; before = set(sys.modules); import flowfn.spec; print(*set(sys.modules) - before)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    foreign = {name.partition(".")[0] for name in run.stdout.split()} - {
        "flowfn",
        "flowfn_runtime",
        *sys.stdlib_module_names,
    }
    assert foreign == set()
    assert not {"flowfn_runtime.data.spec", "pydantic", "asyncio", "subprocess", "difflib"} & set(run.stdout.split())
