"""What comes over the network: Weights & Biases, and weights with their caches."""

from __future__ import annotations

import os
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.error import HTTPError

from tlx.doctor.findings import Finding, of_error, ok, warning
from tlx.doctor.storage import nearest

if TYPE_CHECKING:
    from tlx.plan.config import Config

_ANSWER_S = 4.0
_SYNC = "tlx track sync RUN"


def tracking(config: Config | None, env: Mapping[str, str]) -> Iterator[Finding]:
    """How W&B would be used, as :func:`tlx.tracking.trackers.wandb` decides it. The key is never shown."""
    part = next((t for t in config.track.trackers if t.name == "wandb"), None) if config is not None else None
    if config is not None and part is None:
        yield ok("W&B", "not used by this configuration (track.trackers)")
        return
    asked = (part.args.get("mode") if part is not None else None) or env.get("WANDB_MODE") or None
    if asked in ("disabled", "offline", "dryrun"):
        later = "" if asked == "disabled" else f"; later: {_SYNC}"
        yield ok("W&B", f"{asked}, as asked for{later}")
        return
    from tlx.base.location import without_credentials
    from tlx.tracking import wandb_run

    wandb_run.forget_empty_variables()
    try:
        key = wandb_run.has_key()
        import wandb

        server = str(wandb.setup().settings.base_url)
    finally:
        wandb_run.let_go()
    why = None if not key and asked is None else unanswered(server)
    yield judge_tracking(asked, key, without_credentials(server), why)


def judge_tracking(asked: str | None, key: bool, server: str, unanswered: str | None) -> Finding:
    """
    Args:
        asked: `mode` of the configuration, or WANDB_MODE.
        unanswered: why the server is not reached; None where it is, or was not asked.
    """
    if not key and asked is None:
        return ok("W&B", f"offline: there is no key (wandb login sets one); later: {_SYNC}")
    if not key:
        todo = f"wandb login, or set WANDB_API_KEY; or WANDB_MODE=offline and later {_SYNC}"
        return warning("W&B", f"{asked} is asked for, and there is no key", todo)
    if unanswered is not None:
        said = f"there is a key, and {server} does not answer ({unanswered}): starts are logged offline"
        return warning(
            "W&B", said, f"a proxy (HTTPS_PROXY)? Else WANDB_MODE=offline, and later, with a network: {_SYNC}"
        )
    return ok("W&B", f"online: there is a key, and {server} answers")


def unanswered(url: str) -> str | None:
    """Why nothing answers at a URL; None where anything does, an error of HTTP included."""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=_ANSWER_S).close()
    except HTTPError as error:
        error.close()
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return str(getattr(reason, "strerror", None) or reason or type(error).__name__)[:200]
    return None


def caches() -> Iterator[Finding]:
    """The folders that weights are looked for in."""
    import torch
    from huggingface_hub import constants

    from tlx.models.weights import local_weights as shelf

    absent = [str(folder) for folder in shelf.folders() if not folder.is_dir()]
    if absent:
        said = f"{shelf.VARIABLE} names {', '.join(absent)}, which is no folder here"
        yield warning("weights folder", said, "correct the variable, or mount the folder on this node")
    elif shelf.folders():
        counts = [f"{f} ({len(list(f.glob('*.safetensors')))} files)" for f in shelf.folders()]
        yield ok("weights folder", f"{shelf.VARIABLE}: {', '.join(counts)}")
    places = {"the hub's": Path(constants.HF_HUB_CACHE), "torch.hub's": Path(torch.hub.get_dir())}
    shown = []
    for whose, place in places.items():
        here = nearest(place)
        writable = here.is_dir() and os.access(here, os.W_OK | os.X_OK)
        shown.append(f"{whose} {place}{'' if place.is_dir() else ' (not there yet)'}")
        if not writable:
            yield warning(
                "weights cache",
                f"{place} cannot be written: nothing can be downloaded to it",
                "set HF_HOME and TORCH_HOME to writable folders; weights that are there already are read",
            )
    yield ok("weights cache", ", ".join(shown))


def weights(config: Config | None) -> Iterator[Finding]:
    """Whether the weights of the backbone are on this machine and fit, without asking anybody; else whether they can
    be had."""
    from huggingface_hub import constants

    from tlx.base.errors import UserError
    from tlx.base.location import without_credentials
    from tlx.base.reachable import reachable

    server = constants.ENDPOINT
    shown = without_credentials(server)
    if config is None:
        there = reachable(server)
        said = f"{shown} answers" if there else f"{shown} does not answer: weights must be on this machine"
        yield ok("internet", said)
        return
    try:
        yield ok("weights", load(config, *_classes(config)))
    except UserError as error:
        from tlx.models.weights.download import NotHere

        broken = of_error("weights", error, "see backbone.weights in configs/README.md")
        if not isinstance(error.__cause__, NotHere) or constants.HF_HUB_OFFLINE or not reachable(server):
            yield broken
        else:
            said = f"{error.where} is not on this machine; {shown} answers, so training would download it at its start"
            yield replace(broken, verdict="warning", said=f"{said}. Compute nodes may have no internet")


def _classes(config: Config) -> tuple[int, Sequence[str] | None]:
    """How many, for a backbone of the user's own, which may want the right number, and their names, for a head that is
    kept; any number will do where there are no shards."""
    from tlx.base.errors import UserError
    from tlx.train.data import count_samples, known_names

    try:
        samples = count_samples(config)
    except UserError:  # the finding on the shards says why
        return 2, None
    return samples.classes, known_names(config, samples)


def load(config: Config, classes: int, names: Sequence[str] | None = None) -> str:
    """Loads the backbone as training does, without a network; says where its weights were.

    Args:
        names: of the classes, where they are known.

    Raises:
        UserError: they are not on this machine (with the command that fetches them), are damaged or do not fit.
    """
    from tlx.models.weights import download
    from tlx.train.components import backbone_of

    if config.backbone.weights == "none" and not config.keeps_head:
        return f"{config.backbone.name} begins with random ones (backbone.weights=none)"
    with download.without_network():
        backbone = backbone_of(config, classes, names=names)
    return str(backbone.loaded) if backbone.loaded else f"{config.backbone.name} needs none"
