"""What an S3 server's refusal means, and what to do about it."""

from __future__ import annotations

from typing import NamedTuple

from flowfn_runtime.data.endpoint import WireError
from flowfn_runtime.errors import DataAccessDenied, DataChanged, DataError, DataNotFound

_PERMISSIONS = {
    "list": "s3:ListBucket on the bucket",
    "read": "s3:GetObject on the key",
    "write": "s3:PutObject on the key",
    "delete": "s3:DeleteObject on the key",
}
_PATIENCE = frozenset(
    {"SlowDown", "InternalError", "ServiceUnavailable", "RequestTimeout", "Throttling", "OperationAborted"}
)


class Busy(WireError):
    """The server asks for patience (500, 503 SlowDown, 429): worth another try later."""


class Refusal(NamedTuple):
    """An answer with a failing status."""

    status: int
    code: str  # S3's own, if the body has one
    message: str
    url: str  # what was asked for
    where: str  # the service, for people
    bucket: str
    region: str  # that the request was signed for
    anonymous: bool


def meaning(refusal: Refusal, *, action: str, pinned: bool = False) -> Exception:
    """The error that it is; a `WireError` if another try may help. `pinned`: one version was asked for."""
    status, code, url, where = refusal.status, refusal.code, refusal.url, refusal.where
    told = refusal.message or code or f"status {status}"
    if code in _PATIENCE or status >= 500 or status == 429:
        return Busy(f"{url}: the server answers {status} {code or ''}".rstrip())
    if code == "NoSuchBucket" or (status == 404 and action == "list"):
        return DataNotFound(
            f"There is no bucket {refusal.bucket!r} at {where}.",
            url=url,
            hint="Check the spelling, and the endpoint (AWS_ENDPOINT_URL_S3, or endpoint_url= in storage_options).",
        )
    if status == 404:
        if pinned:
            return DataChanged(
                f"{url} was deleted after it was listed.", url=url, hint="Run again: a new listing decides."
            )
        return DataNotFound(f"There is no object {url}.", url=url, hint=f"flow data ls {parent(url)}")
    if status in (412, 416):
        return DataChanged(
            f"{url} is not the version that was listed.", url=url, hint="Run again: a new listing decides."
        )
    if code in ("PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException") or (
        status in (301, 307, 400) and not code
    ):
        return DataError(
            f"{url}: the bucket is not served by the region {refusal.region} ({told}).",
            url=url,
            hint="Set AWS_REGION to the bucket's region (or region= in storage_options).",
        )
    if code == "InvalidAccessKeyId":
        return DataAccessDenied(
            f"{url}: {where} does not know this access key.",
            url=url,
            hint="Check AWS_ACCESS_KEY_ID, and that it belongs to this endpoint.",
        )
    if code == "SignatureDoesNotMatch":
        return DataAccessDenied(
            f"{url}: the secret does not fit the access key.", url=url, hint="Check AWS_SECRET_ACCESS_KEY."
        )
    if code in ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"):
        return DataAccessDenied(
            f"{url}: the credentials have expired.",
            url=url,
            hint="Renew them (for instance aws sso login), or pass a new AWS_SESSION_TOKEN.",
        )
    if code in ("InvalidToken", "InvalidClientTokenId"):
        return DataAccessDenied(
            f"{url}: the session token is not valid.",
            url=url,
            hint="Check AWS_SESSION_TOKEN; unset it if the key is a permanent one.",
        )
    if code == "RequestTimeTooSkewed":
        return DataAccessDenied(
            f"{url}: this machine's clock differs too much from the server's.", url=url, hint="Set the clock."
        )
    if status in (401, 403):
        if refusal.anonymous:
            hint = "The request was anonymous: give credentials, or leave out anon=True."
        elif not code:  # an answer without a body, as to HEAD
            hint = f"Check the credentials, and that they allow {_PERMISSIONS[action]}."
        else:
            hint = f"The credentials work but do not reach this: allow {_PERMISSIONS[action]}."
        what = f"listing {url}" if action == "list" else f"{action} access to {url}"
        return DataAccessDenied(f"{where} denies {what} ({told}).", url=url, hint=hint)
    return DataError(f"{url}: {where} answers {status}: {told}", url=url)


def parent(url: str) -> str:
    """What an object lies directly below."""
    return url.rstrip("/").rpartition("/")[0] + "/"
