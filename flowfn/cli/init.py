"""`flow init`."""

from __future__ import annotations

import os
from typing import Any

SUMMARY = "write a configuration file and a first job file"
EXAMPLES = """\
  flow init                        ~/.flowfn/config.toml, with every setting explained, and ./job.yaml
  flow init --project vision       with the project's name set
"""

_CONFIG = """\
# flowfn's settings for this user. The same keys may stand in a pyproject.toml under [tool.flow], which wins over
# this file; the environment (FLOW_BACKEND, FLOW_PROJECT, FLOW_GPUS, FLOW_REGION, ...) wins over both.

project = "{project}"
# backend = "local"            # where functions run
# gpus = "a100:4"              # declare GPU slots where none are found
# region = "here"              # of new volumes and of tasks

# [storage."s3://my-bucket"]   # options for every URL that begins so, as fsspec names them
# endpoint_url = "https://minio.example:9000"
"""
_JOB = """\
# Run it: flow run job.yaml        Check it only: flow run job.yaml --dry-run
name: hello
# instance_type: a100:1
# data_mounts:
#   /data: s3://my-bucket/dataset
# volumes:
#   - name: results
#     mount_path: /results
#     size_gb: 10
# env:
#   LEVEL: "1"
command: |
  echo "hello from $(hostname), in $PWD"
  ls
"""


def add_arguments(parser: Any) -> None:
    parser.add_argument("--project", default="default", metavar="NAME", help="the project's name (default: default)")
    parser.add_argument("--no-job", action="store_true", help="no job.yaml in this directory")
    parser.add_argument("--json", action="store_true", help="as JSON")


def run(args: Any) -> int:
    from flowfn import config
    from flowfn_runtime import paths, tasksql

    from . import output

    written, kept = [], []
    wanted = [(config.user_file(), _CONFIG.format(project=args.project))]
    if not args.no_job:
        wanted.append((os.path.abspath("job.yaml"), _JOB))
    for path, text in wanted:
        try:
            if path.startswith(paths.home()):
                paths.private_dir(paths.home())
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(text)
            written.append(path)
        except FileExistsError:
            kept.append(path)
        except OSError as error:
            raise tasksql.explain(error) from error
    config.load()
    if args.json:
        output.print_json({"written": written, "kept": kept})
        return 0
    for path in written:
        output.note(f"wrote {path}")
    for path in kept:
        output.note(f"kept {path}, which was there")
    output.note("see what this machine can do: flow doctor")
    return 0
