"""Who we are to an object store, and where it is: options of the call, then the environment, then the user's files.

`environment` says which environment counts (the task's own wins over the process's); `s3_settings` turns it and the
storage options into everything an S3 request needs. Options are named as s3fs names them, so one mapping works with
both; what only AWS's own tools know how to find (profiles with roles, SSO, instance roles) is left to botocore.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flowfn_runtime.errors import ConfigError, DataAccessDenied

_AWS_IDENTITY = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_SECURITY_TOKEN", "AWS_PROFILE")
_REFRESH_S = 60


@dataclass(frozen=True)
class Keys:
    """An access key. Never shown."""

    access: str
    secret: str = field(repr=False)
    token: str | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        return "Keys(***)"


@dataclass(frozen=True)
class S3Settings:
    """What an S3 client needs. `keys` is called for each request; None is an anonymous client."""

    endpoint: str | None  # None: Amazon's, by region
    region: str
    keys: Callable[[], Keys] | None = field(repr=False)
    path_style: bool = True
    requester_pays: bool = False
    ca_file: str | None = None


def environment(env: Mapping[str, str] | None) -> Mapping[str, str]:
    """The process's environment with `env` over it. An identity in `env` replaces the process's as a whole."""
    if not env:
        return os.environ
    merged = dict(os.environ)
    if any(name in env for name in _AWS_IDENTITY):
        # Half of one identity and half of another would be a third one.
        for name in _AWS_IDENTITY:
            merged.pop(name, None)
    merged.update(env)
    return merged


def fsspec_options(protocol: str, env: Mapping[str, str]) -> dict[str, Any]:
    """What the user configured for fsspec itself: its configuration files, FSSPEC_* variables, or `fsspec.config`."""
    folder = env.get("FSSPEC_CONFIG_DIR") or os.path.expanduser("~/.config/fsspec")
    written = os.path.isdir(folder) or any(name.startswith("FSSPEC_") for name in env)
    if not written and "fsspec.config" not in sys.modules:
        return {}  # fsspec need not even be imported
    from fsspec.config import conf, set_conf_env

    merged = {name: dict(value) for name, value in conf.items() if isinstance(value, Mapping)}
    set_conf_env(merged, dict(env))
    return dict(merged.get(protocol, {}))


def s3_settings(options: Mapping[str, Any], env: Mapping[str, str]) -> S3Settings:
    """Put together where and who, from `options` (s3fs's names, or the AWS variables in lower case) and `env`."""
    known = {**fsspec_options("s3", env), **options}
    client = dict(known.get("client_kwargs") or {})
    config = dict(known.get("config_kwargs") or {})

    def option(*names: str) -> Any:
        return next((known[name] for name in names if known.get(name) is not None), None)

    profile = option("profile", "aws_profile") or env.get("AWS_PROFILE")
    profile_values: Mapping[str, Any] | None = None

    def from_profile(name: str) -> Any:
        nonlocal profile_values
        if profile_values is None:
            profile_values = _profile(profile, env)
        return profile_values.get(name)

    endpoint = (
        option("endpoint_url", "endpoint", "aws_endpoint_url", "aws_endpoint")
        or client.get("endpoint_url")
        or env.get("AWS_ENDPOINT_URL_S3")
        or env.get("AWS_ENDPOINT_URL")
        or from_profile("endpoint_url")
        or None
    )
    region = (
        option("region", "region_name", "aws_region")
        or client.get("region_name")
        or env.get("AWS_REGION")
        or env.get("AWS_DEFAULT_REGION")
        or from_profile("region")
        or "us-east-1"
    )
    style = (config.get("s3") or {}).get("addressing_style") or option("addressing_style")
    if option("virtual_hosted_style_request") in (True, "true"):
        style = "virtual"
    keys: Callable[[], Keys] | None = None
    if not _true(option("anon", "anonymous", "skip_signature", "aws_skip_signature")):
        access = option("key", "access_key_id", "aws_access_key_id", "username")
        secret = option("secret", "secret_access_key", "aws_secret_access_key", "password")
        token = option("token", "session_token", "aws_session_token")
        if not access and not option("profile", "aws_profile") and env.get("AWS_ACCESS_KEY_ID"):
            access, secret = env["AWS_ACCESS_KEY_ID"], env.get("AWS_SECRET_ACCESS_KEY")
            token = env.get("AWS_SESSION_TOKEN") or env.get("AWS_SECURITY_TOKEN")
        if access:
            if not secret:
                raise ConfigError(
                    "There is an S3 access key without its secret.", hint="Set AWS_SECRET_ACCESS_KEY (or secret=)."
                )
            fixed = Keys(str(access), str(secret), str(token) if token else None)
            keys = lambda: fixed  # noqa: E731
        else:
            keys = _Found(profile, env)
    return S3Settings(
        endpoint=str(endpoint).rstrip("/") if endpoint else None,
        region=str(region),
        keys=keys,
        path_style=style == "path" or (style != "virtual" and endpoint is not None),
        requester_pays=_true(option("requester_pays", "request_payer", "aws_request_payer")),
        ca_file=env.get("AWS_CA_BUNDLE") or (client["verify"] if isinstance(client.get("verify"), str) else None),
    )


def _true(value: Any) -> bool:
    return value is True or (isinstance(value, str) and value.lower() in ("1", "true", "yes", "requester"))


def _profile(name: str | None, env: Mapping[str, str]) -> Mapping[str, Any]:
    """The settings of a profile in AWS's configuration file; empty if there is none."""
    path = os.path.expanduser(env.get("AWS_CONFIG_FILE") or "~/.aws/config")
    if not os.path.exists(path):
        return {}
    import configparser

    parser = configparser.RawConfigParser()
    try:
        parser.read(path)
    except configparser.Error as error:
        raise ConfigError(f"{path} can't be read: {error}") from None
    for section in (f"profile {name}", name) if name else ("default", "profile default"):
        if parser.has_section(section):
            return dict(parser.items(section))
    return {}


class _Found:
    """Keys that botocore finds (and renews): a profile, SSO, a web identity, a container's or an instance's role."""

    def __init__(self, profile: str | None, env: Mapping[str, str]) -> None:
        self._profile = profile
        self._env = {name: value for name, value in env.items() if name.startswith("AWS_")}
        self._lock = threading.Lock()
        self._credentials: Any = None
        self._keys: Keys | None = None
        self._fetched = 0.0

    def __call__(self) -> Keys:
        with self._lock:
            if self._keys is None or time.monotonic() - self._fetched > _REFRESH_S:
                self._keys = self._fetch()
                self._fetched = time.monotonic()
            return self._keys

    def _fetch(self) -> Keys:
        import botocore.exceptions
        import botocore.session

        try:
            if self._credentials is None:
                session = botocore.session.Session(profile=self._profile)
                for variable, value in (
                    ("AWS_CONFIG_FILE", "config_file"),
                    ("AWS_SHARED_CREDENTIALS_FILE", "credentials_file"),
                ):
                    if variable in self._env:
                        session.set_config_variable(value, self._env[variable])
                # On no cloud machine the search for its role must not hold up the error for long.
                session.set_config_variable("metadata_service_timeout", 1)
                session.set_config_variable("metadata_service_num_attempts", 1)
                self._credentials = session.get_credentials()
            if self._credentials is None:
                raise DataAccessDenied(
                    "There are no S3 credentials here.",
                    hint="Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (in the environment, or env= of the task), "
                    "choose AWS_PROFILE, or for a public bucket pass storage_options={'anon': True}.",
                )
            frozen = self._credentials.get_frozen_credentials()
        except botocore.exceptions.ProfileNotFound:
            raise DataAccessDenied(
                f"There is no AWS profile {self._profile!r}.",
                hint="aws configure list-profiles names those that exist; choose one with AWS_PROFILE or profile=.",
            ) from None
        except botocore.exceptions.BotoCoreError as error:
            raise DataAccessDenied(
                f"The S3 credentials could not be fetched: {error}", hint="Log in again, for instance: aws sso login."
            ) from None
        return Keys(frozen.access_key, frozen.secret_key, frozen.token)
