"""`flow backends`."""

from __future__ import annotations

from typing import Any, NamedTuple

SUMMARY = "list where functions can run, what is there, and why not"
EXAMPLES = """\
  flow backends                        those that are built in, installed and configured; * is the one in use
  flow backends gpu-box ssh://me@host  only these: names, or URLs
  flow backends --json                 for programs
"""


class Row(NamedTuple):
    """One backend."""

    name: str
    type: str
    chosen: bool  # functions and tasks run there unless they say otherwise
    ready: bool
    can: list[str]  # "functions", "tasks"
    here: str  # what there is, or why it can't be used
    mend: str | None  # what to do about that


def add_arguments(parser: Any) -> None:
    parser.add_argument("names", nargs="*", metavar="NAME", help="names or URLs; all that are known by default")
    parser.add_argument("--json", action="store_true", help="as JSON")


def run(args: Any) -> int:
    from concurrent.futures import ThreadPoolExecutor

    from flowfn import config
    from flowfn.backends import registry

    from . import UNAVAILABLE, output

    settings = config.load()
    known = dict.fromkeys([settings.backend, *settings.backends, *registry.names()])
    names = args.names or list(known)
    with ThreadPoolExecutor(len(names)) as pool:  # some are asked over a network
        rows = list(pool.map(lambda name: look(name, settings), names))
    registry.close_all()
    if args.json:
        output.print_json([row._asdict() for row in rows])
    else:
        cells = [["*" if r.chosen else "", r.name, r.type, " ".join(r.can) or "-", _line(r.here)] for r in rows]
        output.table(["", "NAME", "TYPE", "RUNS", "HERE"], cells)
        for row in rows:
            if row.mend and (args.names or row.chosen):
                output.note(f"{row.name}: {row.mend}")
    return UNAVAILABLE if args.names and not all(row.ready for row in rows) else 0


def look(name: str, settings: Any) -> Row:
    """Ask one backend."""
    from flowfn.backends import registry
    from flowfn.backends.base import Backend
    from flowfn_runtime.errors import FlowError

    kind = settings.backends.get(name, {}).get("type", name.partition("://")[0])
    chosen = name == settings.backend
    try:
        backend = registry.get(name)
        here = backend.describe()
    except FlowError as error:
        return Row(name, kind, chosen, False, [], f"not from here: {error.message}", error.hint)
    except Exception as error:  # of somebody's backend: the others are listed all the same
        return Row(name, kind, chosen, False, [], f"not from here: {type(error).__name__}: {error}", None)
    can = ["functions", "tasks"] if type(backend).jobs is not Backend.jobs else ["functions"]
    return Row(name, kind, chosen, True, can, here, None)


def _line(text: str) -> str:
    """The first line; if it only leads to others, with the last of these."""
    first, *rest = text.strip().splitlines() or [""]
    return f"{first} {rest[-1].strip()}" if rest and first.endswith(":") else first
