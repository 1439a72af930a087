"""Whether an answer's body is of the version that was listed, by its head alone."""

from __future__ import annotations

from flowfn_runtime.data.connection import Response
from flowfn_runtime.data.endpoint import WireError
from flowfn_runtime.data.model import Object, parse_time
from flowfn_runtime.errors import DataChanged

_AGAIN = "Run again: a new listing decides."


def check_head(response: Response, object: Object, first: int, last: int | None, url: str) -> None:
    """Refuse a body that is not of the listed version, or not as long, before a byte of it is written."""
    headers = response.headers
    version = headers.get("etag", "").strip('"')
    known = (object.etag or "").strip('"')
    if version and known and version != known:
        response.discard()
        raise DataChanged(
            f"{url} is not the version that was listed: its ETag is {version}, it was {known}.", url=url, hint=_AGAIN
        )
    if not known and object.modified is not None:
        modified = parse_time(headers.get("last-modified"))
        if modified is not None and int(modified) != int(object.modified):  # the header has whole seconds
            response.discard()
            raise DataChanged(f"{url} is not the version that was listed: it was written to.", url=url, hint=_AGAIN)
    if object.size is None or response.length is None:
        return
    end = object.size - 1 if last is None else min(last, object.size - 1)
    if response.length == end - first + 1:
        return
    total = headers.get("content-range", "").rpartition("/")[2]
    response.discard()
    # With the version known to be right (or no word of it, so who answered?) it is the transfer that is wrong.
    if not known and (response.status == 200 or (total.isdigit() and int(total) != object.size)):
        raise DataChanged(
            f"{url} has {total or response.length} bytes, not the {object.size} that were listed.", url=url, hint=_AGAIN
        )
    raise WireError(f"{url}: {response.length} bytes came for a range of {end - first + 1}")
