"""Which GPUs this host has: NVML says it, or a declaration does."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from flowfn_runtime.gpu_request import model_of, parse_slots


@dataclass(frozen=True)
class Gpu:
    """One device, or one slot that `FLOW_GPUS` declares."""

    index: int  # of NVML, which counts in PCI bus order; of the declaration
    uuid: str  # "GPU-..." or "MIG-..."; "declared-<index>" for a declared slot
    model: str  # as the GPU grammar spells it: "a100", "rtx-4090"
    memory_bytes: int  # 0: not known (a slot declared without its memory)
    declared: bool = False
    name: str = ""  # as the driver says it

    @property
    def visible(self) -> str:
        """What names the device in CUDA_VISIBLE_DEVICES. A declared slot has no uuid that CUDA knows."""
        return str(self.index) if self.declared else self.uuid


@dataclass(frozen=True)
class Inventory:
    """The GPUs that this process may use."""

    gpus: tuple[Gpu, ...]
    source: str  # "nvml", "declared" or "none"
    reason: str = ""  # why there are none, or what keeps some of them from this process

    def __str__(self) -> str:
        """For messages: "2 x a100 (79 GiB), 1 x h100"."""
        if not self.gpus:
            return f"no GPU ({self.reason})"
        kinds: dict[str, int] = {}
        for gpu in self.gpus:
            kind = gpu.model + (f" ({gpu.memory_bytes / 2**30:.0f} GiB)" if gpu.memory_bytes else "")
            kinds[kind] = kinds.get(kind, 0) + 1
        text = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
        return text + (" (declared by FLOW_GPUS)" if self.source == "declared" else "") + self._restriction

    @property
    def _restriction(self) -> str:
        return f" ({self.reason})" if self.reason else ""


def inventory(declared: str | None = None, *, environ: Mapping[str, str] | None = None) -> Inventory:
    """The GPUs of this host that this process may use.

    `declared` (the configuration's `gpus`; else the environment's FLOW_GPUS) names slots, `"a100:4,h100:2"`, and then
    no device is looked for. CUDA_VISIBLE_DEVICES of the process restricts what there is. Without the NVML library or
    a driver there are none, which is no error. Raises ConfigError if the declaration can't be read.
    """
    environ = os.environ if environ is None else environ
    text = declared if declared is not None else environ.get("FLOW_GPUS", "")
    if text.strip():
        gpus, source, reason = _declared(text), "declared", "FLOW_GPUS declares none"
        if gpus:
            import logging

            logging.getLogger("flowfn.gpus").info("GPUs are declared, not found: FLOW_GPUS=%s", text)
    else:
        gpus, reason = _read_nvml()
        source = "nvml"
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if gpus and visible is not None:
        allowed = _allowed(gpus, visible)
        if len(allowed) < len(gpus):
            return Inventory(allowed, source, f"CUDA_VISIBLE_DEVICES={visible!r} leaves {len(allowed)} of {len(gpus)}")
        gpus = allowed
    return Inventory(gpus, source, "") if gpus else Inventory((), "none", reason)


def _declared(text: str) -> tuple[Gpu, ...]:
    gpus: list[Gpu] = []
    for slot in parse_slots(text):
        for _ in range(slot.count):
            index = len(gpus)
            memory = (slot.memory_gb or 0) * 10**9
            gpus.append(Gpu(index, f"declared-{index}", slot.model or "gpu", memory, True, "declared by FLOW_GPUS"))
    return tuple(gpus)


def _allowed(gpus: tuple[Gpu, ...], visible: str) -> tuple[Gpu, ...]:
    """What CUDA would show: indices and (beginnings of) uuids, up to the first that names nothing."""
    allowed: list[Gpu] = []
    for token in (part.strip() for part in visible.split(",")):
        if token.isdecimal():
            # NVML's order is PCI bus order. CUDA's own default may differ where a host has several models.
            match = [gpu for gpu in gpus if gpu.index == int(token) and not gpu.uuid.startswith("MIG-")]
        else:
            match = [gpu for gpu in gpus if token and gpu.uuid.startswith(token)]
        if len(match) != 1 or match[0] in allowed:
            break
        allowed += match
    return tuple(allowed)


@lru_cache(maxsize=1)  # devices don't come and go while a process lives, and a driver takes its time to answer
def _read_nvml() -> tuple[tuple[Gpu, ...], str]:
    """The devices, or none and the reason."""
    try:
        import pynvml
    except ImportError:
        if os.path.exists("/proc/driver/nvidia/version"):
            return (), "the NVIDIA driver is there but nvidia-ml-py is not: pip install 'flowfn[gpu]'"
        return (), "this host has no NVIDIA driver"
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        if isinstance(error, pynvml.NVMLError_LibraryNotFound):
            return (), "this host has no NVIDIA driver: libnvidia-ml.so.1 is not found"
        return (), f"NVML says: {error}"
    try:
        gpus: list[Gpu] = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            device = pynvml.nvmlDeviceGetHandleByIndex(index)
            gpus += [_gpu(pynvml, index, handle) for handle in _instances(pynvml, device)]
        return tuple(gpus), "" if gpus else "NVML finds no device"
    except pynvml.NVMLError as error:
        return (), f"NVML says: {error}"
    finally:
        pynvml.nvmlShutdown()


def _instances(nvml: Any, device: Any) -> list[Any]:
    """The device itself, or its MIG instances where it is cut into such: then only they can be used."""
    try:
        if not nvml.nvmlDeviceGetMigMode(device)[0]:
            return [device]
        most = nvml.nvmlDeviceGetMaxMigDeviceCount(device)
    except nvml.NVMLError:  # a driver or device that knows no MIG
        return [device]
    instances = []
    for index in range(most):
        try:
            instances.append(nvml.nvmlDeviceGetMigDeviceHandleByIndex(device, index))
        except nvml.NVMLError:  # the places of instances that were not made
            continue
    return instances


def _gpu(nvml: Any, index: int, handle: Any) -> Gpu:
    name, uuid = (text.decode() if isinstance(text, bytes) else text for text in _names(nvml, handle))
    try:
        memory = int(nvml.nvmlDeviceGetMemoryInfo(handle).total)
    except nvml.NVMLError:  # unified memory, as on Jetson and GB10
        memory = 0
    return Gpu(index, uuid, model_of(name), memory, False, name)


def _names(nvml: Any, handle: Any) -> tuple[Any, Any]:
    return nvml.nvmlDeviceGetName(handle), nvml.nvmlDeviceGetUUID(handle)
