"""`flow cache`."""

from __future__ import annotations

from typing import Any

SUMMARY = "see and manage the host's cache of staged data"
EXAMPLES = """\
  flow cache ls                              what is staged here, and which of it is in use
  flow cache du                              how much room it takes
  flow cache prefetch s3://datasets/train    stage it now, so that the next task starts at once
  flow cache verify                          compare every file with what the store said of it
  flow cache prune --size 100GB              drop the least recently used until 100 GB are left
"""


def add_arguments(parser: Any) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, summary in (
        ("ls", "list what is staged"),
        ("du", "show how much room it takes, and the limit"),
        ("prune", "drop what no task uses"),
        ("prefetch", "stage data before it is needed"),
        ("verify", "compare what is staged with what the store said of it"),
    ):
        action = actions.add_parser(name, help=summary, description=summary)
        action.add_argument("--json", action="store_true", help="as JSON")
        if name == "prefetch":
            action.add_argument("url", metavar="URL", nargs="+", help="any URL that can be mounted")
        elif name == "prune":
            action.add_argument(
                "--size", metavar="SIZE", default="0", help="how much may stay, such as 100GB (default 0: nothing)"
            )
        elif name == "verify":
            action.add_argument("--quick", action="store_true", help="compare lengths and times only, not content")
            action.add_argument(
                "--drop", action="store_true", help="drop what is damaged; it is fetched anew when needed"
            )


def run(args: Any) -> int:
    code: int = globals()[f"_{args.action}"](args)
    return code


def _ls(args: Any) -> int:
    from flowfn_runtime.data.cache import Cache

    from . import output

    held = sorted(Cache().room.snapshots(), key=lambda snapshot: -snapshot.last_used)
    if args.json:
        output.print_json([vars(snapshot) for snapshot in held])
        return 0
    output.table(
        ("SIZE", "OBJECTS", "USED", "IN USE", "SOURCE"),
        [
            (
                output.size(snapshot.size_bytes),
                snapshot.objects,
                output.ago(snapshot.last_used) + " ago",
                "yes" if snapshot.in_use else "",
                snapshot.url,
            )
            for snapshot in held
        ],
        empty="nothing is staged here; stage something: flow cache prefetch s3://bucket/prefix",
    )
    return 0


def _du(args: Any) -> int:
    from flowfn_runtime.data.cache import Cache

    from . import output

    cache = Cache()
    held = cache.room.snapshots()
    values: dict[str, Any] = {
        "path": cache.root,
        "used_bytes": cache.room.used_bytes(),
        "limit_bytes": cache.room.limit_bytes,
        "free_bytes": cache.room.free_bytes(),
        "snapshots": len(held),
        "in_use": sum(snapshot.in_use for snapshot in held),
    }
    if args.json:
        output.print_json(values)
        return 0
    output.fields(
        [
            ("cache", cache.root),
            ("used", output.size(values["used_bytes"])),
            ("limit", f"{output.size(values['limit_bytes'])} (FLOW_CACHE_LIMIT)"),
            ("free on its disk", output.size(values["free_bytes"])),
            ("snapshots", f"{values['snapshots']}, {values['in_use']} in use"),
        ]
    )
    return 0


def _prune(args: Any) -> int:
    from flowfn_runtime.data.cache import Cache
    from flowfn_runtime.data.room import parse_limit

    from . import output

    cache = Cache()
    before = cache.room.used_bytes()
    keep = parse_limit(args.size, cache.room.limit_bytes, name="--size")
    cache.room.prune(keep)
    after = cache.room.used_bytes()
    if args.json:
        output.print_json({"freed_bytes": before - after, "used_bytes": after})
    else:
        print(f"freed {output.size(before - after)}, {output.size(after)} left")
    return 0


def _prefetch(args: Any) -> int:
    from flowfn import config
    from flowfn_runtime.data.cache import Cache
    from flowfn_runtime.data.sources import open_source

    from . import output, progress

    settings = config.load()
    results: list[dict[str, Any]] = []
    for url in args.url:
        source = open_source(url, settings.storage_options(url))
        try:
            with progress.bar(quiet=args.json) as tell, Cache().stage(source, progress=tell) as snapshot:
                results.append(
                    {
                        "url": snapshot.url,
                        "path": snapshot.path,
                        "size_bytes": snapshot.size_bytes,
                        "objects": snapshot.objects,
                        "fetched_bytes": snapshot.fetched_bytes,
                    }
                )
        finally:
            source.close()
        if not args.json:
            last = results[-1]
            print(
                f"{last['url']}: {last['objects']} objects, {output.size(last['size_bytes'])}, "
                f"of which {output.size(last['fetched_bytes'])} were fetched now"
            )
    if args.json:
        output.print_json(results)
    return 0


def _verify(args: Any) -> int:
    from flowfn_runtime.data.cache import Cache
    from flowfn_runtime.data.verify import verify

    from . import output, progress

    cache = Cache()
    cache.room.sweep()
    with progress.bar(quiet=args.json) as tell:
        problems = list(verify(cache, content=not args.quick, progress=tell))
    dropped = 0
    if args.drop:
        for digest in dict.fromkeys(problem.digest for problem in problems):
            dropped += cache.room.discard(digest)
    if args.json:
        output.print_json({"problems": [vars(problem) for problem in problems], "dropped": dropped})
    else:
        for problem in problems:
            print(f"{problem.path}: {problem.what} (of {problem.url})")
        print(f"{len(problems)} problems" + (f", {dropped} snapshots dropped" if args.drop else ""))
    return 1 if problems and not args.drop else 0
