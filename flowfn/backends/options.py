"""What a configuration file says of a backend, held against what the backend's class takes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

from flowfn_runtime.errors import ConfigError

if TYPE_CHECKING:
    from flowfn.backends.base import Backend

_TAKES_ANY = 0x08  # of a function's code: it has **keywords


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


# What is accepted for a parameter that is annotated so; others are the class's own matter.
_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "str": (lambda value: isinstance(value, str), "a text"),
    "bool": (lambda value: isinstance(value, bool), "true or false"),
    "int": (lambda value: type(value) is int, "a whole number"),
    "float": (lambda value: type(value) in (int, float), "a number"),
    "Iterable[str]": (_texts, "a list of texts"),
    "Iterable[str | os.PathLike[str]]": (_texts, "a list of texts"),
}


def check(kind: type[Backend], options: Mapping[str, Any], name: str) -> None:
    """Raise ConfigError for an option that backends of this class don't take, or not with such a value.

    `name` is the backend's. `more_options` of a class are names that its `**keywords` may have.
    """
    init = kind.__init__
    code = getattr(init, "__code__", None)
    known = list(code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]) if code else []
    more = getattr(kind, "more_options", ())
    if more or not code or not code.co_flags & _TAKES_ANY:
        known += more
        for option in options.keys() - set(known):
            listed = ", ".join(sorted({*known} - {"url", "options"}))
            raise ConfigError(
                f"backend {name!r}: there is no option {option!r}{meant(option, known)}",
                hint=f"the options of {kind.name} are: {listed}" if listed else f"{kind.name} has no options",
            )
    annotations = getattr(init, "__annotations__", {})
    for option, value in options.items():
        wanted = annotations.get(option)
        words = getattr(wanted, "__name__", str(wanted)) if not isinstance(wanted, str) else wanted
        fits, accepted = _KINDS.get(words.removesuffix(" | None"), (None, ""))
        if fits is not None and not fits(value):
            raise ConfigError(f"backend {name!r}: {option} = {value!r} is not accepted; accepted: {accepted}")


def meant(word: object, known: Collection[str]) -> str:
    """A guess at which of these a misspelt word was to be, for the end of a message."""
    from difflib import get_close_matches

    near = get_close_matches(str(word), known, 1)
    return f"; did you mean {near[0]!r}?" if near else ""
