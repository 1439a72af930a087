"""The options that say what a task is given: shared by `flow run` and `flow dev`."""

from __future__ import annotations

import os
from typing import Any


def add_task_options(parser: Any) -> None:
    """Add the options; `fields` turns them into `TaskConfig`'s fields."""
    parser.add_argument("-i", "--instance-type", "--gpu", dest="gpu", metavar="GPU", help="a100, a100:4, 8xh100, cpu")
    parser.add_argument(
        "-b", "--backend", metavar="WHERE", help="local, ssh://user@host, slurm, container, or one of the configuration"
    )
    parser.add_argument("-n", "--name", metavar="NAME", help="six hex digits are appended, unless --exact-name")
    parser.add_argument("--exact-name", action="store_true", help="append nothing to the name")
    parser.add_argument(
        "-e", "--env", action="append", default=[], metavar="K[=V]", help="a variable; without =V with its value here"
    )
    parser.add_argument(
        "--mount", action="append", default=[], metavar="[TARGET=]SOURCE", help="data: a URL, a path, volume://name"
    )
    parser.add_argument("--port", action="append", default=[], type=int, metavar="N", help="a port that it serves")
    parser.add_argument("-N", "--num-instances", type=int, metavar="N", help="number of nodes")
    parser.add_argument("-r", "--region", metavar="REGION", help="must be that of its volumes")
    parser.add_argument("-m", "--max-price", type=float, metavar="USD", help="for providers that bill")
    parser.add_argument("--image", metavar="IMAGE", help="for backends that run containers")
    parser.add_argument("--working-dir", metavar="DIR", help="where the command starts (default /workspace)")
    parser.add_argument("--code-root", metavar="DIR", help="the project's directory (default: this one)")
    parser.add_argument("--no-code", action="store_true", help="the project's files don't go along")
    parser.add_argument("--retries", type=int, metavar="N", help="start a command that failed again, N times at most")
    parser.add_argument("--max-run-time", type=float, metavar="HOURS", help="end it after that time")
    parser.add_argument("--depends-on", action="append", default=[], metavar="TASK", help="start when that completed")
    parser.add_argument("--allow-docker-cache", action="store_true", help="lets a volume lie on /var/lib/docker")


def fields(args: Any) -> dict[str, Any]:
    """`TaskConfig`'s fields that the options set."""
    given = {
        "backend": args.backend,
        "instance_type": args.gpu,
        "name": args.name,
        "unique_name": False if args.exact_name else None,
        "env": dict(map(_variable, args.env)) or None,
        "data_mounts": args.mount or None,
        "ports": args.port or None,
        "num_instances": args.num_instances,
        "region": args.region,
        "max_price_per_hour": args.max_price,
        "image": args.image,
        "working_dir": args.working_dir,
        "code_root": args.code_root,
        "upload_code": False if args.no_code else None,
        "retries": args.retries,
        "max_run_time_hours": args.max_run_time,
        "depends_on": args.depends_on or None,
        "allow_docker_cache": True if args.allow_docker_cache else None,
    }
    return {name: value for name, value in given.items() if value is not None}


def _variable(text: str) -> tuple[str, str]:
    from flowfn_runtime.errors import ValidationError

    name, equals, value = text.partition("=")
    if not equals:
        if name not in os.environ:
            raise ValidationError(f"--env {name}: there is no such variable here", hint=f"Write --env {name}=value.")
        value = os.environ[name]
    return name, value
