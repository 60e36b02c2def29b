"""What the Hugging Face hub refuses, in words a user can act on: of weights and of data sets."""

from __future__ import annotations

import huggingface_hub as hub

from tlx.base.errors import UserError
from tlx.base.location import scrubbed


def hub_error(error: Exception, where: str) -> UserError:
    """What is said of an error of the hub's client."""
    from huggingface_hub.errors import (  # with an HTTP client, which plans do not wait for
        EntryNotFoundError,
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    log_in, line = "hf auth login, or set HF_TOKEN", scrubbed(line_of(error), hub.constants.ENDPOINT)
    if isinstance(error, GatedRepoError):
        return UserError(
            "a gated repository: its terms must be accepted first, on its page", where=where, todo=f"then {log_in}"
        )
    if isinstance(error, RepositoryNotFoundError):
        return UserError("no such repository, or a private one", where=where, todo=f"if it is private, {log_in}")
    if isinstance(error, RevisionNotFoundError):
        return UserError("no such revision", where=where, todo="a branch, a tag or a commit of the repository")
    if isinstance(error, EntryNotFoundError):
        return UserError(line, where=where)
    return UserError(f"cannot be downloaded: {line}", where=where, todo="try again later")


def line_of(error: Exception) -> str:
    """The first line of what an error says; its name where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
