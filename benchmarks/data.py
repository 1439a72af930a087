"""Moving data side by side: flowfn's cache and uploads, and the tools that people use for it today.

    python benchmarks/data.py                        every case, three rounds
    python benchmarks/data.py --cases one many       some of them
    python benchmarks/data.py --scale 0.1            a tenth of the objects
    python benchmarks/data.py --cases overlap        the next call's data while the present one computes

A real S3 server (`rclone serve s3`) on loopback holds the objects in a directory; every round asks every peer, each in
a process of its own with an empty destination. One JSON line for each case, peer and metric: the median over the
rounds, and `ratio`, how many times flowfn's it is (above 1, flowfn is ahead). Libraries are timed from the first
request to the last file; command-line tools as a whole. CPU seconds are of the whole process with its children (not
the server's), memory is the largest process's. flowfn verifies every MD5 that the server lists; its peers do not.

`overlap` is a map over references on one worker, whose calls compute for as long as staging takes: `alone_s` is the
longer of the two by itself, `both_s` the map, and `start_ms` how long a call whose data was staged ahead waits for it.

On loopback the server is the limit and shares the processor with its client. `server` is that limit: the same requests,
with all that comes thrown away.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from common import PeerMissing, Results, environment

KEY, SECRET, BUCKET = "benchmark-key", "benchmark-secret", "bench"
MEBI = 1 << 20
# name: (objects, bytes of each, whether their ETags are MD5s). Those of uploads in parts, as every uploader makes them
# of objects over 8 MiB, are none; "one-md5" is the rarer kind.
CASES = {
    "one": (1, 1 << 30, False),
    "one-md5": (1, 1 << 30, True),
    "many": (10_000, 4096, True),
    "some": (2_000, 100 << 10, True),
    "large": (100, 16 * MEBI, False),
}
OVERLAP = "overlap"


def environment_of(endpoint: str) -> dict[str, str]:
    return {
        **environment(),
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        "BENCH_ENDPOINT": endpoint,
        "S3_ENDPOINT_URL": endpoint,
        "RCLONE_CONFIG": "/dev/null",
        "RCLONE_S3_PROVIDER": "Other",
        "RCLONE_S3_ENV_AUTH": "true",
        "RCLONE_S3_ENDPOINT": endpoint,
    }


# -- libraries: functions that run in a process of their own and return the seconds that the transfer took ------------


def flowfn_get(prefix: str, dest: str) -> float:
    from flowfn_runtime.data.cache import Cache
    from flowfn_runtime.data.sources import open_source

    started = time.perf_counter()
    with Cache(dest).stage(open_source(f"s3://{BUCKET}/{prefix}")):
        return time.perf_counter() - started


def flowfn_put(prefix: str, source: str) -> float:
    from flowfn_runtime.data.upload import upload

    started = time.perf_counter()
    upload(source, f"s3://{BUCKET}/{prefix}")
    return time.perf_counter() - started


def server_get(prefix: str, dest: str) -> float:
    from flowfn_runtime.data.sources import open_source
    from flowfn_runtime.data.transfer import PART_BYTES

    started = time.perf_counter()
    source: Any = open_source(f"s3://{BUCKET}/{prefix}")
    pieces = [
        (object, first, min(first + PART_BYTES, object.size) - 1)
        for object in source.listing().objects
        for first in range(0, object.size, PART_BYTES)
    ]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda piece: source.fetch(*piece, lambda data: None), pieces))
    return time.perf_counter() - started


def s3fs_get(prefix: str, dest: str) -> float:
    import s3fs

    filesystem = s3fs.S3FileSystem()
    started = time.perf_counter()
    filesystem.get(f"{BUCKET}/{prefix}/", dest, recursive=True)
    return time.perf_counter() - started


def s3fs_put(prefix: str, source: str) -> float:
    import s3fs

    filesystem = s3fs.S3FileSystem()
    started = time.perf_counter()
    filesystem.put(source + "/", f"{BUCKET}/{prefix}/", recursive=True)
    return time.perf_counter() - started


def _boto3_transfer() -> Any:
    import boto3
    from boto3.s3.transfer import TransferConfig
    from botocore.config import Config

    threads = 16
    client = boto3.client("s3", config=Config(max_pool_connections=64))
    config = TransferConfig(multipart_chunksize=8 * MEBI, max_concurrency=threads)
    from s3transfer.manager import TransferManager

    return client, TransferManager(client, config)


def boto3_get(prefix: str, dest: str) -> float:
    client, manager = _boto3_transfer()
    started = time.perf_counter()
    with manager:
        futures = []
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix + "/"):
            for entry in page.get("Contents", ()):
                path = os.path.join(dest, os.path.basename(entry["Key"]))
                futures.append(manager.download(BUCKET, entry["Key"], path))
        for future in futures:
            future.result()
    return time.perf_counter() - started


def boto3_put(prefix: str, source: str) -> float:
    _, manager = _boto3_transfer()
    started = time.perf_counter()
    with manager:
        futures = [manager.upload(entry.path, BUCKET, f"{prefix}/{entry.name}") for entry in os.scandir(source)]
        for future in futures:
            future.result()
    return time.perf_counter() - started


def _obstore() -> Any:
    from obstore.store import S3Store

    return S3Store(
        BUCKET,
        endpoint=os.environ["BENCH_ENDPOINT"],
        region="us-east-1",
        access_key_id=KEY,
        secret_access_key=SECRET,
        client_options={"allow_http": True},
    )


def obstore_get(prefix: str, dest: str) -> float:
    import asyncio

    import obstore

    store = _obstore()
    gate = asyncio.Semaphore(16)
    pool = ThreadPoolExecutor(8)
    ranges = False  # rclone answers them with status 200, which obstore refuses

    async def whole(key: str) -> None:
        async with gate:
            data = await (await obstore.get_async(store, key)).bytes_async()
            with open(os.path.join(dest, os.path.basename(key)), "wb", buffering=0) as file:
                file.write(data)

    async def streamed(key: str) -> None:
        async with gate:
            with open(os.path.join(dest, os.path.basename(key)), "wb", buffering=0) as file:
                async for data in (await obstore.get_async(store, key)).stream(8 * MEBI):
                    file.write(data)

    async def part(fd: int, key: str, first: int, last: int) -> None:
        async with gate:
            data = await obstore.get_range_async(store, key, start=first, end=last)
            await asyncio.get_running_loop().run_in_executor(pool, os.pwrite, fd, data, first)

    async def main() -> None:
        work = []
        for page in obstore.list(store, prefix + "/", chunk_size=1000):
            for entry in page:
                size, key = entry["size"], entry["path"]
                if size <= 16 * MEBI:
                    work.append(whole(key))
                    continue
                if not ranges:
                    work.append(streamed(key))
                    continue
                fd = os.open(os.path.join(dest, os.path.basename(key)), os.O_CREAT | os.O_WRONLY)
                work += [part(fd, key, at, min(at + 8 * MEBI, size)) for at in range(0, size, 8 * MEBI)]
        await asyncio.gather(*work)

    started = time.perf_counter()
    asyncio.run(main())
    return time.perf_counter() - started


def obstore_put(prefix: str, source: str) -> float:
    import asyncio

    import obstore

    store = _obstore()
    gate = asyncio.Semaphore(16)

    async def put(path: str, name: str) -> None:
        async with gate:
            await obstore.put_async(store, f"{prefix}/{name}", Path(path))

    async def main() -> None:
        await asyncio.gather(*(put(entry.path, entry.name) for entry in os.scandir(source)))

    started = time.perf_counter()
    asyncio.run(main())
    return time.perf_counter() - started


LIBRARIES: dict[str, dict[str, Callable[[str, str], float]]] = {
    "get": {"flowfn": flowfn_get, "server": server_get, "s3fs": s3fs_get, "boto3": boto3_get, "obstore": obstore_get},
    "put": {"flowfn": flowfn_put, "s3fs": s3fs_put, "boto3": boto3_put, "obstore": obstore_put},
}


def tools(action: str, prefix: str, path: str) -> dict[str, list[str]]:
    """The command lines of the command-line tools that are installed."""
    url = f"s3://{BUCKET}/{prefix}/"
    remote = f":s3:{BUCKET}/{prefix}"
    found = {
        "get": {
            "aws": ["aws", "s3", "sync", url, path, "--only-show-errors"],
            "rclone": ["rclone", "copy", remote, path, "--transfers", "16", "--multi-thread-streams", "16"],
            "s5cmd": ["s5cmd", "cp", url + "*", path],
        },
        "put": {
            "aws": ["aws", "s3", "cp", "--recursive", path, url, "--only-show-errors"],
            "rclone": ["rclone", "copy", path, remote, "--transfers", "16"],
            "s5cmd": ["s5cmd", "cp", path + "/", url],
        },
        "sync": {
            "aws": ["aws", "s3", "sync", url, path, "--only-show-errors"],
            "rclone": ["rclone", "sync", remote, path, "--transfers", "16", "--checkers", "16"],
            "s5cmd": ["s5cmd", "sync", url + "*", path],
        },
    }[action]
    beside = os.path.dirname(sys.executable)
    return {name: [shutil.which(line[0], path=beside) or line[0], *line[1:]] for name, line in found.items()}


# -- a map over references ---------------------------------------------------------------------------------------------


def compute(file: object, seconds: float, kind: str) -> tuple[float, float]:
    """Use `seconds`, in Python or where Python lets others run; when that began and ended."""
    import hashlib

    began, end = time.time(), time.perf_counter() + seconds
    while time.perf_counter() < end:
        if kind == "python":
            sum(range(1000))
        else:
            hashlib.sha256(bytes(MEBI)).digest()
    return began, time.time()


def overlap(urls: Sequence[str], kind: str) -> dict[str, float]:
    """Staging alone, computing alone for as long, and both; run with an empty cache in FLOW_CACHE."""
    import flowfn as flow

    def run(files: Sequence[object], seconds: float) -> tuple[float, list[float]]:
        shutil.rmtree(os.environ["FLOW_CACHE"], ignore_errors=True)
        function = flow.function(max_workers=1)(compute)
        function.remote(None, 0.0, kind)  # the worker is there
        started = time.perf_counter()
        spans = list(function.starmap([(file, seconds, kind) for file in files]))
        seconds = time.perf_counter() - started
        flow.shutdown()
        return seconds, [after[0] - before[1] for before, after in pairwise(spans)]

    nothing = [None] * len(urls)
    staging, _ = run([flow.File(url) for url in urls], 0.0)
    computing, _ = run(nothing, staging / len(urls))
    both, gaps = run([flow.File(url) for url in urls], staging / len(urls))
    return {"alone_s": max(staging, computing), "both_s": both, "start_ms": 1000 * sorted(gaps)[len(gaps) // 2]}


def run_overlap(root: Path, work: Path, env: dict[str, str], args: argparse.Namespace, results: Results) -> None:
    count = max(10, int(60 * args.scale))
    folder = root / BUCKET / OVERLAP
    folder.mkdir(parents=True)
    for index in range(count):
        (folder / f"{index:05}.bin").write_bytes(random.Random(index).randbytes(16 * MEBI))
    env = {**env, "FLOW_CACHE": str(work / "cache"), "FLOW_HOME": str(work / "home")}
    ratios: dict[str, list[float]] = {"python": [], "native": []}
    for _ in range(args.rounds):
        for kind in ratios:
            command = [sys.executable, __file__, "--peer", OVERLAP, kind, str(count), "-"]
            output = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout
            values = json.loads(output.splitlines()[-1])
            ratios[kind].append(values["both_s"] / values["alone_s"])
            for metric, value in values.items():
                unit = metric.rpartition("_")[2]
                results.add(f"overlap, computing in {kind} code", "flowfn", metric, unit, value)
    for kind in ratios:
        name = f"overlap, computing in {kind} code"
        results.print_case(name)
        # Of each round by itself: a machine that is busy is busy for both.
        ratio = statistics.median(ratios[kind])
        results.print_target(f"{name}: both against the longer alone", ratio, 1.15, at_least=False)
    shutil.rmtree(root / BUCKET)


# -- measuring ---------------------------------------------------------------------------------------------------------


def measure(command: Sequence[str], env: dict[str, str]) -> dict[str, float]:
    """Wall and CPU seconds and the memory of a process that prints its own wall seconds, or none."""
    if shutil.which(command[0]) is None:
        raise PeerMissing(f"there is no {command[0]}")
    started = time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, env=env, stdout=output, stderr=errors, text=True)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        wall = time.perf_counter() - started
        output.seek(0)
        errors.seek(0)
        text, complaint = output.read(), errors.read()
    if process.returncode:
        raise PeerMissing((complaint.strip().splitlines() or [f"status {process.returncode}"])[-1][:200])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    own = re.search(r"^WALL ([0-9.]+)$", text, re.MULTILINE)
    return {
        "wall_s": float(own.group(1)) if own else wall,
        "cpu_s": after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime,
        "rss_mib": usage.ru_maxrss / 1024,
    }


def peer_commands(action: str, prefix: str, path: str, peers: Sequence[str] | None) -> dict[str, list[str]]:
    me = [sys.executable, __file__, "--peer"]
    libraries = LIBRARIES["get" if action == "sync" else action]
    commands = {name: [*me, action, name, prefix, path] for name in libraries if action != "sync" or name == "flowfn"}
    commands |= tools(action, prefix, path)
    return {name: command for name, command in commands.items() if peers is None or name in peers}


def run_case(
    case: str, root: Path, work: Path, env: dict[str, str], args: argparse.Namespace, results: Results
) -> None:
    count, size, _ = CASES[case]
    count = max(1, int(count * args.scale)) if count > 1 else 1
    folder = root / BUCKET / case
    folder.mkdir(parents=True)
    block = random.Random(case).randbytes(min(size, MEBI))
    for index in range(count):
        with open(folder / f"{index:05}.bin", "wb") as file:
            file.write(index.to_bytes(8, "big") + block[8:])
            for _ in range(size // len(block) - 1):
                file.write(block)
    # The server's first listing reads every object for its ETag.
    subprocess.run(
        tools("sync", case, "-")["s5cmd"][:1] + ["ls", f"s3://{BUCKET}/{case}/*"], env=env, capture_output=True
    )
    for turn in range(args.rounds):
        if turn and "get" in args.actions:
            for entry in work.iterdir():
                shutil.rmtree(entry)
            # For five seconds ext4 gives no deleted inode away again, and looks at all of them for each new file:
            # whoever came right after a deletion of thousands would pay for it.
            time.sleep(6)
        for action in args.actions:
            label = {"get": "cold", "sync": "warm", "put": "upload"}[action]
            peers = list(peer_commands(action, case, "", args.peers))
            # Whoever comes first after a pause pays for memory that the machine has not touched lately: not always the
            # same one.
            for peer in peers[turn % len(peers) :] + peers[: turn % len(peers)]:
                dest = work / f"{case}-{peer}"
                if action == "get":
                    dest.mkdir()
                elif action == "put":
                    shutil.rmtree(root / BUCKET / f"up-{case}", ignore_errors=True)
                    dest = folder
                elif not dest.exists():
                    continue
                os.sync()
                name = f"{label} {case}"
                prefix = f"up-{case}" if action == "put" else case
                command = peer_commands(action, prefix, str(dest), None)[peer]
                try:
                    values = measure(command, env)
                except PeerMissing as missing:
                    if not turn:
                        results.left_out(name, peer, str(missing))
                    continue
                if action == "put":
                    check(root / BUCKET / f"up-{case}", count, size, peer)
                elif peer not in ("flowfn", "server"):
                    check(dest, count, size, peer)
                for metric, value in values.items():
                    results.add(name, peer, metric, "MiB" if metric == "rss_mib" else "s", value)
    for action in args.actions:
        results.print_case(f"{ {'get': 'cold', 'sync': 'warm', 'put': 'upload'}[action] } {case}")
    shutil.rmtree(root / BUCKET)
    for entry in work.iterdir():
        shutil.rmtree(entry)


def check(folder: Path, count: int, size: int, peer: str) -> None:
    """A peer that left something out has not been faster."""
    found = [path for path in folder.rglob("*") if path.is_file()]
    if len(found) != count or any(path.stat().st_size != size for path in found):
        raise SystemExit(f"{peer} moved {len(found)} of {count} objects to {folder}")


def serve(root: Path, *, md5: bool) -> tuple[subprocess.Popen[str], str]:
    rclone = shutil.which("rclone", path=os.path.dirname(sys.executable)) or "rclone"
    options = [
        "--addr",
        "127.0.0.1:0",
        "--auth-key",
        f"{KEY},{SECRET}",
        "--config",
        "/dev/null",
        "--vfs-cache-mode",
        "off",
    ]
    options += ["--etag-hash", "MD5" if md5 else ""]
    server = subprocess.Popen([rclone, "serve", "s3", str(root), *options], stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    for line in server.stderr:
        if found := re.search(r"Starting s3 server on \[(http://[^/\]]+)", line):
            import threading

            threading.Thread(target=server.stderr.read, daemon=True).start()
            return server, found.group(1)
    raise SystemExit("rclone did not start")


def main() -> None:
    if sys.argv[1:2] == ["--peer"]:
        action, name, prefix, path = sys.argv[2:]
        if action == OVERLAP:
            urls = [f"s3://{BUCKET}/{OVERLAP}/{index:05}.bin" for index in range(int(prefix))]
            print(json.dumps(overlap(urls, name)))
            return
        print(f"WALL {LIBRARIES['put' if action == 'put' else 'get'][name](prefix, path):.4f}")
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=[*CASES, OVERLAP], default=[*CASES, OVERLAP])
    parser.add_argument("--actions", nargs="+", choices=["get", "sync", "put"], default=["get", "sync", "put"])
    parser.add_argument("--peers", nargs="+", help="only these (default: all that are installed)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of objects")
    parser.add_argument("--server-dir", default="/dev/shm", help="where the server keeps its objects")
    parser.add_argument("--dest", default=tempfile.gettempdir(), help="where they are fetched to")
    args = parser.parse_args()
    results = Results(sys.stdout)
    with tempfile.TemporaryDirectory(dir=args.server_dir) as root, tempfile.TemporaryDirectory(dir=args.dest) as work:
        for case in args.cases:
            # A fresh server for each case: it remembers directories for minutes.
            server, endpoint = serve(Path(root), md5=case != OVERLAP and CASES[case][2])
            try:
                if case == OVERLAP:
                    run_overlap(Path(root), Path(work), environment_of(endpoint), args, results)
                else:
                    run_case(case, Path(root), Path(work), environment_of(endpoint), args, results)
            finally:
                server.kill()
                server.wait()
    print(json.dumps({"machine": {"cpus": os.cpu_count(), "python": sys.version.split()[0]}}))


if __name__ == "__main__":
    main()
