"""`flow data`."""

from __future__ import annotations

import sys
from typing import Any

SUMMARY = "list, copy and read data at URLs"
EXAMPLES = """\
  flow data ls s3://datasets/               what is directly below
  flow data ls -r s3://datasets/train       every object
  flow data stat s3://datasets/train        how much it is
  flow data cp s3://datasets/train ./train  fetch it
  flow data cp results/ s3://results/run-1  and write it
  flow data cat s3://datasets/README.md     read one object
"""


def add_arguments(parser: Any) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, summary in (
        ("ls", "list what is below a URL"),
        ("stat", "show what a URL stands for"),
        ("cp", "copy between a URL and a local path"),
        ("cat", "write an object to stdout"),
    ):
        action = actions.add_parser(name, help=summary, description=summary)
        if name == "ls":
            action.add_argument(
                "-r", "--recursive", action="store_true", help="everything below, not only what is direct"
            )
        if name == "cp":
            action.add_argument("source", metavar="FROM", help="a URL or a path")
            action.add_argument("target", metavar="TO", help="a URL or a path")
        else:
            action.add_argument("url", metavar="URL", help="any fsspec URL, volume://name/path, or a path")
        if name != "cat":
            action.add_argument("--json", action="store_true", help="as JSON")


def run(args: Any) -> int:
    code: int = globals()[f"_{args.action}"](args)
    return code


def _open(url: str) -> Any:
    from flowfn import config
    from flowfn_runtime.data.sources import open_source

    return open_source(url, config.load().storage_options(url))


def _ls(args: Any) -> int:
    from flowfn_runtime.data.copying import children

    from . import output

    source = _open(args.url)
    try:
        if args.recursive:
            listing = source.listing()
            entries = [(object.key[len(listing.base) :], object) for object in listing.objects]
        else:
            entries = list(children(source))
    finally:
        source.close()
    if args.json:
        output.print_json(
            [{"name": name, **(found.to_dict() if found else {"type": "prefix"})} for name, found in entries]
        )
        return 0
    output.table(
        ("SIZE", "MODIFIED", "NAME"),
        [
            (
                output.size(found.size) if found and found.size is not None else "",
                output.date(found.modified) if found else "",
                name,
            )
            for name, found in entries
        ],
        empty=f"there is nothing below {args.url}",
    )
    return 0


def _stat(args: Any) -> int:
    from flowfn_runtime.data.copying import summary

    from . import output

    source = _open(args.url)
    try:
        values = summary(source.listing())
    finally:
        source.close()
    if args.json:
        output.print_json(values)
        return 0
    output.fields(
        [
            ("url", values["url"]),
            ("type", values["type"]),
            ("objects", values.get("objects")),
            ("size", f"{output.size(values['size'])} ({values['size']} bytes)" if values["size"] is not None else None),
            ("etag", values.get("etag")),
            ("version", values.get("version")),
            ("modified", output.date(values["modified"])),
        ]
    )
    return 0


def _cp(args: Any) -> int:
    from flowfn import config
    from flowfn_runtime.data.copying import copy

    from . import output, progress

    with progress.bar(quiet=args.json) as tell:
        count = copy(args.source, args.target, options=config.load().storage_options, progress=tell)
    if args.json:
        output.print_json({"source": args.source, "target": args.target, "size_bytes": count})
    else:
        print(f"copied {output.size(count)}")
    return 0


def _cat(args: Any) -> int:
    from flowfn_runtime.data.copying import stream

    source = _open(args.url)
    try:
        stream(source, sys.stdout.buffer.write)
        sys.stdout.buffer.flush()
    finally:
        source.close()
    return 0
