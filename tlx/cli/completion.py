"""`tlx completion`: what makes a shell ask :mod:`tlx.cli.complete` at <Tab>."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import typer

from tlx.base.errors import UserError, did_you_mean
from tlx.base.terminal import hand_over
from tlx.cli.help import examples

_BASH = """\
# tlx completion bash > ~/.local/share/bash-completion/completions/tlx
_tlx() {
    local IFS=$'\\n' line="${COMP_LINE:0:COMP_POINT}" current="${COMP_WORDS[COMP_CWORD]}" found
    # bash breaks words at = and :, and takes only what follows there
    [[ $current == [=:] ]] && current=""
    mapfile -t found < <(tlx --complete "$line" "$current" 2>/dev/null)
    COMPREPLY=("${found[@]}")
    if [[ ${found[0]} == "*" ]]; then
        COMPREPLY=()
        compopt -o default
    elif [[ ${found[0]} == *[=.] ]]; then
        compopt -o nospace
    fi
}
complete -F _tlx tlx
"""

_ZSH = """\
#compdef tlx
# tlx completion zsh > a folder of $fpath, as _tlx; or in ~/.zshrc: source <(tlx completion zsh)
_tlx() {
    local -a found open
    found=("${(@f)$(tlx --complete "${(j: :)words[1,CURRENT]}" 2>/dev/null)}")
    if [[ $found[1] == "*" ]]; then
        compset -P '*='
        _files
        return
    fi
    open=("${(@M)found:#*[=.]}")
    found=("${(@)found:#*[=.]}")
    (( $#open )) && compadd -S '' -- $open
    (( $#found )) && compadd -- $found
}
compdef _tlx tlx
"""

_FISH = """\
# tlx completion fish > ~/.config/fish/completions/tlx.fish
function __tlx
    set -l found (tlx --complete (commandline -cp) 2>/dev/null)
    if test "$found[1]" = "*"
        __fish_complete_path (string replace -r '^.*=' '' -- (commandline -ct))
    else
        printf '%s\\n' $found
    end
end
complete -c tlx -f -a '(__tlx)'
"""

_SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}

INSTALL = examples(
    "tlx completion bash > ~/.local/share/bash-completion/completions/tlx",
    "echo 'eval \"$(tlx completion bash)\"' >> ~/.bashrc",
    "tlx completion fish > ~/.config/fish/completions/tlx.fish",
    "echo 'source <(tlx completion zsh)' >> ~/.zshrc",
)


def completion(
    shell: Annotated[str, typer.Argument(metavar="bash|zsh|fish", help="The shell that reads the script.")],
) -> None:
    """Print what makes <Tab> complete commands, options, files and configuration keys in a shell."""
    if shell not in _SCRIPTS:
        raise UserError(f'there is no completion for "{shell}"{did_you_mean(shell, _SCRIPTS)}')
    hand_over(_SCRIPTS[shell], end="")


def table() -> dict[str, Any]:
    """Commands with their options, keys with their values: what :mod:`tlx.cli.complete` offers."""
    from tlx.base.plug import names
    from tlx.cli.main import app
    from tlx.plan import defaults
    from tlx.plan.reference import keys, parts

    below: dict[str, Any] = {}
    for key in keys():
        node: dict[str, Any] = {"below": below}
        for step in key.place.split("."):
            node = node["below"].setdefault(step, {"below": {}, "value": False})
        node["value"] = not key.kind.endswith("mapping") or "or" in key.kind
        values = (
            names(key.group) if key.group and not key.kind.startswith("list") else re.findall(r"`([^`]+)`", key.kind)
        )
        node["values"] = ["true", "false"] if key.kind == "true or false" else values
        if key.group and not key.kind.startswith("list"):
            for name in (argument[0] for part in parts(key.group) for argument in part.arguments):
                node["below"].setdefault(name, {"below": {}, "value": True})
    below["further"]["below"] = {"NAME": below["phases"]["below"]["NAME"]}
    phases = [name for schedule in ("two_phase", "head_only") for name in defaults.roles_of(schedule, {})]
    top = typer.main.get_command(app)
    return {"commands": _commands(top), "keys": below, "phases": list(dict.fromkeys(["each", *phases]))}


def _commands(group: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            found[name] = {"commands": _commands(command)}
            continue
        if command.hidden:
            continue
        options = {
            option: not getattr(one, "is_flag", False)
            for one in command.params
            if one.param_type_name == "option"
            for option in (*one.opts, *one.secondary_opts)
        }
        arguments = [one.name for one in command.params if one.param_type_name == "argument"]
        takes: Literal["keys", "changes", "files"] = "changes" if "overrides" in arguments else "files"
        choices = list(_SCRIPTS) if name == "completion" else []
        found[name] = {
            "options": {**options, "--help": False},
            "takes": "keys" if name == "config" else takes,
            "choices": choices,
        }
    return found
