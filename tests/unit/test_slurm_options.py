"""Slurm's words: options, GPUs as clusters name them, what fits where. No Slurm is asked."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

import flowfn as flow
from flowfn import slurm_options as so
from flowfn.spec import FunctionSpec
from flowfn_runtime import slurmsays
from flowfn_runtime.gpu_request import parse_gpu

LISTING = """\
gpu|gpu*|g1|idle|64|512000|gpu:nvidia_a100-sxm4-80gb:4(S:0-1)|(null)
gpu|gpu*|g1|idle|64|512000|gpu:nvidia_a100-sxm4-80gb:4(S:0-1)
gpu|gpu*|g2|down*|64|512000|gpu:V100:8
gpu|gpu*|g3|mixed|32|256000+|gpu:2,license:1
cpu|cpu|c1|allocated|128|1000000|(null)
"""


def nodes() -> list[so.Node]:
    return so.nodes_of(LISTING)


def spec(**options: Any) -> FunctionSpec:
    return FunctionSpec.from_options(**options)


@pytest.mark.parametrize(
    ("time", "expected"),
    [
        (None, None),
        (90, "0:01:30"),
        (0.2, "0:00:01"),
        ("90m", "1:30:00"),
        ("2d", "48:00:00"),
        ("1-12:00:00", "1-12:00:00"),
        ("1-12", "1-12"),
        ("30:00", "30:00"),
        (" 4:00:00 ", "4:00:00"),
        ("unlimited", "UNLIMITED"),
    ],
)
def test_times(time: Any, expected: str | None) -> None:
    assert so.job_time(time) == expected


@pytest.mark.parametrize("time", ["30", "abc", 0, -1, "1-", "::", True])
def test_times_that_are_none(time: Any) -> None:
    with pytest.raises(flow.ValidationError, match=r"time=.*1-12:00:00"):
        flow.Slurm(time=time)


@pytest.mark.parametrize(
    ("gres", "expected"),
    [
        ("(null)", ()),
        ("gpu:2", (("", 2),)),
        ("gpu", (("", 1),)),
        ("gpu:a100:4(S:0-1)", (("a100", 4),)),
        ("gpu:a100:2(S:0),gpu:v100:1,license:7", (("a100", 2), ("v100", 1))),
        ("mps:100,gpu:tesla_k80:2(S:0,2)", (("tesla_k80", 2),)),
    ],
)
def test_generic_resources(gres: str, expected: Any) -> None:
    assert so.gpus_of(gres) == expected


@pytest.mark.parametrize(
    ("asked", "kind", "fit"),
    [
        ("a100", "a100", True),
        ("A100", "nvidia_a100-sxm4-80gb", True),
        ("a100-80gb", "nvidia_a100-sxm4-80gb", True),
        ("a100-80gb", "a100_80gb", True),
        ("a100-80gb", "a100-sxm4-40gb", False),
        ("a100-80gb", "a100", False),  # who knows
        ("v100", "tesla_v100", True),
        ("h100", "a100", False),
        ("rtx4090", "geforce_rtx_4090", True),
        ("a10", "a100", False),
    ],
)
def test_types_of_gpus(asked: str, kind: str, fit: bool) -> None:
    assert so.fits(parse_gpu(asked)[0], kind) is fit


def test_nodes() -> None:
    listed = nodes()
    assert [node.name for node in listed] == ["g1", "g2", "g3", "c1"]
    assert [node.up for node in listed] == [True, False, True, True]
    assert listed[0].gpus == (("nvidia_a100-sxm4-80gb", 4),) and listed[2].memory_mib == 256000
    assert [node.name for node in so.partition_nodes(listed, None)] == ["g1", "g2", "g3"]
    assert [node.name for node in so.partition_nodes(listed, "cpu,gpu")] == ["g1", "g2", "g3", "c1"]
    with pytest.raises(flow.ResourceUnavailable, match=r"'tpu'.*gpu \(1 node of 64 cores, 500 GiB, nvidia_a100"):
        so.partition_nodes(listed, "tpu")


@pytest.mark.parametrize(
    ("options", "arguments", "slots"),
    [
        ({}, ["--cpus-per-task=1"], 96),
        ({"cpu": 2.5, "memory": "1.5GiB"}, ["--cpus-per-task=3", "--mem=1536M"], 31),
        ({"gpu": "a100:2"}, ["--cpus-per-task=1", "--gres=gpu:nvidia_a100-sxm4-80gb:2"], 2),
        ({"gpu": 2}, ["--cpus-per-task=1", "--gres=gpu:2"], 3),
        ({"gpu": ["h100", "v100:4"]}, ["--cpus-per-task=1", "--gres=gpu:V100:4"], 1),  # its node is down: it may wait
        ({"memory": "300GiB", "cpu": 1}, ["--cpus-per-task=1", "--mem=307200M"], 1),
    ],
)
def test_what_is_asked_for(options: Any, arguments: list[str], slots: int) -> None:
    need, most = so.choose(spec(**options), so.partition_nodes(nodes(), None))
    assert need.arguments() == arguments and most == slots


@pytest.mark.parametrize("options", [{"gpu": "a100:8"}, {"gpu": "b200"}, {"memory": "2TiB"}, {"cpu": 65}])
def test_what_no_node_has(options: Any) -> None:
    with pytest.raises(flow.ResourceUnavailable) as caught:
        so.choose(spec(**options), so.partition_nodes(nodes(), None))
    ((option, value),) = options.items()
    assert f"{option}={value}" in str(caught.value).replace("2048GiB", "2TiB") and "V100:8" in str(caught.value)


def test_options() -> None:
    options = flow.Slurm(partition="gpu", account="me", qos="high", constraint="ib&ssd", time="4h", extra="-x 'n1 n2'")
    assert options.arguments() == [
        "--partition=gpu", "--account=me", "--qos=high", "--constraint=ib&ssd", "--time=4:00:00", "-x", "n1 n2"
    ]  # fmt: skip
    assert options == pickle.loads(pickle.dumps(options)) and hash(options) == hash(flow.Slurm(**options._asdict()))
    assert flow.Slurm(wait="10m").wait_s == 600


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("partition", ""),
        ("account", 3),
        ("qos", "--gres=gpu:8"),
        ("workers", 0),
        ("workers", True),
        ("wait", "soon"),
        ("extra", ["--output=/tmp/x"]),
        ("extra", "-o x"),
        ("extra", [3]),
        ("extra", ["-n4"]),
        ("extra", ["--ntasks=4"]),
    ],
)
def test_options_that_are_not_accepted(option: str, value: Any) -> None:
    with pytest.raises(flow.ValidationError, match=option):
        flow.Slurm(**{option: value})


def test_jobs() -> None:
    jobs = slurmsays.jobs_of(
        "flowfn-1|12|PENDING||500M|ReqNodeNotAvail, UnavailableNodes:n[1|2]\nflowfn-2|13|RUNNING|n1|0|None\nnoise\n"
    )
    assert jobs["flowfn-1"].reason == "ReqNodeNotAvail, UnavailableNodes:n[1|2]" and not jobs["flowfn-1"].over
    assert jobs["flowfn-2"].nodes == "n1"
    assert slurmsays.jobs_of("a|1|CANCELLED|||x")["a"].over


@pytest.mark.parametrize(
    ("reason", "never"),
    [
        ("Resources", False),
        ("Priority", False),
        ("QOSGrpCpuLimit", False),
        ("AssocGrpGRES", False),
        ("ReqNodeNotAvail, UnavailableNodes:n3", False),
        ("BadConstraints", True),
        ("PartitionTimeLimit", True),
        ("InvalidAccount", True),
        ("Job's account not known, so it can't use this partition (physics allows physics)", True),
        ("QOSMaxWallDurationPerJobLimit", True),
    ],
)
def test_reasons_that_do_not_pass(reason: str, never: bool) -> None:
    assert slurmsays.hopeless(reason) is never


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("slurmstepd: error: *** STEP 12.0 ON n1 CANCELLED AT 2024-01-01T00:00:00 DUE TO TIME LIMIT ***", "time limit"),
        ("slurmstepd: error: *** STEP 12.0 ON n1 CANCELLED AT 2024-01-01T00:00:00 DUE TO PREEMPTION ***", "preempted"),
        ("slurmstepd: error: *** STEP 12.0 ON n1 CANCELLED AT 2024-01-01T00:00:00 ***", "cancelled from outside"),
        ("srun: error: Node failure on n2", "lost its node"),
        ("slurmstepd: error: Detected 1 oom_kill event in StepId=12.0. Some of the step tasks have been OOM Killed.",
         "memory"),
        ("slurmstepd: error: Detected 1 oom-kill event(s) in StepId=12.0.", "memory"),
        ("NODE_FAIL None", "lost its node"),
        ("PREEMPTED None", "preempted"),
        ("TIMEOUT TimeLimit", "time limit"),
        ("FAILED NonZeroExitCode", None),
        ("srun: error: n3: task 0: Exited with exit code 1", None),
    ],
)  # fmt: skip
def test_what_happened_to_a_job(said: str, words: str | None) -> None:
    found = slurmsays.end_of(said)
    assert found is None if words is None else found is not None and words in found


@pytest.mark.parametrize(
    ("said", "hint"),
    [
        ("Invalid account or account/partition combination specified", "set account= to what this lists: sacctmgr"),
        ("Invalid qos specification", "set qos= to what this lists: sacctmgr"),
        ("Invalid feature specification", "set constraint= to what this lists: sinfo"),
        ("invalid partition specified: far", "set partition= to what the cluster has: main"),
    ],
)
def test_where_to_look_after_a_refusal(said: str, hint: str) -> None:
    error = slurmsays.meaning(f"srun: error: Unable to allocate resources: {said}", "--that", "main (2 nodes)")
    assert isinstance(error, flow.ResourceUnavailable) and (error.hint or "").startswith(hint)
