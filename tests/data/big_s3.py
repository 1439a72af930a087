"""An S3 server with one object, which is larger than one request may put there: `python big_s3.py SIZE PART_SIZE`.

The object is zeros, uploaded in parts, so that its ETag is what S3 makes of the digests of parts. It prints its port
and the ETag.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import tempfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LISTING = (
    '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
    "<Name>big</Name><Prefix></Prefix><KeyCount>1</KeyCount><MaxKeys>1000</MaxKeys><IsTruncated>false</IsTruncated>"
    "<Contents><Key>zeros</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>&quot;{etag}&quot;</ETag>"
    "<Size>{size}</Size><StorageClass>STANDARD</StorageClass></Contents></ListBucketResult>"
)


def etag_of(size: int, part: int) -> str:
    """The ETag of that many zeros in parts."""
    whole, rest = divmod(size, part)
    digests = hashlib.md5(bytes(part)).digest() * whole + (hashlib.md5(bytes(rest)).digest() if rest else b"")
    return f"{hashlib.md5(digests).hexdigest()}-{len(digests) // 16}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    size: int
    etag: str
    file: int

    def do_GET(self) -> None:
        if not self.path.startswith("/big/zeros"):
            self.answer(200, LISTING.format(etag=self.etag, size=self.size).encode(), "application/xml")
            return
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "bytes=0-"))
        assert found
        first, last = int(found[1]), int(found[2] or self.size - 1)
        self.start(206, last + 1 - first, "application/octet-stream")
        self.send_header("Content-Range", f"bytes {first}-{last}/{self.size}")
        self.end_headers()
        while first <= last:
            first += os.sendfile(self.connection.fileno(), self.file, first, last + 1 - first)

    def do_HEAD(self) -> None:
        self.start(200, self.size, "application/octet-stream")
        self.end_headers()

    def start(self, status: int, length: int, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(length))
        self.send_header("ETag", f'"{self.etag}"')
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")

    def answer(self, status: int, body: bytes, kind: str) -> None:
        self.start(status, len(body), kind)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def main() -> None:
    Handler.size, part = map(int, sys.argv[1:])
    Handler.etag = etag_of(Handler.size, part)
    with tempfile.TemporaryFile() as file, ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        file.truncate(Handler.size)  # all hole: it takes no room
        Handler.file = file.fileno()
        print(server.server_address[1], Handler.etag, flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
