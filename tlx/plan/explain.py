"""One key of a configuration, explained: what the reference says, an example, and its value in a configuration."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tlx.base import plug
from tlx.base.errors import UserError, did_you_mean
from tlx.base.key_aliases import USUAL, right_key
from tlx.base.parsing import to_yaml
from tlx.base.terminal import escaped
from tlx.plan import config as configs
from tlx.plan.config import Config, plain
from tlx.plan.reference import Key, PartText, keys, parts

_EXAMPLES = {
    "integer": "8",
    "number": "0.1",
    "length": "8ep",
    "time": "3h55m",
    "bytes": "200GB",
    "path": "folder",
    "true or false": "true",
}
"""A value of each type, by how the type begins in the reference."""

_OWN_EXAMPLES = {
    "backbone": "timm/resnet50",
    "backbone.name": "timm/resnet50",
    "backbone.weights": "runs/earlier",
    "backbone.trust": "true",
    "data.bad_samples": "1%",
    "evaluate.probe": "shards/labelled",
    "data.expected": "{train: 1020, classes: 102}",
    "data.test": "shards/test",
    "data.train": "shards/train",
    "data.val": "shards/val",
    "evaluate.metric": "val/top1",
    "input.channels": "1",
    "input.mean": "[0.5, 0.5, 0.5]",
    "input.size": "384",
    "input.std": "[0.5, 0.5, 0.5]",
    "phases.NAME.lr": "1e-3",
    "run": "runs/other",
}
"""Values that say more than any of their type."""

_TOGETHER = (
    "data.expected.",
    "evaluate.probe.",
    "phases.NAME.duration.",
    "phases.NAME.before.",
    "data.cache.stage",
    "data.sampling.thres",
)
"""Begin keys that mean something beside others alone."""


def explain(word: str) -> str:
    """What a key means, and where it may stand; of a part's argument too.

    Raises:
        UserError: no such key, with those that are near.
    """
    key, rest = _found(word)
    if key is None:
        return _of_group(word)
    if rest:
        return _argument(key, word, rest)
    lines = [f"{word}", *_about(key.kind, key.default), *([f"  {_text(key.meaning)}"] if key.meaning else [])]
    if key.place.startswith("phases.NAME."):
        name = key.place.removeprefix("phases.NAME.")
        lines.append(f"  stands in: phases.each.{name}, of all phases; phases.PHASE.{name} and further.PHASE.{name}")
    lines += _below(key)
    if key.group:
        lines += ["", f"Parts, as {word}=NAME, and their arguments, as {_first_argument(word, key)}:"]
        lines += [line for part in parts(key.group) for line in _part(part)]
    example = example_of(key)
    return "\n".join(
        [*lines, *(["", f"Example: tlx train CONFIG {_as_typed(word, key)}={example}"] if example else [])]
    )


def value_in(path: Path, word: str, overrides: Sequence[str] = ()) -> str:
    """The value of a key in a configuration, and who said it.

    Raises:
        UserError: no such file or key; ConfigError: mistakes in it.
    """
    key, rest = _found(word)
    if key is None:
        raise _unknown(word)
    config, raw = configs.load(path, overrides, libraries=False), configs.read(path, overrides)
    steps = _names(word, raw, config)
    if len(steps) > 2 and steps[0] == "phases":
        phase, name = steps[1], steps[2]
        settings = config.settings(phase).model_dump(mode="json")
        value, who = _at(settings, steps[2:]), _who_says(config, raw, phase, name)
    else:
        value, said = _at(plain(config), steps), _is_said(raw, steps)
        derived = steps == ["run"] or key.default in ("`null`", "")
        who = (
            "from the file" if said else "worked out from the rest" if derived and value is not None else "the default"
        )
        who = "from the command line" if any(o.partition("=")[0] == word for o in overrides) else who
    shown = to_yaml(value, flow=True).strip()
    if rest and value is None:
        part = _at(plain(config), steps[:-1])
        shown = _default_of(key, part.get("name") if isinstance(part, Mapping) else part, rest[-1])
    return f"{escaped(word)}: {escaped(shown)}  ({who})"


def _default_of(key: Key, part: Any, argument: str) -> str:
    """Of a part's argument, where the configuration says nothing of it."""
    taken = [one for known in parts(key.group) if known.name == part for one in known.arguments]
    return next((_text(default) for name, _, default in taken if name == argument), "null")


def listing() -> Iterator[tuple[str, str, str]]:
    """Every key, its default, and what it means, in short."""
    for key in keys():
        yield key.place, _text(key.default), re.split(r"(?<=[.;:]) ", _text(key.meaning))[0].rstrip(".;:")


def example_of(key: Key) -> str:
    """A value that a person might give the key; empty where there is none to tell."""
    kind, default = _text(key.kind), _text(key.default)
    if key.place in _OWN_EXAMPLES or key.place.startswith(_TOGETHER):
        return _OWN_EXAMPLES.get(key.place, "")
    if key.group:
        ready = [part.name for part in parts(key.group) if all(default for _, _, default in part.arguments)]
        return f"[{ready[0]}]" if kind.startswith("list") else ready[-1]
    choices = re.findall(r"`([^`]+)`", key.kind)
    if choices:
        other = next((choice for choice in choices if choice != default), choices[0])
        return f"[{other}]" if kind.startswith("list") else other
    if default not in ("null", "required", "", "{}", "[]", "false"):
        return default
    return next((value for begin, value in _EXAMPLES.items() if kind.startswith(begin)), "")


def _found(word: str) -> tuple[Key | None, list[str]]:
    """The key that a word leads to, and the steps after it: of a part's argument."""
    steps = word.split(".")
    known = {tuple(key.place.split(".")): key for key in keys()}
    known |= {("further", "NAME", *place[2:]): key for place, key in known.items() if place[:2] == ("phases", "NAME")}
    for end in range(len(steps), 0, -1):
        for place, key in known.items():
            if len(place) == end and all(a in ("NAME", b) for a, b in zip(place, steps, strict=False)):
                rest = steps[end:]
                return (key, rest) if not rest or key.group else (None, rest)
    return None, steps


def _argument(key: Key, word: str, rest: Sequence[str]) -> str:
    """What is below a part: the part in a list, by its number or name, and an argument."""
    of_group = {part.name: part for part in parts(key.group)}
    in_list = rest[0].isdecimal() or rest[0] in of_group
    if in_list and len(rest) == 1:
        named = [of_group[rest[0]]] if rest[0] in of_group else list(of_group.values())
        return "\n".join([word, *(line for part in named for line in _part(part))])
    chosen = [of_group[rest[0]]] if rest[0] in of_group else list(of_group.values())
    name = rest[1] if in_list else rest[0]
    takers = [(part, kind, default) for part in chosen for at, kind, default in part.arguments if at == name]
    if not takers:
        near = did_you_mean(name, sorted({at for part in chosen for at, _, _ in part.arguments}))
        raise UserError(f'no {key.group} has an argument "{name}"{near}', where=word, todo=f"tlx config {key.place}")
    lines = [f"{word}: argument of a part ({key.group})"]
    for part, kind, default in takers:
        lines += [f"  of {part.name}: {_text(kind)}" + (f", default {_text(default)}" if default else ", required")]
        lines += [f"    {_text(part.meaning)}"]
    return "\n".join(lines)


def _of_group(word: str) -> str:
    """All parts of a group, or one part, where a word names these."""
    for group in (group for group, module in plug.GROUPS.items() if module):
        known = parts(group)
        places = ", ".join(key.place for key in keys() if key.group == group)
        if word == group:
            return "\n".join([f"{group}: a part ({places})", *(line for part in known for line in _part(part))])
        for part in known:
            if part.name == word:
                return "\n".join([f"{word}: a {group} ({places})", *_part(part)])
    raise _unknown(word)


def _unknown(word: str) -> UserError:
    places = [key.place.replace("NAME", "each") for key in keys() if ".before." not in key.place]
    last = [place for place in places if place.rpartition(".")[2] == word]
    near = f"; did you mean {' or '.join(f'{chr(34)}{place}{chr(34)}' for place in last)}?" if last else ""
    near = near or right_key(word, keys=USUAL) or did_you_mean(word, places)
    return UserError(f'there is no key "{word}"{near}', todo="tlx config lists them all")


def _about(kind: str, default: str) -> list[str]:
    return [f"  type: {_text(kind)}", *([f"  default: {_text(default)}"] if default else [])]


def _below(key: Key) -> list[str]:
    """The keys of a mapping."""
    begins = tuple(f"{key.place}.{between}" for between in ("NAME.", ""))
    own = [one for one in keys() if one.place.startswith(begins)]
    return ["", "Keys in it:", *(f"  {one.place}: {_text(one.kind)}" for one in own)] if own else []


def _part(part: PartText) -> list[str]:
    said = (
        f"{name}: {_text(kind)}" + (f" = {_text(default)}" if default else "") for name, kind, default in part.arguments
    )
    return [f"  {part.name}: {_text(part.meaning)}", *(f"    {argument}" for argument in said)]


def _first_argument(word: str, key: Key) -> str:
    name = next((one.arguments[0][0] for one in parts(key.group) if one.arguments), "ARGUMENT")
    return f"{word}.0.{name}=..." if _text(key.kind).startswith("list") else f"{word}.{name}=..."


def _as_typed(word: str, key: Key) -> str:
    return word.replace("NAME", "each") if "NAME" in key.place else word


def _text(markdown: str) -> str:
    """Without the signs of Markdown and of docstrings."""
    plain_text = re.sub(r"\[([^\]]+)\]\(#[^)]*\)", r"\1", markdown)
    return " ".join(re.sub(r":\w+:|`", "", plain_text).split())


def _names(word: str, raw: Mapping[str, Any], config: Config) -> list[str]:
    """The steps of a key; a phase's name may hold dots."""
    for root in ("phases", "further"):
        for name in sorted({*config.phase_names, *(raw.get(root) or {})}, key=len, reverse=True):
            if word.startswith(f"{root}.{name}."):
                return [root, name, *word.removeprefix(f"{root}.{name}.").split(".")]
    return word.split(".")


def _at(value: Any, steps: Sequence[str]) -> Any:
    for step in steps:
        if isinstance(value, list) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        elif isinstance(value, list):
            value = next((one for one in value if isinstance(one, Mapping) and one.get("name") == step), None)
        else:
            value = value.get(step) if isinstance(value, Mapping) else None
    return value


def _is_said(raw: Any, steps: Sequence[str]) -> bool:
    for step in steps:
        if not isinstance(raw, Mapping) or step not in raw:
            return isinstance(raw, list) or (raw is not None and not isinstance(raw, Mapping))
        raw = raw[step]
    return True


def _who_says(config: Config, raw: Mapping[str, Any], phase: str, name: str) -> str:
    """Where a setting of a phase comes from."""
    said = raw.get("phases") or {}
    for at in dict.fromkeys((phase, "each")):
        if isinstance(said.get(at), Mapping) and name in said[at]:
            return f"from the file, phases.{at}.{name}"
    if name in config.unsaid(phase):
        return "from the table of defaults, tlx/plan/defaults.py"
    return "the default"
