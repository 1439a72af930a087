"""The GPU grammar: what `gpu=` may say, and which device fits it. Pure: no device is looked at here.

```
gpu      := nothing | one | [one, ...]            a list holds fallbacks, the first that can be had is taken
one      := count | name | name:count | countxname | namexcount | name.countx
name     := any | gpu | model | model-memory | any-memory
memory   := 80gb                                  a device with at least that much
```

Case, blanks and underscores don't matter. Brand ("nvidia", "tesla", "geforce") and form factor ("sxm4", "pcie") are
accepted and left out: they name the same device to a program.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from flowfn_runtime.errors import ValidationError

ACCEPTED = '"a100", "a100:4", "4xa100", "a100-80gb:2", "gpu:2", "any", a number, a list of these as fallbacks, or "cpu"'

MAX_COUNT = 1024  # of one worker; a larger number is a mistake ("4090" for "rtx4090")

_NONE = ("", "cpu", "none")
_ANY = ("any", "gpu", "gpus")
_BRANDS = ("nvidia", "tesla", "geforce", "generation")
_MEMORY_TOLERANCE = 0.95  # drivers keep some: a 24 GB A10G shows 23.8e9 bytes


class GpuRequest(NamedTuple):  # not a dataclass: making one costs half a millisecond of every import
    """`count` devices of one kind. `model` None: any; `memory_gb`: at least that many GB (10^9 bytes) a device."""

    model: str | None = None
    memory_gb: int | None = None
    count: int = 1  # type: ignore[assignment]  # nobody counts the items of a request

    def __str__(self) -> str:
        """The canonical form, which `parse_gpu` reads back to the same request."""
        name = self.model or "gpu"
        if self.memory_gb is not None:
            name += f"-{self.memory_gb}gb"
        return name if self.count == 1 else f"{name}:{self.count}"

    def fits(self, model: str, memory_bytes: int) -> bool:
        """Whether a device fits. `model` as of `model_of`; `memory_bytes` 0 where it is not known."""
        if self.memory_gb is not None and memory_bytes < self.memory_gb * 1e9 * _MEMORY_TOLERANCE:
            return False
        if self.model is None:
            return True
        asked, there = _squash(self.model), _squash(model)
        if "mig" in model.split("-"):  # a slice of a device is not what "a100" means: it has to be named
            return asked == there or (self.model.startswith("mig-") and model.endswith("-" + self.model))
        return asked in (there, there.removeprefix("rtx"), there.removeprefix("quadro"))


def parse_gpu(value: object, *, option: str = "gpu") -> tuple[GpuRequest, ...]:
    """The requests that `value` means, the most wanted first; none for `None`, `""`, `"cpu"` and 0.

    Raises ValidationError, naming `option`, if it is none of the forms of this module's grammar.
    """
    if isinstance(value, (list, tuple)) and not isinstance(value, GpuRequest):
        requests: list[GpuRequest] = []
        for item in value:
            found = _parse(item, option)
            if not found:
                raise _refuse(option, value, f"{item!r} is no GPU; a list names GPUs as fallbacks")
            requests += [request for request in found if request not in requests]
        return tuple(requests)
    return _parse(value, option)


def _parse(value: object, option: str) -> tuple[GpuRequest, ...]:
    if value is None:
        return ()
    if isinstance(value, GpuRequest):
        return (value,)
    if isinstance(value, int) and not isinstance(value, bool):
        return (GpuRequest(count=_count(value, option, value)),) if value else ()
    if not isinstance(value, str):
        raise _refuse(option, value)
    text = value.strip().lower()
    if text in _NONE:
        return ()
    if not text.isascii():
        raise _refuse(option, value)
    if text.isdigit():
        return (GpuRequest(count=_count(int(text[:9]), option, value)),) if int(text) else ()
    name, counts = _split_counts(text)
    if len(counts) > 1:
        raise _refuse(option, value, "it has more than one count")
    model, memory = _split_name(name, option, value)
    if model is not None and _split_counts(model)[1]:
        raise _refuse(option, value)  # what is left looks like a count again: "a1x2-sxm"
    return (GpuRequest(model, memory, _count(counts[0], option, value) if counts else 1),)


def parse_slots(text: str, *, option: str = "FLOW_GPUS") -> list[GpuRequest]:
    """Declared slots, `"a100:4,h100-80gb:2"`: the devices of a machine rather than a choice among them."""
    slots: list[GpuRequest] = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        slots += parse_gpu(item, option=option)
    return slots


def model_of(device_name: str) -> str:
    """The model as the grammar spells it: `"NVIDIA A100-SXM4-80GB"` is `"a100"`, `"NVIDIA RTX A6000"` `"rtx-a6000"`."""
    text = device_name.lower()
    mig = re.search(r"mig[-. ]?(\d+g)[-.](\d+gb)", text)
    tokens = re.split(r"[^a-z0-9]+", text[: mig.start()] if mig else text)
    kept = [t for t in tokens if t and t not in _BRANDS and not _is_form(t) and _memory(t) is None]
    if mig:
        kept += ["mig", f"{mig[1]}.{mig[2]}"]
    return "-".join(kept) or "gpu"


def describe(requests: Sequence[GpuRequest]) -> str:
    """For messages: `a100-80gb:2 or h100`."""
    return " or ".join(map(str, requests)) or "no GPU"


def _split_counts(text: str) -> tuple[str, list[int]]:
    """Take every spelling of a count off; two of them are one too many, which the caller says."""
    counts = []
    for pattern in (
        r"(?P<n>\d+) *[x*] *(?P<name>.+)",  # 4xa100
        r"(?P<name>.+?) *: *(?P<n>\d+)",  # a100:4
        r"(?P<name>.+)[.\-_ ](?P<n>\d+)x",  # a100-80gb.sxm.4x
        r"(?P<name>.*\d.*|any|gpu)x(?P<n>\d{1,4})",  # a100x4; but rtx4090 and gtx1080 are names
    ):
        if match := re.fullmatch(pattern, text):
            text = match["name"]
            counts.append(int(match["n"][:9]))
    return text, counts


def _split_name(name: str, option: str, value: object) -> tuple[str | None, int | None]:
    if not re.fullmatch(r"[a-z0-9][a-z0-9._\- /]{0,63}", name):
        raise _refuse(option, value)
    tokens = [token for token in re.split(r"[._\- /]+", name) if token]
    if "mig" in tokens:
        return model_of(name), None
    if {"cpu", "none"} & set(tokens):
        raise _refuse(option, value)
    memories = [gb for token in tokens if (gb := _memory(token)) is not None]
    rest = [token for token in tokens if _memory(token) is None and not _is_form(token)]
    model = "-".join(token for token in rest if token not in _BRANDS and token not in _ANY) or None
    if len(memories) > 1 or 0 in memories:
        raise _refuse(option, value, "its memory is unclear" if memories[0] else "0gb is no memory")
    if model is None and not rest and not memories:  # nothing but a form factor
        raise _refuse(option, value)
    if model is not None and (not re.search("[a-z]", model) or re.fullmatch(r"\d*x\d*|.", model)):  # "4090", "4x"
        raise _refuse(option, value)
    return model, memories[0] if memories else None


def _count(number: int, option: str, value: object) -> int:
    if not 1 <= number <= MAX_COUNT:
        raise _refuse(option, value, f"the count is not from 1 to {MAX_COUNT}")
    return number


def _memory(token: str) -> int | None:
    match = re.fullmatch(r"(\d{1,6})g(i?b)?", token)
    return int(match[1]) if match else None


def _is_form(token: str) -> bool:
    return re.fullmatch(r"sxm\d*|pcie|nvl|nvlink|oam|hbm\d*e?", token) is not None


def _squash(model: str) -> str:
    return re.sub("[^a-z0-9]", "", model)


def _refuse(option: str, value: Any, why: str = "") -> ValidationError:
    return ValidationError(
        f"{option}={value!r} names no GPU{': ' + why if why else ''}; accepted: {ACCEPTED}",
        hint="a list names fallbacks, the first that can be had is taken" if "," in str(value) else None,
    )
