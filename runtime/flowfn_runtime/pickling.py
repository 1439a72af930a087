"""Values to bytes and back: pickle protocol 5 with out-of-band buffers, and cloudpickle where names don't suffice.

Three ways, chosen by looking at the value, with the same result:

- plain values (numbers, strings, None and small containers of them) go through pickle at its fastest;
- everything else through cloudpickle, so that functions and classes of `__main__`, closures and lambdas go by value;
- big `bytes` and CPU torch tensors, which pickle would copy into its stream, go out of band as numpy arrays do.

Data references (`flow.File` and so on) in a value are noted while it is pickled and unpickled, so that both sides know
them without looking for them; objects of `flow.put` likewise.
"""

from __future__ import annotations

import io
import pickle
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import DataError, SerializationError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

PLAIN = frozenset({int, float, bool, str, bytes, complex, type(None)})
_PLAIN_CONTAINERS = frozenset({tuple, list, dict})
_SMALL = 32  # containers longer than this are not looked into
_DEPTH = 5  # nor those nested deeper than this, or within themselves
OUT_OF_BAND_BYTES = 1 << 16  # bytes objects from this size on go out of band


class Payload(NamedTuple):
    """A pickled value: the pickle, its out-of-band buffers (flat memoryviews), and the references found in it."""

    data: Any
    buffers: list[Any]
    references: list[Any]

    @property
    def size_bytes(self) -> int:
        return len(self.data) + sum(len(b) for b in self.buffers)


class _Noted(threading.local):
    sink: list[Any] | None = None
    objects: dict[str, Any] | None = None
    keep_classes: bool = False


_noted = _Noted()


def note_reference(reference: Any) -> None:
    """A data reference says that it is being pickled or unpickled. Outside of flowfn's pickling this does nothing."""
    if _noted.sink is not None:
        _noted.sink.append(reference)


def shared_object(key: str) -> Any:
    """What a reference of `flow.put` is unpickled as: the object itself, which this process got before."""
    objects = _noted.objects
    if objects is None or key not in objects:
        raise SerializationError(
            "a reference made by flow.put() was unpickled outside of a flowfn call",
            hint="pass the reference as an argument of a call; to use the object here, call ref.get()",
        )
    return objects[key]


def is_plain(value: Any, depth: int = _DEPTH) -> bool:
    """Whether pickle alone gives what cloudpickle would: plain values, and small containers of plain values."""
    kind = type(value)
    if kind in PLAIN:
        return True
    if kind not in _PLAIN_CONTAINERS or len(value) > _SMALL or not depth:
        return False
    if kind is dict:
        if not PLAIN.issuperset(map(type, value)):
            return False
        value = value.values()
    return all([type(item) in PLAIN or is_plain(item, depth - 1) for item in value])  # noqa: C419 - a list is faster


def dumps(value: Any, *, in_band: bool = False) -> Payload:
    """Pickle any value. Raises SerializationError, naming the attribute path of what can't be pickled.

    `in_band`: with no buffers beside the pickle.
    """
    if in_band:
        return _dumps_general(value, in_band=True)
    if is_plain(value):
        if _has_big_bytes(value):
            return _dumps_general(value)
        return Payload(pickle.dumps(value, 5), [], [])
    return _dumps_general(value)


def _has_big_bytes(value: Any, depth: int = _DEPTH) -> bool:
    kind = type(value)
    if kind is bytes:
        return len(value) >= OUT_OF_BAND_BYTES
    if kind not in _PLAIN_CONTAINERS or len(value) > _SMALL or not depth:
        return False
    return any(_has_big_bytes(item, depth - 1) for item in (value.values() if kind is dict else value))


def _dumps_general(value: Any, *, in_band: bool = False) -> Payload:
    buffers: list[Any] = []
    references: list[Any] = []
    before, _noted.sink = _noted.sink, references
    try:
        stream = io.BytesIO()
        plain, apart = _pickler_classes()
        if in_band:
            plain(stream, 5).dump(value)
        elif not _has_big_bytes(value):
            plain(stream, 5, buffer_callback=_collect(buffers)).dump(value)
        else:
            pickler = apart(stream, 5, buffer_callback=_collect(buffers))
            pickler.dump(value)
            carrier = _Carrier(stream.getvalue(), pickler.big, buffers)
            buffers = []
            return Payload(pickle.dumps(carrier, 5, buffer_callback=_collect(buffers)), buffers, references)
        # The bytes themselves, shared and not copied: a view of the stream would outlive it in a reference cycle, and
        # Python 3.13 says so on standard error.
        return Payload(stream.getvalue(), buffers, references)
    except DataError:
        raise  # of a file that goes into the store
    except Exception as error:
        raise explain(value, error) from error
    finally:
        _noted.sink = before


def _collect(buffers: list[Any]) -> Callable[[pickle.PickleBuffer], bool]:
    def callback(buffer: pickle.PickleBuffer) -> bool:
        try:
            raw = buffer.raw()
        except BufferError:  # not contiguous: it goes in the pickle
            return True
        if len(raw) < 512:
            return True
        buffers.append(raw)
        return False

    return callback


def loads(
    data: Any, buffers: Sequence[Any] = (), *, objects: dict[str, Any] | None = None, keep_classes: bool = False
) -> tuple[Any, list[Any]]:
    """The value, and the references in it. Whatever unpickling raises is raised as it is.

    `objects` are those of `flow.put`. With `keep_classes`, classes that came by value before stay as they are: those
    of a client's `__main__` are its own, and the copy of a worker must not overwrite their members.
    """
    references: list[Any] = []
    before = _noted.sink, _noted.objects, _noted.keep_classes
    _noted.sink = references
    if objects is not None:
        _noted.objects = objects
    try:
        if keep_classes and _has_classes(data):
            _noted.keep_classes = True
            return _Unpickler(io.BytesIO(data), buffers=buffers).load(), references
        return pickle.loads(data, buffers=buffers), references
    finally:
        _noted.sink, _noted.objects, _noted.keep_classes = before


def _has_classes(data: Any) -> bool:
    """Whether a pickle may hold classes by value."""
    import re

    return re.search(b"_make_skeleton_", data) is not None


class _Unpickler(pickle.Unpickler):
    """For pickles with big bytes objects beside them, and where classes are to stay as they are."""

    big: Sequence[bytes] = ()

    def persistent_load(self, index: Any) -> bytes:
        value: bytes = self.big[index]
        return value

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._kept: set[int] = set()

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name)
        if module == "cloudpickle.cloudpickle" and _noted.keep_classes:
            # What is returned here goes into the memo, where Python 3.10 finds no cycles: it must not refer to `self`,
            # or all that was unpickled would stay for ever.
            kept = self._kept
            if name.startswith("_make_skeleton_"):
                return _find_or(found, kept)
            if name == "_class_setstate":
                return lambda made, state: made if id(made) in kept else found(made, state)
        return found


def _find_or(make: Callable[..., Any], kept: set[int]) -> Callable[..., Any]:
    from cloudpickle import cloudpickle

    def find_or_make(*args: Any) -> Any:
        known = cloudpickle._DYNAMIC_CLASS_TRACKER_BY_ID.get(args[-2])  # cloudpickle's id of the class
        if known is None:
            return make(*args)
        kept.add(id(known))
        return known

    return find_or_make


# What pickle would copy


class _Carrier:
    """A pickle beside which big bytes objects and its buffers travel out of band."""

    __slots__ = ("big", "buffers", "inner")

    def __init__(self, inner: bytes, big: list[bytes], buffers: list[Any]) -> None:
        self.inner = inner
        self.big = big
        self.buffers = buffers

    def __reduce__(self) -> Any:
        big = [pickle.PickleBuffer(value) for value in self.big]
        return load_carried, (self.inner, big, [pickle.PickleBuffer(buffer) for buffer in self.buffers])


def load_carried(inner: bytes, big: list[Any], buffers: list[Any]) -> Any:
    """What a pickle with big bytes objects beside it stands for."""
    unpickler = _Unpickler(io.BytesIO(inner), buffers=buffers)
    unpickler.big = [bytes(value) for value in big]
    return unpickler.load()


_picklers: tuple[type[pickle.Pickler], type[Any]] | None = None


def _pickler_class() -> type[pickle.Pickler]:
    return _pickler_classes()[0]


def _pickler_classes() -> tuple[type[pickle.Pickler], type[Any]]:
    """Picklers for any value: a plain one, and one that keeps big bytes objects out of its pickle."""
    global _picklers
    if _picklers is None:
        import cloudpickle

        class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
            def reducer_override(self, obj: Any) -> Any:
                kind = type(obj)
                if kind.__module__ in ("torch", "torch.nn.parameter") and (reduced := _reduce_tensor(obj)):
                    return reduced
                return super().reducer_override(obj)

        class ApartPickler(Pickler):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **kwargs)
                self.big: list[bytes] = []
                self._known: dict[int, int] = {}

            def persistent_id(self, obj: Any) -> int | None:
                if type(obj) is not bytes or len(obj) < OUT_OF_BAND_BYTES:
                    return None
                index = self._known.get(id(obj))
                if index is None:
                    index = self._known[id(obj)] = len(self.big)
                    self.big.append(obj)
                return index

        _picklers = Pickler, ApartPickler
    return _picklers


def _reduce_tensor(obj: Any) -> Any:
    """A plain CPU tensor as its bytes; None leaves anything else to torch."""
    import torch

    if type(obj) is not torch.Tensor or obj.device.type != "cpu" or obj.layout is not torch.strided:
        return None
    if obj.is_quantized or obj.grad_fn is not None or obj.is_conj() or obj.is_neg() or obj.__dict__ or not obj.numel():
        return None
    array = obj.detach().contiguous().view(torch.uint8 if obj.dim() else obj.dtype).reshape(-1)
    if array.dtype is not torch.uint8:
        array = array.view(torch.uint8)
    name = str(obj.dtype).removeprefix("torch.")
    flat: Any = array.numpy()
    return rebuild_tensor, (pickle.PickleBuffer(flat), name, tuple(obj.shape), obj.requires_grad)


def rebuild_tensor(buffer: Any, dtype: str, shape: tuple[int, ...], requires_grad: bool) -> Any:
    """A torch tensor on the bytes of `buffer`, which it shares."""
    import torch

    view = memoryview(buffer)
    if view.readonly:
        view = memoryview(bytearray(view))
    tensor = torch.frombuffer(view, dtype=getattr(torch, dtype)).reshape(shape)
    return tensor.requires_grad_(requires_grad) if requires_grad else tensor


# What can't be pickled


def explain(value: Any, error: BaseException, *, what: str = "value") -> SerializationError:
    """A SerializationError that names the path to the innermost part of `value` that can't be pickled."""
    if isinstance(error, SerializationError):
        return error
    path, culprit = _culprit(value, what)
    kind = f"{type(culprit).__module__}.{type(culprit).__qualname__}".removeprefix("builtins.")
    reason = str(error) or type(error).__name__
    if isinstance(error, RecursionError) or "recursion" in reason:
        reason = "it is nested too deeply"
    return SerializationError(
        f"{path} (a {kind}) can't be pickled: {reason}",
        hint="pass something that can be pickled, or make this object inside the function",
    )


def _culprit(value: Any, path: str, depth: int = 8) -> tuple[str, Any]:
    if depth:
        for step, part in _parts(value):
            if not _can_pickle(part):
                return _culprit(part, path + step, depth - 1)
    return path, value


def _parts(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [(f"[{key!r}]", part) for key, part in value.items()]
    if isinstance(value, (list, tuple, set, frozenset)):
        return [(f"[{i}]", part) for i, part in enumerate(value)]
    parts = [(f".{name}", part) for name, part in getattr(value, "__dict__", {}).items()]
    for name in getattr(type(value), "__slots__", ()):
        if isinstance(name, str) and hasattr(value, name):
            parts.append((f".{name}", getattr(value, name)))
    closure = getattr(value, "__closure__", None)
    if closure and (code := getattr(value, "__code__", None)):
        for name, cell in zip(code.co_freevars, closure, strict=False):
            try:
                parts.append((f" closure variable {name!r}", cell.cell_contents))
            except ValueError:
                pass
    if code := getattr(value, "__code__", None):
        namespace = getattr(value, "__globals__", {})
        parts += [(f" global {name!r}", namespace[name]) for name in code.co_names if name in namespace]
    return parts


def _can_pickle(value: Any) -> bool:
    try:
        _pickler_class()(io.BytesIO(), 5, buffer_callback=lambda _: False).dump(value)
    except Exception:
        return False
    return True
