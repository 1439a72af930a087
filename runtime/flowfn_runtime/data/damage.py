"""Whether what came is what was listed, and how often to try again if not: by the MD5, once all of it is there."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from flowfn_runtime.data.endpoint import WireError
from flowfn_runtime.data.model import Object
from flowfn_runtime.data.sources import Source
from flowfn_runtime.data.spec import redact
from flowfn_runtime.errors import DataChanged, DataError


class Damaged(WireError):
    """All bytes came, and they are not the ones that were listed."""

    def __init__(self, error: DataError) -> None:
        super().__init__(error.message)
        self.error = error


def again_if_damaged(attempt: Callable[[], None]) -> Callable[[], None]:
    """Let `attempt` fail its checksum twice: a damaged transfer passes, a damaged object stays."""
    failures = 0

    def guarded() -> None:
        nonlocal failures
        try:
            attempt()
        except Damaged as damaged:
            failures += 1
            if failures >= 3:
                raise damaged.error from None
            raise

    return guarded


def check_digest(found: str, object: Object, headers: Mapping[str, str], source: Source) -> None:
    if found == object.md5:
        return
    if "kms" in headers.get("x-amz-server-side-encryption", "") or any(
        name.startswith("x-amz-server-side-encryption-customer") for name in headers
    ):
        return  # such an object's ETag only looks like its digest
    url = redact(source.object_url(object.key))
    raise Damaged(
        DataChanged(
            f"{url} arrived with the MD5 {found}, but was listed with {object.md5}.",
            url=url,
            hint="The object or the way to it is damaged: compare with another copy, or upload it again.",
        )
    )
