"""The Jobs server of a Ray cluster, as the keeper asks it (`ray_keeper`). It goes to the head by value."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

PAUSES_S = (0.5, 1.0, 2.0, 4.0)  # between attempts: on a busy head it may not answer for a moment
FIELDS = ("status", "message", "start_time", "end_time")


class NoServer(ConnectionError):
    """The cluster has none."""


class Server:
    """What it raises: ConnectionError, no answer; and what Ray's client does. `find`: its address, if there is one."""

    def __init__(self, find: Callable[[], str | None]) -> None:
        self._find = find
        self._client: Any = None
        self._answers = True  # as far as is known; who asks one that does not is told at once
        self._listed: tuple[float, dict[str, dict[str, Any]]] = (float("-inf"), {})
        self._listing = asyncio.Lock()
        self._submitted = 0.0  # when the last job was

    async def submit(self, **options: Any) -> None:
        try:
            await self.ask("submit_job", **options)
        finally:  # it may be there though the answer was lost
            self._submitted = time.monotonic()

    async def jobs(self, age: float = 0.0) -> dict[str, dict[str, Any]]:
        """All jobs by what they were submitted as, by one question for all; not older than `age` seconds."""
        asked = time.monotonic()
        async with self._listing:
            if self._listed[0] < max(asked - age, self._submitted):
                begun = time.monotonic()
                jobs = {
                    job.submission_id: {field: getattr(job, field) for field in FIELDS}
                    for job in await self.ask("list_jobs")
                    if job.submission_id
                }
                self._listed = begun, jobs
            return self._listed[1]

    async def ask(self, method: str, *args: Any, **options: Any) -> Any:
        for pause in (*(PAUSES_S if self._answers else ()), None):
            try:
                answer = await asyncio.to_thread(self._ask, method, args, options)
            except ConnectionError as error:
                if pause is None or isinstance(error, NoServer):
                    self._answers = False
                    raise
                await asyncio.sleep(pause)
            else:
                self._answers = True
                return answer
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _ask(self, method: str, args: Any, options: Any) -> Any:
        import requests

        try:
            if self._client is None:
                self._client = self._connect()
            return getattr(self._client, method)(*args, **options)
        except NoServer:
            raise
        except (ConnectionError, requests.exceptions.RequestException) as error:
            self._client = None
            raise ConnectionError(f"Ray's Jobs server does not answer: {error}") from None

    def _connect(self) -> Any:
        where = self._find()
        if not where:
            raise NoServer("tasks on Ray take its Jobs server, and the cluster's head runs without the dashboard")
        try:
            from ray.job_submission import JobSubmissionClient

            return JobSubmissionClient(f"http://{where}")
        except (ImportError, RuntimeError, ConnectionError) as error:
            kind = ConnectionError if isinstance(error, ConnectionError) else NoServer
            raise kind(
                f"tasks on Ray take its Jobs server, which does not answer on the cluster's head: {error} "
                "(is ray[default] installed there, and the dashboard on?)"
            ) from None


def address() -> str | None:
    """Of the Jobs server of this cluster."""
    from ray._private import ray_constants
    from ray.experimental import internal_kv

    where = internal_kv._internal_kv_get(
        ray_constants.DASHBOARD_ADDRESS, namespace=ray_constants.KV_NAMESPACE_DASHBOARD
    )
    return where.decode() if where else None
