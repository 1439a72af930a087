"""`flow volume`."""

from __future__ import annotations

from typing import Any

SUMMARY = "create, list and delete volumes"
EXAMPLES = """\
  flow volume create imagenet --size 500    found by its name in mounts={"/data": "volume://imagenet"}
  flow volume ls                            the project's volumes
  flow volume du imagenet                   what it holds, in bytes
  flow volume rm imagenet                   delete it, with all that is in it
"""


def add_arguments(parser: Any) -> None:
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    create = verbs.add_parser("create", help="create a volume, or find the one of that name")
    create.add_argument("name", nargs="?", help="3 to 64 of a-z, 0-9 and '-'; without it, it is found by its id only")
    create.add_argument("-s", "--size", type=int, default=100, metavar="GB", help="default 100")
    create.add_argument("--interface", choices=["block", "file"], default="block", help="block: one task at a time")
    create.add_argument("-r", "--region", metavar="REGION")
    listing = verbs.add_parser("ls", aliases=["list"], help="list the project's volumes")
    remove = verbs.add_parser("rm", aliases=["delete"], help="delete volumes, with all that is in them")
    usage = verbs.add_parser("du", help="show what volumes hold")
    for parser_, many in ((remove, "+"), (usage, "*")):
        parser_.add_argument("volume", nargs=many, help="ids or names")
    for parser_ in (create, listing, remove, usage):
        parser_.add_argument("--json", action="store_true", help="as JSON")


def run(args: Any) -> int:
    from flowfn.client import Flow
    from flowfn_runtime.data import volumes

    from . import output

    client = Flow()
    project = client.config.project
    if args.verb == "create":
        volume = client.create_volume(args.size, args.name, args.interface, args.region)
        if args.json:
            output.print_json(volume.to_dict())
        else:
            print(volume.id)
            output.note(f'mount it: --mount /data={volume.url}, or mounts={{"/data": "{volume.url}"}}')
        return 0
    if args.verb in ("rm", "delete"):
        gone = [volumes.delete(name, project) for name in args.volume]
        if args.json:
            output.print_json([volume.to_dict() for volume in gone])
        else:
            for volume in gone:
                output.note(f"deleted volume {volume.label}")
        return 0
    if args.verb == "du":
        wanted = [volumes.get(name, project) for name in args.volume] or volumes.list_volumes(project)
        used = [(volume, volumes.check_size(volume)) for volume in wanted]
        if args.json:
            output.print_json([volume.to_dict() | {"used_bytes": size} for volume, size in used])
        else:
            rows = [(v.id, v.name, output.size(size), f"{v.size_gb} GB") for v, size in used]
            output.table(("VOLUME", "NAME", "USED", "SIZE"), rows, empty=f"project {project!r} has no volumes yet")
        return 0
    found = volumes.list_volumes(project)
    if args.json:
        output.print_json([volume.to_dict() | {"in_use": volumes.in_use(volume)} for volume in found])
    else:
        output.table(
            ("VOLUME", "NAME", "SIZE", "INTERFACE", "REGION", "CREATED", "IN USE"),
            [
                (v.id, v.name, f"{v.size_gb} GB", v.interface, v.region, output.date(v.created_at), _use(v))
                for v in found
            ],
            empty=f"project {project!r} has no volumes yet; make one: flow volume create NAME",
        )
    return 0


def _use(volume: Any) -> str:
    from flowfn_runtime.data import volumes

    return "yes" if volumes.in_use(volume) else "no"
