"""Moving data side by side: flowfn's cache and uploads, and the tools that people use for it today.

    python benchmarks/data.py                        every case, three rounds
    python benchmarks/data.py --cases one many       some of them
    python benchmarks/data.py --scale 0.1            a tenth of the objects
    python benchmarks/data.py --cases overlap        the next call's data while the present one computes

A real S3 server (`rclone serve s3`) on loopback holds the objects in a directory; every round asks every peer, each in
a process of its own with an empty destination. One JSON line for each case, peer and metric: the median over the
rounds, and `ratio`, how many times flowfn's it is (above 1, flowfn is ahead); then one for each target. `wall_s` of
libraries is from the first request to the last file, of command-line tools the whole; `whole_s` is the whole process
of either. CPU seconds are of the whole process with its children (not the server's), memory is the largest process's.
flowfn verifies every MD5 that the server lists; of its peers only rclone does.

After the warm rounds the server is started anew with a log, and flowfn once more: what it asks for then is counted.

`overlap` is a map over references on one worker, whose calls compute for as long as staging takes: `alone_s` is the
longer of the two by itself, `both_s` the map, and `start_ms` how long a call whose data was staged ahead waits for it.

On loopback the server is the limit and shares the processor with its client. `server` is that limit: the same requests,
with all that comes thrown away; warm, the pages of the listing side by side.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
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
    "single": (1, 4096, True),
    "one": (1, 1 << 30, False),
    "one-md5": (1, 1 << 30, True),
    "many": (10_000, 4096, True),
    "some": (2_000, 100 << 10, True),
    "large": (100, 16 * MEBI, False),
}
OVERLAP = "overlap"
LABELS = {"get": "cold", "sync": "warm", "put": "upload"}
MOST_S = 300.0  # for one peer in one round; then it is ended, and left out


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


def server_list(prefix: str, dest: str) -> float:
    from flowfn_runtime.data.sources import open_source, page_hints

    source: Any = open_source(f"s3://{BUCKET}/{prefix}/")
    hints = page_hints(source.listing().objects)
    query = {"list-type": "2", "prefix": f"{prefix}/", "encoding-type": "url"}
    started = time.perf_counter()
    with ThreadPoolExecutor(len(hints) + 1) as pool:
        list(
            pool.map(lambda after: source.client.send("GET", "", {**query, "start-after": after}).read(), ["", *hints])
        )
    return time.perf_counter() - started


LIBRARIES: dict[str, dict[str, Callable[[str, str], float]]] = {
    "get": {"flowfn": flowfn_get, "server": server_get, "s3fs": s3fs_get, "boto3": boto3_get, "obstore": obstore_get},
    "sync": {"flowfn": flowfn_get, "server": server_list},
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
        clock = threading.Timer(MOST_S, process.kill)
        clock.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            raise
        finally:
            clock.cancel()
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
        "whole_s": wall,
        "cpu_s": after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime,
        "rss_mib": usage.ru_maxrss / 1024,
    }


def peer_commands(action: str, prefix: str, path: str, peers: Sequence[str] | None) -> dict[str, list[str]]:
    me = [sys.executable, __file__, "--peer"]
    commands = {name: [*me, action, name, prefix, path] for name in LIBRARIES[action]}
    commands |= tools(action, prefix, path)
    return {name: command for name, command in commands.items() if peers is None or name in peers}


def run_case(
    case: str, server: Server, root: Path, work: Path, env: dict[str, str], args: argparse.Namespace, results: Results
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
        [*tools("get", case, "-")["rclone"][:1], "size", f":s3:{BUCKET}/{case}"],
        env=env,
        check=True,
        capture_output=True,
    )
    try:
        for turn in range(args.rounds):
            if turn and "get" in args.actions:
                for entry in work.iterdir():
                    shutil.rmtree(entry)
                # For five seconds ext4 gives no deleted inode away again, and looks at all of them for each new file:
                # whoever came right after a deletion of thousands would pay for it.
                time.sleep(6)
            for action in args.actions:
                # Not always the same one first.
                peers = list(peer_commands(action, case, "", args.peers))
                for peer in peers[turn % len(peers) :] + peers[: turn % len(peers)]:
                    run_peer(peer, action, case, count, root, work, env, results)
        if "sync" in args.actions and (work / f"{case}-flowfn").exists():
            server.close()
            count_requests(case, root, work / f"{case}-flowfn", env, results)
    finally:  # whatever there is, if it was stopped
        for action in args.actions:
            results.print_case(f"{LABELS[action]} {case}")
            print_targets(f"{LABELS[action]} {case}", results)
    shutil.rmtree(root / BUCKET)
    for entry in work.iterdir():
        shutil.rmtree(entry)


def run_peer(
    peer: str, action: str, case: str, count: int, root: Path, work: Path, env: dict[str, str], results: Results
) -> None:
    """One peer's turn in one round."""
    size = CASES[case][1]
    here, uploaded = work / f"{case}-{peer}", root / BUCKET / f"up-{case}"
    if action == "get":
        here.mkdir()
    elif action == "put":
        shutil.rmtree(uploaded, ignore_errors=True)
    elif not here.exists():
        return
    name, prefix = f"{LABELS[action]} {case}", uploaded.name if action == "put" else case
    command = peer_commands(action, prefix, str(root / BUCKET / case if action == "put" else here), None)[peer]
    os.sync()
    if action != "sync":
        touch_memory(2 * count * size)
    try:
        values = measure(command, env)
    except PeerMissing as missing:
        if (name, peer) not in results.missing:
            results.left_out(name, peer, str(missing))
        return
    if peer != "server":
        arrived = here / "data" / "objects" if peer == "flowfn" else here
        check(uploaded if action == "put" else arrived, count, size, peer)
    for metric, value in values.items():
        results.add(name, peer, metric, "MiB" if metric == "rss_mib" else "s", value)


def print_targets(name: str, results: Results) -> None:
    """How flowfn did in a case, beside what it is meant to reach."""
    peers = ("s3fs", "boto3", "obstore", "aws", "rclone", "s5cmd")
    wall, cpu = results.get(name, "flowfn", "wall_s"), results.get(name, "flowfn", "cpu_s")
    if not wall or not cpu:
        return
    if name.startswith("warm"):
        aws = results.get(name, "aws", "wall_s")
        results.print_target(f"{name}: times faster than aws s3 sync", aws and aws / wall, 20, at_least=True)
        asked = results.get(name, "flowfn", "get_objects")
        results.print_target(f"{name}: objects that the server was asked for", asked, 0, at_least=False)
    else:
        fastest, s3fs = results.best(name, peers, "wall_s"), results.get(name, "s3fs", "cpu_s")
        results.print_target(f"{name}: as fast as the fastest", fastest and fastest / wall, 1, at_least=True)
        results.print_target(f"{name}: processor time, of s3fs's", s3fs and cpu / s3fs, 1 / 3, at_least=False)
    memory = results.get(name, "flowfn", "rss_mib")
    results.print_target(f"{name}: memory in MiB", memory, 300, at_least=False)


def count_requests(case: str, root: Path, cache: Path, env: dict[str, str], results: Results) -> None:
    """What flowfn asks the server for when all data is here."""
    # At the same address: it is a part of what the cache knows objects by.
    address = env["BENCH_ENDPOINT"].removeprefix("http://")
    with Server(root, md5=CASES[case][2], address=address, log=True) as server:
        measure(peer_commands("sync", case, str(cache), None)["flowfn"], env)
    for kind in ("GET OBJECT", "HEAD OBJECT", "LIST BUCKET"):
        results.add(f"warm {case}", "flowfn", kind.lower().replace(" ", "_") + "s", "", server.asked.count(kind))


def touch_memory(size: int) -> None:
    """Have the machine give as much memory as a transfer will fill. A virtual one hands free memory back to its host,
    and whoever needs it next waits for every page: up to three seconds a gibibyte, for one peer and not for another."""
    # By a process of its own: the kernel counts this one's memory as that of the peers that it starts.
    subprocess.run([sys.executable, "-S", "-c", f"b'1' * int({min(size, 3 << 30)})"], check=True)


def check(folder: Path, count: int, size: int, peer: str) -> None:
    """A peer that left something out has not been faster."""
    found = [path for path in folder.rglob("*") if path.is_file()]
    if len(found) != count or any(path.stat().st_size != size for path in found):
        raise SystemExit(f"{peer} moved {len(found)} of {count} objects to {folder}")


class Server:
    """A server of the folder `root`; its ETags are MD5s, or none. `asked`: what it was asked for, if it keeps a log."""

    def __init__(self, root: Path, *, md5: bool, address: str = "127.0.0.1:0", log: bool = False) -> None:
        rclone = shutil.which("rclone", path=os.path.dirname(sys.executable)) or "rclone"
        options = ["--addr", address, "--auth-key", f"{KEY},{SECRET}", "--config", "/dev/null"]
        options += ["--vfs-cache-mode", "off", "--etag-hash", "MD5" if md5 else "", *["-vv"] * log]
        self.process = subprocess.Popen([rclone, "serve", "s3", str(root), *options], stderr=subprocess.PIPE, text=True)
        self.asked: list[str] = []
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if found := re.search(r"Starting s3 server on \[(http://[^/\]]+)", line):
                self.endpoint = found.group(1)
                break
        else:
            raise SystemExit("rclone did not start")
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if found := re.search(r"serve s3: ((?:GET|HEAD|PUT|LIST) (?:OBJECT|BUCKET))", line):
                self.asked.append(found.group(1))

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End it; safe to call twice."""
        self.process.kill()
        self.process.wait()
        self._reader.join()


def main() -> None:
    if sys.argv[1:2] == ["--peer"]:
        action, name, prefix, path = sys.argv[2:]
        if action == OVERLAP:
            urls = [f"s3://{BUCKET}/{OVERLAP}/{index:05}.bin" for index in range(int(prefix))]
            print(json.dumps(overlap(urls, name)))
            return
        print(f"WALL {LIBRARIES[action][name](prefix, path):.4f}")
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))  # gigabytes are not to be left behind
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
            with Server(Path(root), md5=case != OVERLAP and CASES[case][2]) as server:
                run = run_overlap if case == OVERLAP else functools.partial(run_case, case, server)
                run(Path(root), Path(work), environment_of(server.endpoint), args, results)
    print(json.dumps({"machine": {"cpus": os.cpu_count(), "python": sys.version.split()[0]}}))


if __name__ == "__main__":
    main()
