"""Calls made durable: `invoke` of a function in a file, and `fn.submit` of one that is at hand."""

from __future__ import annotations

import ast
import importlib.util
import os
import posixpath
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from flowfn_runtime import callfile, pickling, taskdb
from flowfn_runtime.data.spec import Mount, scheme_of
from flowfn_runtime.errors import ValidationError
from flowfn_runtime.taskcall import FileFunction, StagedArgument

from . import config as configuration
from .plan import Call
from .submit import submit
from .task import Task
from .taskconfig import TaskConfig

if TYPE_CHECKING:
    from .spec import FunctionSpec

# Arguments with one of these schemes are staged; anything else, also a plain path, is the function's business.
_STAGED_SCHEMES = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hf"})
_ARGUMENTS = "/mnt/args"  # where they appear, each in a directory of its own


def submit_file(
    path: str | os.PathLike[str],
    function: str,
    args: Iterable[Any],
    kwargs: Mapping[str, Any],
    config: TaskConfig,
    settings: configuration.Config,
) -> Task:
    """Submit a call of a function in a file. Raises `ValidationError` if there is no such file or function."""
    root = os.path.abspath(os.path.expanduser(config.code_root or os.getcwd()))
    file = os.path.join(root, os.path.expanduser(os.fspath(path)))
    source = _source(file)
    _check_function(source, file, function)
    module = os.path.splitext(os.path.basename(file))[0]
    inside = os.path.relpath(file, root)
    where = file if inside.startswith("..") else inside
    target = FileFunction(source, where, function, module, _client_imports(module, file))
    mounts: list[Mount] = []
    args = [_argument(value, mounts, settings) for value in args]
    kwargs = {name: _argument(value, mounts, settings) for name, value in kwargs.items()}
    payload = pickling.dumps((target, args, kwargs))
    if config.name is None:
        name = "".join(c if c.isalnum() or c in "._-" else "-" for c in f"{module}-{function}").lstrip("._-")
        config = config.model_copy(update={"name": name or "call"})
    call = Call(
        payload=callfile.dumps(callfile.CALL, payload),
        title=f"{inside}::{function}",
        mounts=tuple(mounts),
        image=config.image,
    )
    return Task(taskdb.get(submit(config, settings=settings, call=call, backend=config.backend)))


def submit_function(spec: FunctionSpec, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Task:
    """Submit a call of a function object, with the options it was decorated with."""
    from flowfn_runtime import bodies

    function = bodies.unwrap(fn)
    name = spec.name or getattr(function, "__qualname__", "call").replace("<", "").replace(">", "")
    payload = pickling.dumps((function, list(args), kwargs))
    config = TaskConfig(
        name="".join(c if c.isalnum() or c in "._-" else "-" for c in name).lstrip("._-") or "call",
        env=dict(spec.environment(os.environ)),
        data_mounts=list(spec.mounts),
        instance_type=[str(request) for request in spec.gpu] or None,
        max_run_time_hours=spec.timeout / 3600 if spec.timeout else None,
        retries=spec.retries or 0,
    )
    call = Call(
        payload=callfile.dumps(callfile.CALL, payload),
        title=f"{function.__module__}:{name}",
        cpus=spec.cpu,
        memory_bytes=spec.memory,
        image=spec.image,
    )
    return Task(taskdb.get(submit(config, call=call, backend=spec.backend)))


def _source(file: str) -> str:
    import tokenize

    try:
        with tokenize.open(file) as stream:  # honours the encoding that the file declares
            return stream.read()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise ValidationError(
            f"there is no file {file}", hint="Give a path relative to the working directory."
        ) from None
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        raise ValidationError(f"{file} can't be read: {error}") from None


def _check_function(source: str, file: str, function: str) -> None:
    """Look for the function without running the file: what it imports may be there only where the call runs."""
    try:
        tree = ast.parse(source, file)
    except SyntaxError as error:
        raise ValidationError(f"{file}, line {error.lineno}: {error.msg}") from None
    names = set(_top_level_names(tree.body))
    if function in names or "*" in names:
        return
    from difflib import get_close_matches

    near = get_close_matches(function, names, 1)
    raise ValidationError(
        f"{file} has no function {function!r}",
        hint=f"Did you mean {near[0]!r}?" if near else f"It has: {', '.join(sorted(names)) or 'nothing'}.",
    )


def _top_level_names(body: list[ast.stmt]) -> Iterable[str]:
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from (alias.asname or alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name))
        elif isinstance(node, (ast.If, ast.Try, ast.With, ast.For, ast.While)):
            yield from _top_level_names([child for child in ast.walk(node) if isinstance(child, ast.stmt)][1:])


def _client_imports(module: str, file: str) -> bool:
    """Whether importing `module` here gives this very file, so that what it defines can travel by name."""
    if (loaded := sys.modules.get(module)) is not None:
        return os.path.realpath(getattr(loaded, "__file__", None) or "") == os.path.realpath(file)
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return False
    return found is not None and os.path.realpath(found.origin or "") == os.path.realpath(file)


def _argument(value: Any, mounts: list[Mount], settings: configuration.Config) -> Any:
    """A URL of a bucket becomes the path at which its data will lie."""
    if not isinstance(value, str) or "://" not in value or scheme_of(value) not in _STAGED_SCHEMES:
        return value
    name = posixpath.basename(value.rstrip("/")) or "data"
    mount = Mount(value, f"{_ARGUMENTS}/{len(mounts)}/{name}")
    mounts.append(settings.with_options(mount))
    return StagedArgument(value, mount.target)
