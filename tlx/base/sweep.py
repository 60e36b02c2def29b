"""Which trial of a sweep this process is, as its agent says in the environment."""

from __future__ import annotations

import re
from collections.abc import Mapping

from tlx.base.errors import UserError, did_you_mean

VARIABLE = "WANDB_RUN_ID"
_PLACE = re.compile(r"(?<!\$)\{trial\}")  # ${trial} is a variable


def with_trial(path: str, env: Mapping[str, str]) -> str:
    """A path in which ``{trial}`` stands for the id that a sweep's agent has given to this trial, so that each has a
    folder of its own and comes back to it.

    The agent hands the id to every process below it, so that it is the same on all ranks.

    Raises:
        UserError: nobody has given one, it cannot be a folder's name, or the placeholder is misspelt.
    """
    for word in re.findall(r"(?<!\$)\{(\w+)\}", path):
        if word != "trial" and (near := did_you_mean(word, ["trial"])).startswith("; did"):
            raise UserError(f'there is no "{{{word}}}" to fill in{near}')
    if not _PLACE.search(path):
        return path
    trial = env.get(VARIABLE, "")
    if not trial:
        raise UserError(
            f"{{trial}} is the id of a sweep's trial, and {VARIABLE} says none: start this with `wandb agent SWEEP`, "
            "or set run to a folder, run=runs/NAME"
        )
    if "/" in trial or trial in (".", "..") or not trial.isprintable():
        raise UserError(f"{{trial}}: {VARIABLE}={trial!a} cannot be a folder's name")
    return _PLACE.sub(lambda _: trial, path)
