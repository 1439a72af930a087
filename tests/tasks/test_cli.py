"""The `flow` command, as a terminal runs it."""

from __future__ import annotations

import json
import os
import pickle
import pty
import shutil
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from flowfn import cli
from flowfn.cli.run import call_arguments
from flowfn.client import Flow
from flowfn.task import Task

FLOW = [sys.executable, "-c", "import sys; from flowfn.cli import main; sys.exit(main())"]


def flow(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*FLOW, *arguments], capture_output=True, text=True, timeout=60, **options)  # type: ignore[call-overload, no-any-return]


def newest(client: Flow) -> Task:
    return client.list_tasks(limit=1)[0]


def test_help_teaches() -> None:
    done = flow("--help")
    assert done.returncode == 0 and "examples:" in done.stdout
    assert all(f"  {verb}" in done.stdout for verb in cli.VERBS)
    assert flow().returncode == cli.MISTAKE
    assert flow("--version").stdout.startswith("flow ")
    assert flow("help", "run").stdout == flow("run", "--help").stdout


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_help_with_examples(verb: str) -> None:
    module = import_module(f"flowfn.cli.{verb}")
    assert cli.VERBS[verb] == module.SUMMARY
    text = cli.parser_of(verb, module).format_help()
    assert f"usage: flow {verb}" in text and "examples:\n" in text and f"flow {verb}" in module.EXAMPLES


def test_the_help_imports_no_more_than_it_must() -> None:
    start = "import sys; from flowfn.cli import main; "
    code = start + "main(['--help']); print(len(sys.modules), 'argparse' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    bare = subprocess.run(
        [sys.executable, "-c", "import sys; print(len(sys.modules))"], capture_output=True, text=True, check=True
    )
    count, argparse = done.stdout.splitlines()[-1].split()
    assert int(count) - int(bare.stdout) < 25 and argparse == "False"
    code = start + "main(['ps']); print([m for m in ('pydantic', 'yaml', 'cloudpickle') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_backends(flow_home: Path) -> None:
    """Those that are built in, and what is configured; what can't be used says why, and what to do."""
    flow_home.mkdir(exist_ok=True)
    (flow_home / "config.toml").write_text(
        'backend = "near"\n[backends.near]\ntype = "local"\n[backends.far]\ntype = "ssh"\nhosts = ["127.0.0.1:1"]\n'
    )
    listed = flow("backends", "--json", env={**os.environ, "FLOW_GPUS": "a100:2"})
    rows = {row["name"]: row for row in json.loads(listed.stdout)}
    assert listed.returncode == 0 and rows.keys() >= {"near", "far", "local", "container", "ssh", "slurm", "ray"}
    near, far = rows["near"], rows["far"]
    assert near["chosen"] and near["ready"] and near["can"] == ["functions", "tasks"] and "2 x a100" in near["here"]
    assert not far["ready"] and far["type"] == "ssh" and "127.0.0.1:1" in far["here"] and "Try: ssh" in far["mend"]
    assert not rows["ssh"]["ready"] and "no hosts" in rows["ssh"]["here"]
    one = flow("backends", "far")
    assert one.returncode == cli.UNAVAILABLE and "refuses connections" in one.stdout and "Try: ssh" in one.stderr
    assert flow("backends", "nowhere").returncode == cli.UNAVAILABLE


def test_run_a_command(client: Flow) -> None:
    done = flow("run", "echo out; echo err >&2; exit 3")
    assert done.returncode == 3 and done.stdout == "out\n"
    assert "err\n" in done.stderr and "failed" in done.stderr and "Traceback" not in done.stderr
    assert flow("run", "echo", "several words", "-x").stdout == "several words -x\n"
    assert flow("run", "--", "printf", "%s", "-n").stdout == "-n"
    done = flow(
        "run",
        "-e",
        "A=1",
        "-e",
        "HOME_",
        "--mount",
        "volume://kept",
        "echo $A$HOME_; ls -d /volumes",
        env={**os.environ, "HOME_": "2"},
    )
    assert done.stdout == "12\n/volumes\n"
    assert flow("run", "echo $X", "--env", "X=after", "--name", "late").stdout == "after\n"
    assert newest(client).name.startswith("late-")


def test_run_a_script_and_a_function(project: Path, client: Flow) -> None:
    (project / "train.py").write_text("import sys; print(sys.argv[1:])")
    (project / "calc.py").write_text(
        "def add(a, b=1, *, scale=1): print('log'); return (a + b) * scale\ndef fail(): raise KeyError('k')"
    )
    assert flow("run", "train.py", "--lr", "0.1", "-n", "x").stdout == "['--lr', '0.1', '-n', 'x']\n"
    assert flow("run", "calc.py::add", "2", "--b", "3", "--scale=10").stdout == "log\n50\n"
    done = flow("run", "calc.py::fail")
    assert done.returncode == 1 and done.stderr.count("KeyError: 'k'") == 1
    assert flow("run", "none.py").returncode == cli.MISTAKE
    assert "did you mean 'add'" in flow("run", "calc.py::ad").stderr.lower()


def test_run_a_job_file(project: Path, client: Flow) -> None:
    (project / "job.yaml").write_text("name: job\nenv: {A: x}\ncommand: |\n  echo $A\n  echo $B\n")
    assert flow("run", "job.yaml", "-e", "A=y").stdout == "y\n\n"
    done = flow("run", "job.yaml", "--dry-run")
    assert done.returncode == 0 and "accepted" in done.stderr
    assert len(client.list_tasks()) == 1
    for text, says in (
        ("comand: x", "did you mean 'command'"),
        ("command: [", "YAML"),
        ("- a", "no job file"),
        ("command: x\nports: [80]", "1024"),
        ("command: x\ninstance_type: zx81", "zx81"),
    ):
        (project / "bad.yaml").write_text(text)
        done = flow("run", "bad.yaml")
        assert done.returncode in (cli.MISTAKE, cli.UNAVAILABLE) and says in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
    assert flow("run", "missing.yaml").returncode == cli.MISTAKE


def test_detached_and_fetched_later(project: Path, client: Flow) -> None:
    (project / "calc.py").write_text("def f(): return {'a': [1, 2]}\ndef g(): raise ValueError('bad')")
    task_id = flow("run", "--detach", "calc.py::f").stdout.strip()
    assert flow("wait", task_id).returncode == 0
    assert flow("result", task_id).stdout == "{'a': [1, 2]}\n"
    assert json.loads(flow("result", task_id, "--json").stdout) == {"a": [1, 2]}
    assert flow("result", task_id, "-o", "out.pkl").returncode == 0
    assert pickle.loads((project / "out.pkl").read_bytes()) == {"a": [1, 2]}
    bad = json.loads(flow("run", "--json", "calc.py::g").stdout)["id"]
    assert flow("wait", bad).returncode == 1
    done = flow("result", bad)
    assert done.returncode == 1 and "ValueError: bad" in done.stderr


def test_ps_status_and_cancel(client: Flow) -> None:
    assert json.loads(flow("ps", "--json").stdout) == []
    running = client.submit("echo up; sleep 300", name="long")
    next(iter(running.logs(follow=True)))
    failed = client.submit("exit 2", name="bad").wait(30)
    rows = json.loads(flow("ps", "--json").stdout)
    assert [(row["name"], row["state"]) for row in rows] == [(failed.name, "failed"), (running.name, "running")]
    table = flow("ps").stdout.splitlines()
    assert table[0].split()[:3] == ["TASK", "NAME", "STATE"] and len(table) == 3
    assert failed.name in flow("ps", "--state", "failed").stdout
    assert running.name not in flow("ps", "--state", "failed").stdout
    assert running.name in flow("ps", "-n", "0").stdout  # what is active is always shown
    assert flow("ps", "--state", "odd").returncode == cli.MISTAKE
    done = flow("status", "bad")
    assert "exit code: 2" in done.stdout and "failed" in done.stdout
    assert json.loads(flow("status", failed.task_id, "--json").stdout)["exit_code"] == 2
    assert flow("status", "none").returncode == cli.NOT_FOUND
    assert flow("wait", "long", "--timeout", "0.1").returncode == cli.TIMED_OUT
    assert flow("cancel").returncode == cli.MISTAKE
    assert flow("cancel", "--all").returncode == 0
    assert running.status == "cancelled"
    assert flow("wait", "long").returncode == 1


def test_control_c_says_what_goes_on(client: Flow) -> None:
    with subprocess.Popen(
        [*FLOW, "run", "-n", "long", "echo up; sleep 300"], stdout=-1, stderr=-1, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
        assert process.wait(20) == cli.INTERRUPTED
    task = newest(client)
    assert task.wait_started().status == "running"
    assert task.name in said and "flow logs -f" in said and "flow cancel" in said and "Traceback" not in said


def test_logs(client: Flow) -> None:
    task = client.submit("for i in 1 2 3; do echo o$i; echo e$i >&2; done").wait(30)
    done = flow("logs", task.name)
    assert (done.stdout, done.stderr) == ("o1\no2\no3\n", "e1\ne2\ne3\n")
    assert flow("logs", "-n", "1", "--stderr", task.name).stdout == "e3\n"
    nodes = client.submit("echo rank $FLOW_NODE_RANK", num_instances=2).wait(30)
    assert flow("logs", nodes.name).stdout == "[0] rank 0\n[1] rank 1\n"
    assert flow("logs", "--node", "1", nodes.name).stdout == "rank 1\n"
    assert flow("logs", "--node", "2", nodes.name).returncode == cli.FAILED
    # Who reads no further ends it without a word.
    pipe = f"{' '.join(map(repr, FLOW))} logs {task.name} | head -n 1"
    done = subprocess.run(pipe, shell=True, capture_output=True, text=True)
    assert done.stdout == "o1\n" and "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


def test_rm_forgets_what_has_ended(project: Path, flow_home: Path, client: Flow) -> None:
    (project / "old.py").write_text("old" * 1000)
    old = client.submit("echo old").wait(30)
    (project / "old.py").write_text("new")
    new = client.submit("echo new; sleep 300")
    assert next(iter(new.logs(follow=True))) == "new\n"
    assert flow("rm", new.task_id).returncode == cli.FAILED
    assert flow("rm").returncode == cli.MISTAKE
    assert "0 tasks" in flow("rm", "--older-than", "1").stderr
    assert "1 task " in flow("rm", "--older-than", "0").stderr
    assert flow("status", old.task_id).returncode == cli.NOT_FOUND
    assert not (flow_home / "tasks" / old.task_id).exists()
    contents = [path.read_text() for path in (flow_home / "code" / "blobs").rglob("*") if path.is_file()]
    assert contents == ["new"]
    assert new.status == "running"


def test_volumes(client: Flow) -> None:
    volume_id = flow("volume", "create", "models", "--size", "7").stdout.strip()
    assert flow("volume", "create", "models").stdout.strip() == volume_id
    client.submit("head -c 100000 /dev/zero > /volumes/x", mounts="volume://models").wait(30)
    (row,) = json.loads(flow("volume", "ls", "--json").stdout)
    assert (row["id"], row["name"], row["size_gb"], row["in_use"]) == (volume_id, "models", 7, False)
    assert json.loads(flow("volume", "du", "models", "--json").stdout)[0]["used_bytes"] >= 100000
    holder = client.submit("echo up; sleep 300", mounts="volume://models")
    next(iter(holder.logs(follow=True)))
    done = flow("volume", "rm", "models")
    assert done.returncode == cli.FAILED and "in use" in done.stderr
    holder.cancel().wait(30)
    assert flow("volume", "rm", "models").returncode == 0
    assert flow("volume", "rm", "models").returncode == cli.NOT_FOUND


def test_dev_runs_a_command_with_a_persistent_docker_directory(project: Path, client: Flow) -> None:
    (project / "code.py").write_text("")
    done = flow("dev", "-c", "ls; echo layer > /var/lib/docker/layer; exit 4")
    assert (done.returncode, done.stdout) == (4, "code.py\n")
    assert flow("dev", "-c", "cat /var/lib/docker/layer").stdout == "layer\n"
    assert not os.path.exists("/var/lib/docker/layer")


def test_dev_is_a_shell_on_a_terminal(project: Path, client: Flow) -> None:
    (project / "code.py").write_text("")
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(FLOW[0], [*FLOW, "dev"])

    def read_until(*wanted: bytes) -> None:
        said = b""
        for text in wanted:
            while text not in said:
                said += os.read(terminal, 4096)
            said = said.partition(text)[2]

    os.write(terminal, b"test -t 0 && PS1='read''y> '\n")
    read_until(b"ready> ")
    os.write(terminal, b"sh -c 'echo $(ls)-$((40+2)); exec sleep 100'\n")
    read_until(b"code.py-42")
    os.write(terminal, b"\x03")  # Ctrl-C ends the sleep, not the shell
    read_until(b"ready> ")
    os.write(terminal, b"echo still-$((40+2)); exit 7\n")
    read_until(b"still-42")
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 7
    os.close(terminal)


def test_shell_enters_a_running_task(client: Flow) -> None:
    if shutil.which("nsenter") is None:
        pytest.skip("nsenter is not installed: apt-get install util-linux")
    task = client.submit("echo inside > /tmp/mark; echo up; sleep 300", mounts="volume://kept")
    next(iter(task.logs(follow=True)))
    done = flow("shell", task.name, "-c", "cat /tmp/mark; pwd; ls -d /volumes; echo $FLOW_TASK_ID; exit 5")
    assert done.stdout == f"inside\n/workspace\n/volumes\n{task.task_id}\n" and done.returncode == 5
    task.cancel().wait(30)
    assert flow("shell", task.name).returncode == cli.FAILED


def test_doctor_and_init(project: Path, flow_home: Path) -> None:
    done = flow("init", "--project", "vision")
    assert done.returncode == 0 and (project / "job.yaml").exists()
    assert os.stat(flow_home / "config.toml").st_mode & 0o077 == 0
    assert Flow().config.project == "vision"
    assert "kept" in flow("init").stderr
    assert "hello from" in flow("run", "job.yaml").stdout
    done = flow("doctor", "--json")
    findings = {finding["name"]: finding for finding in json.loads(done.stdout)}
    assert findings["sandbox"]["state"] == "ok" and "vision" in findings["configuration"]["detail"]
    done = flow("doctor", env={**os.environ, "PATH": os.path.dirname(sys.executable)})
    assert done.returncode == 1 and "MISSING" in done.stdout and "bubblewrap" in done.stdout
    (flow_home / "config.toml").write_text("projekt = 'x'")
    done = flow("ps")
    assert done.returncode == cli.MISTAKE and "did you mean 'project'" in done.stderr
    assert "MISSING" in flow("doctor").stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_accepted_by_the_shell(shell: str, tmp_path: Path) -> None:
    script = flow("completion", shell).stdout
    assert (all(verb in script for verb in cli.VERBS) and "--follow" in script) or "follow" in script
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed: apt-get install {shell}")
    (tmp_path / "flow").write_text(script)
    done = subprocess.run([shell, "-n", str(tmp_path / "flow")], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_completion_in_bash(tmp_path: Path, client: Flow) -> None:
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    (bin_dir / "flow").write_text(f"#!/bin/sh\nexec {sys.executable} -c '{FLOW[2]}' \"$@\"\n")
    (bin_dir / "flow").chmod(0o755)
    task = client.submit("true", name="train").wait(30)

    def complete(*words: str) -> list[str]:
        code = (
            f"source <(flow completion bash); COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; _flow; "
            'printf "%s\\n" "${COMPREPLY[@]}"'
        )
        env = {**os.environ, "PATH": f"{bin_dir}:{os.environ['PATH']}"}
        return subprocess.run(["bash", "-c", code], capture_output=True, text=True, env=env, check=True).stdout.split()

    assert complete("flow", "sta") == ["status"]
    assert complete("flow", "logs", "tra") == [task.name]
    assert "--follow" in complete("flow", "logs", "--f")
    assert complete("flow", "volume", "cr") == ["create"]


def test_mistakes_are_told_without_a_traceback() -> None:
    for arguments, code in (
        (["statsu"], cli.MISTAKE),
        (["logs"], cli.MISTAKE),
        (["logs", "none"], cli.NOT_FOUND),
        (["run", "--gpu", "zx81:many", "true"], cli.MISTAKE),
        (["run", "--gpu", "a100", "true"], cli.UNAVAILABLE),
        (["run", "--port", "80", "true"], cli.MISTAKE),
        (["run", "--mount", "/usr=s3://b/x", "true"], cli.MISTAKE),
        (["run", "--depends-on", "none", "true"], cli.NOT_FOUND),
        (["run", "-e", "NOT_SET_ANYWHERE", "true"], cli.MISTAKE),
    ):
        done = flow(*arguments)
        assert done.returncode == code, (arguments, done)
        assert "Traceback" not in done.stderr and done.stderr.strip(), arguments


def test_arguments_of_a_function() -> None:
    assert call_arguments(["1", "a", "--x", "0.5", "--flag", "--name=b-c", "--list", "[1, 2]", "--", "--y"]) == (
        [1, "a"],
        {"x": 0.5, "flag": True, "name": "b-c", "list": [1, 2], "y": True},
    )
    assert call_arguments(["--some-name", "-1"]) == ([], {"some_name": -1})
