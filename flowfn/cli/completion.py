"""`flow completion`."""

from __future__ import annotations

from typing import Any

SUMMARY = "print the completion script of a shell"
EXAMPLES = """\
  source <(flow completion bash)                                 in ~/.bashrc
  source <(flow completion zsh)                                  in ~/.zshrc, after compinit
  flow completion fish > ~/.config/fish/completions/flow.fish    once
"""

# Which verbs take a task; the names of tasks come from `flow completion --tasks`.
_TASK_VERBS = ("status", "logs", "wait", "result", "cancel", "shell", "rm")

_BASH = """\
_flow() {
    local words="${COMP_WORDS[*]:1:1}" current="${COMP_WORDS[COMP_CWORD]}"
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W "@VERBS@" -- "$current"))
        return
    fi
    case "$current" in
    -*)
        case "$words" in
@OPTIONS@
        esac
        return ;;
    esac
    case "$words" in
    @TASKS@) COMPREPLY=($(compgen -W "$(flow completion --tasks 2>/dev/null)" -- "$current")) ;;
    volume) [ "$COMP_CWORD" -eq 2 ] && COMPREPLY=($(compgen -W "create ls rm du" -- "$current")) ;;
    completion) COMPREPLY=($(compgen -W "bash zsh fish" -- "$current")) ;;
    *) COMPREPLY=($(compgen -f -- "$current")) ;;
    esac
}
complete -o filenames -F _flow flow
"""
_ZSH = """\
#compdef flow
_flow() {
    local -a verbs
    verbs=(
@DESCRIBED@
    )
    if (( CURRENT == 2 )); then
        _describe verb verbs
        return
    fi
    case "$PREFIX" in
    -*)
        case "$words[2]" in
@OPTIONS@
        esac
        return ;;
    esac
    case "$words[2]" in
    @TASKS@) compadd -- ${(f)"$(flow completion --tasks 2>/dev/null)"} ;;
    volume) (( CURRENT == 3 )) && compadd create ls rm du ;;
    completion) compadd bash zsh fish ;;
    *) _files ;;
    esac
}
compdef _flow flow
"""


def add_arguments(parser: Any) -> None:
    parser.add_argument("shell", nargs="?", choices=["bash", "zsh", "fish"], help="whose script")
    parser.add_argument("--tasks", action="store_true", help="print the names of the newest tasks, for such a script")


def run(args: Any) -> int:
    if args.tasks:
        from flowfn import config
        from flowfn_runtime import taskdb

        for row in taskdb.list_tasks(config.load().project, limit=50):
            print(row.name)
        return 0
    from flowfn_runtime.errors import ValidationError

    if args.shell is None:
        raise ValidationError("name a shell: bash, zsh or fish", hint="source <(flow completion bash)")
    print({"bash": bash, "zsh": zsh, "fish": fish}[args.shell](), end="")
    return 0


def options() -> dict[str, list[tuple[list[str], str]]]:
    """Each verb's options, with what they say of themselves; of verbs that are there."""
    from importlib import import_module

    from . import VERBS, parser_of

    found = {}
    for verb in VERBS:
        try:
            module = import_module(f"flowfn.cli.{verb}")
        except ModuleNotFoundError:
            continue
        parser = parser_of(verb, module)
        found[verb] = [
            (action.option_strings, action.help or "") for action in parser._actions if action.option_strings
        ]
    return found


def bash() -> str:
    """The script for bash."""
    lines = [
        f'        {verb}) COMPREPLY=($(compgen -W "{_flags(given)}" -- "$current")) ;;'
        for verb, given in options().items()
    ]
    return _fill(_BASH, "\n".join(lines))


def zsh() -> str:
    """The script for zsh."""
    return _fill(_ZSH, "\n".join(f"        {verb}) compadd -- {_flags(given)} ;;" for verb, given in options().items()))


def fish() -> str:
    """The script for fish."""
    from . import VERBS

    lines = ["complete -c flow -f -n '__fish_use_subcommand'"]
    for verb, summary in VERBS.items():
        lines.append(f"complete -c flow -f -n '__fish_use_subcommand' -a {verb} -d {_quoted(summary)}")
    for verb, given in options().items():
        for flags, text in given:
            names = " ".join(f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}" for flag in flags)
            lines.append(f"complete -c flow -n '__fish_seen_subcommand_from {verb}' {names} -d {_quoted(text)}")
    tasks = " ".join(_TASK_VERBS)
    lines.append(f"complete -c flow -f -n '__fish_seen_subcommand_from {tasks}' -a '(flow completion --tasks)'")
    lines.append("complete -c flow -f -n '__fish_seen_subcommand_from volume' -a 'create ls rm du'")
    lines.append("complete -c flow -f -n '__fish_seen_subcommand_from completion' -a 'bash zsh fish'")
    return "\n".join(lines) + "\n"


def _fill(template: str, options_text: str) -> str:
    from . import VERBS

    described = "\n".join(f"        {_quoted(f'{verb}:{summary}')}" for verb, summary in VERBS.items())
    return (
        template.replace("@VERBS@", " ".join(VERBS))
        .replace("@OPTIONS@", options_text)
        .replace("@DESCRIBED@", described)
        .replace("@TASKS@", "|".join(_TASK_VERBS))
    )


def _flags(given: list[tuple[list[str], str]]) -> str:
    return " ".join(flag for flags, _text in given for flag in flags)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "") + "'"
