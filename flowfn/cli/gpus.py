"""`flow gpus`."""

from __future__ import annotations

from typing import Any

SUMMARY = "list this host's GPUs and who has them"
EXAMPLES = """\
  flow gpus                            the GPUs that gpu= can ask for, and which are free
  flow gpus --json                     for programs
  FLOW_GPUS=a100:4 flow gpus           slots as declared, on a machine without NVML
"""


def add_arguments(parser: Any) -> None:
    parser.add_argument("--json", action="store_true", help="print the inventory as JSON")


def run(args: Any) -> int:
    from flowfn import config
    from flowfn_runtime import gpus

    from . import output

    there = gpus.inventory(config.load().gpus)
    holders = gpus.holders(there)
    if args.json:
        output.print_json(
            {
                "source": there.source,
                "reason": there.reason,
                "gpus": [
                    {
                        "index": gpu.index,
                        "model": gpu.model,
                        "memory_bytes": gpu.memory_bytes or None,
                        "uuid": None if gpu.declared else gpu.uuid,
                        "name": gpu.name,
                        "declared": gpu.declared,
                        "processes": holders.get(gpu, []),
                    }
                    for gpu in there.gpus
                ],
            }
        )
        return 0
    if not there.gpus:
        output.note(f"no GPU here: {there.reason}")
        return 0
    output.table(
        ["INDEX", "MODEL", "MEMORY", "UUID", "USED BY"],
        [
            [
                gpu.index,
                gpu.model,
                output.size(gpu.memory_bytes) if gpu.memory_bytes else "",
                "(declared)" if gpu.declared else gpu.uuid,
                ", ".join(map(_process, holders.get(gpu, []))) or "free",
            ]
            for gpu in there.gpus
        ],
    )
    if there.source == "declared":
        output.note("these are declared (FLOW_GPUS or the configuration's gpus), not found by NVML")
    if there.reason:
        output.note(there.reason)
    return 0


def _process(pid: int) -> str:
    """A process in a few words: its id and the program, which may be gone by now."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            words = file.read().decode(errors="replace").split("\0")
    except OSError:
        return str(pid)
    program = words[0].rpartition("/")[2]
    return f"{pid} ({program})" if program else str(pid)
