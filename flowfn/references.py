"""Data references for the client: `File`, `Dir`, `Output`, and what makes them from files, globs and big objects."""

from __future__ import annotations

from flowfn_runtime.data.access import Info
from flowfn_runtime.data.globs import files
from flowfn_runtime.data.output import Output
from flowfn_runtime.data.partitions import Partition, partitions
from flowfn_runtime.data.reference import Reference
from flowfn_runtime.data.references import Dir, File, StagedPath, staged_path
from flowfn_runtime.data.store import upload

__all__ = [
    "Dir",
    "File",
    "Info",
    "Output",
    "Partition",
    "Reference",
    "StagedPath",
    "files",
    "partitions",
    "staged_path",
    "upload",
]
