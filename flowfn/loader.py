"""The first program on the other side: it gets the runtime there, and runs it.

`program()` is what a backend starts: it looks for Python, hears what is wanted, says which Python it found if anything
is lacking, takes the runtime from its standard input then, and hands over to `flowfn_runtime.bootstrap`. It has to run
on any Python, to say that it is the wrong one.
"""

from __future__ import annotations

import sys

MARK = "flowfn-loader "  # begins each line that the loader says; what a login shell prints is not ours

# Arguments: the loader's own text, the directory of the cache or "".
_LOADER = r"""
import os, json
def line(**words):
    return ("flowfn-loader " + json.dumps(words) + "\n").encode()
def say(**words):
    os.write(1, line(**words))
def find(name):
    home = os.path.expanduser("~")
    places = os.environ.get("PATH", "").split(":") + [home + "/.local/bin", home + "/.cargo/bin"]
    return next((p + "/" + name for p in places if os.access(p + "/" + name, os.X_OK)), None)
def take(size):
    data = b""
    while len(data) < size:
        more = os.read(0, size - len(data))
        if not more:
            sys.exit(70)
        data += more
    return data
def hear():
    line = b""
    while not line.endswith(b"\n"):
        line += take(1)
    return json.loads(line.decode())
def main():
    cache = sys.argv[2] or os.environ.get("FLOW_CACHE")
    cache = cache or (os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) + "/flowfn"
    place = os.path.abspath(os.path.expanduser(cache)) + "/runtime"
    try:
        there = os.listdir(place)
    except OSError:
        there = []
    name = getattr(getattr(sys, "implementation", None), "name", "?")
    python = list(sys.version_info[:3])
    ask = hear()
    early = take(ask["then"])  # it was sent before anything was known of this Python
    lacks = ask["python"] != python[:2] + [name] or ask["digest"] not in there
    if lacks or not early:  # else all is said together later: the second of two small messages may be held back
        say(python=python, implementation=name, executable=sys.executable, uv=find("uv"), runtimes=there)
    if lacks:
        early = b""
        ask = hear()
    if ask.get("uv"):
        import subprocess
        def uv(verb, *more):
            words = [ask["uv"], "--no-cache", "python", verb] + list(more) + [ask["python"]]
            pipe = subprocess.PIPE
            with open(os.devnull) as null:
                process = subprocess.Popen(words, stdin=null, stdout=pipe, stderr=pipe)
            said = [part.decode("utf-8", "replace").strip() for part in process.communicate()]
            return said[0] if not process.returncode else "", said[1][-1000:]
        found, words = uv("find", "--no-project")
        if not found:
            words = uv("install")[1]
            found = uv("find", "--no-project")[0]
        if not found:
            say(unobtainable=words)
            sys.exit(69)
        os.execv(found, [found, "-c", ask["start"]] + sys.argv[1:])
    if sys.argv[2]:
        os.environ["FLOW_CACHE"] = os.path.abspath(os.path.expanduser(cache))
    place = place + "/" + ask["digest"]
    if ask["size"]:
        import hashlib, io, shutil, tempfile, zipfile
        data = take(ask["size"])
        if hashlib.sha256(data).hexdigest() != ask["sha256"]:
            raise ValueError("the runtime arrived damaged")
        try:
            os.makedirs(os.path.dirname(place), 0o700)
        except OSError:
            if not os.path.isdir(os.path.dirname(place)):  # else it was there, or somebody else was faster
                raise
        new = tempfile.mkdtemp(dir=os.path.dirname(place))
        try:
            zipfile.ZipFile(io.BytesIO(data)).extractall(new)
            os.rename(new, place)
        except BaseException:
            shutil.rmtree(new, True)
            if not os.path.isdir(place):
                raise
    os.utime(place)
    sys.path.insert(0, place)
    return early
try:
    heard = main()
except Exception as error:
    say(error=type(error).__name__ + ": " + str(error))
    sys.exit(70)
sys.dont_write_bytecode = False  # in a directory of ours, for the next start; the worker has it as it was
from flowfn_runtime import bootstrap
bootstrap.main(line(loaded=sys.executable), heard)
"""
# Nothing from the working directory may stand in for a module of the standard library.
START = "import sys; sys.path[:] = [p for p in sys.path if p]; exec(sys.argv[1])"

# A version manager's stand-in for a Python that is not installed is no Python: hence the trial. It is a script; what is
# none, and is called by the version, need not be tried.
_SEARCH = """PATH="$PATH:$HOME/.local/bin:$HOME/.cargo/bin"
if p=$(command -v python%(v)s) && [ -x "$p" ] && IFS= read -r first <"$p"; then
  case $first in "#!"*) ;; *) exec "$p" -c "$0" "$@" ;; esac
fi
for p in python%(v)s python3 python; do
  "$p" -c "import sys; sys.exit(sys.version_info[:2] != (%(t)s))" </dev/null >/dev/null 2>&1 && exec "$p" -c "$0" "$@"
done
for p in python3 python; do
  "$p" -c "" </dev/null >/dev/null 2>&1 && exec "$p" -c "$0" "$@"
done
if command -v uv >/dev/null 2>&1; then
  find="uv --no-cache python find --no-project %(v)s"
  p=$($find 2>/dev/null </dev/null) ||
    p=$(uv --no-cache python install --quiet %(v)s </dev/null >&2 && $find </dev/null)
  [ -n "$p" ] && exec "$p" -c "$0" "$@"
fi
echo "%(mark)s{\\"missing\\": true}"
exit 69
"""


def program(python: str | None = None, *, cache: str | None = None) -> list[str]:
    """The command line to start on the other side. It holds nothing secret.

    `python`: the interpreter there; None has a shell look for one of this Python's version. `cache`: the directory
    there that keeps the runtime and all else that travels; None leaves it to FLOW_CACHE there, or ~/.cache/flowfn.
    """
    return starting(START, _LOADER.strip("\n"), cache or "", python=python)


def starting(text: str, *arguments: str, python: str | None = None) -> list[str]:
    """The command line that has a program run by `python` there, or by one of this version that a shell looks for.

    If only others are found, one of these runs it.
    """
    if python is not None:
        return [python, "-c", text, *arguments]
    major, minor = sys.version_info[:2]
    search = _SEARCH % {"v": f"{major}.{minor}", "t": f"{major}, {minor}", "mark": MARK.replace('"', '\\"')}
    return ["/bin/sh", "-c", search, text, *arguments]
