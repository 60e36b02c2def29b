"""The folder of a build: what ``build.json`` says of it, and what an interrupted build has left in it."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from tlx.base import locks
from tlx.base.errors import UserError
from tlx.base.files import is_left, write_whole
from tlx.base.parsing import from_json
from tlx.base.terminal import say
from tlx.data.build.build_parts import FILES as PARTS
from tlx.data.build.sources import SPLITS
from tlx.data.shards.passed_over import SYSTEM, kind_of_name

FORMAT = 1
_NOTES = "*/.[0-9]*.json"
_STATE = {"state": str, "request": dict, "pictures": str, "classes": list}  # what build.json always says
_DONE = {"splits": dict, "bad": list, "left_out": list}  # and when it is done
_COUNTS = ("samples", "shards", "bytes")  # of a split
_OURS = re.compile(rf"\.build\.json\..+\.tmp|{re.escape(locks.FILE)}|\.nfs[0-9a-f]+")  # NFS: removed, and still open
_SHARD = re.compile(r"\.+(?P<shard>[0-9]+)\.(tar|json)\..+\.tmp")


def state_of(folder: Path) -> dict[str, Any] | None:
    """What ``build.json`` says; None where nothing was begun.

    Raises:
        UserError: a file, a folder with other things in it, or a ``build.json`` that is damaged or of another tlx.
    """
    if not folder.exists():
        return None
    if not folder.is_dir():
        raise UserError("this is a file", where=str(folder), todo="name a new folder")
    try:
        state: Any = from_json((folder / "build.json").read_bytes())
    except FileNotFoundError:
        inside = {p.name for p in folder.iterdir()}
        if (folder / "build.json").exists():  # since a moment
            return state_of(folder)
        # a build at its very beginning, or killed there, has only its lock and the file that it is about to rename
        if any(not _OURS.fullmatch(name) and kind_of_name(name) != SYSTEM for name in inside):
            raise UserError(
                "the folder is not empty and was not made by tlx shards build", where=str(folder), todo="name a new one"
            ) from None
        return None
    except ValueError as error:
        raise damaged(folder, str(error)) from error
    if not isinstance(state, dict) or "format" not in state:
        raise damaged(folder, "it holds something else")
    if state["format"] != FORMAT:
        raise UserError(f"built by another version of tlx (format {str(state['format'])[:40]})", where=str(folder))
    wanted = {**_STATE, **(_DONE if state.get("state") == "done" else {})}
    lost = [name for name, kind in wanted.items() if not isinstance(state.get(name), kind)]
    if lost:
        raise damaged(folder, f"it lacks {', '.join(lost)}")
    done = state["state"] == "done"
    texts = [*state["classes"], *((*state["bad"], *state["left_out"]) if done else ())]
    if not all(isinstance(t, str) for t in texts) or (done and not all(map(_is_split, state["splits"].items()))):
        raise damaged(folder, "it holds something else")
    return state


def _is_split(said: tuple[str, Any]) -> bool:
    """Whether it is the name of a split, so that no other folder is looked into, and what is said of one."""
    name, counts = said
    if name not in SPLITS.values() or not isinstance(counts, dict):
        return False
    return all(type(counts.get(c)) is int and 0 <= counts[c] < 1 << 63 for c in _COUNTS)


def damaged(folder: Path, why: str) -> UserError:
    """What is said of a ``build.json`` that cannot be used."""
    return UserError(f"not a build of tlx: {why}", where=str(folder / "build.json"), todo="name a new folder")


def same_request(
    folder: Path, state: Mapping[str, Any], request: Mapping[str, Any], usual: Mapping[str, Any], what: str
) -> None:
    """
    Args:
        usual: options that were not asked for.
        what: the folder holds, where it is another request's.

    Raises:
        UserError: another request; with what differs.
    """
    # options that did not exist then, or are not written down, were what is usual now
    there, now = {**usual, **state["request"]}, {**usual, **request}
    differ = [f"{k}: {there.get(k)} there, {v} now" for k, v in now.items() if there.get(k) != v]
    if differ:
        raise UserError(
            f"the folder {what} ({'; '.join(differ)})", where=str(folder), todo="name a new folder, or remove this one"
        )


def claim(folder: Path, plan: Mapping[str, Any], usual: Mapping[str, Any]) -> None:
    """Makes the folder ours; what an interrupted build of other pictures left is removed.

    Raises:
        UserError: it holds another request's.
    """
    state = state_of(folder)
    if state:
        same_request(folder, state, plan["request"], usual, "holds an interrupted build of another request")
    if state and state["pictures"] != plan["pictures"]:
        tars = list(folder.glob("*/[0-9]*.tar"))
        say(
            f"warning: {folder}: an interrupted build of other pictures is begun anew; "
            f"removed: {len(tars)} shard{'' if len(tars) == 1 else 's'} of it",
            error=True,
        )
        for made in [*tars, *folder.glob(_NOTES)]:
            made.unlink(missing_ok=True)
    _remove_scratch(folder)
    write_whole(folder / "build.json", json.dumps({**plan, "state": "building"}, indent=1).encode())


def claim_for_a_part(folder: Path, plan: Mapping[str, Any], usual: Mapping[str, Any]) -> None:
    """The same, where others may be writing other shards: nothing is removed.

    Raises:
        UserError: it holds another request's, or other pictures.
    """
    state = state_of(folder)
    if state is None:
        write_whole(folder / "build.json", json.dumps({**plan, "state": "building"}, indent=1).encode())
        return
    same_request(folder, state, plan["request"], usual, "holds an interrupted build of another request")
    if state["pictures"] != plan["pictures"]:
        raise UserError(
            "the source has changed since parts of it were built here",
            where=str(folder),
            todo="remove this folder, or build into a new one",
        )


def remove_what_was_left(folder: Path, shards: Collection[tuple[str, str]]) -> None:
    """Removes what processes that are gone were at writing of these shards: (split, name without ``.tar``)."""
    for path in folder.glob("*/.*.tmp"):
        named = _SHARD.fullmatch(path.name)
        if named and (path.parent.name, named["shard"]) in shards and is_left(path):
            path.unlink(missing_ok=True)


def _remove_scratch(folder: Path) -> None:
    for path in [*folder.glob("*/.*.tmp"), *folder.glob("*/targets/.*.tmp"), *folder.glob(".*.*.tmp")]:
        if is_left(path):
            path.unlink(missing_ok=True)


def tidy(folder: Path) -> None:
    """Removes what a finished build does not need: notes on shards, locks, what processes that are gone left."""
    _remove_scratch(folder)
    for left in [*folder.glob(_NOTES), *folder.glob(PARTS), folder / locks.FILE]:
        left.unlink(missing_ok=True)
