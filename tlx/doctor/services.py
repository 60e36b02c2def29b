"""Weights: whether they are on this machine, or can be had. `wandb verify` tells about Weights & Biases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tlx.doctor.findings import Finding, of_error, ok

if TYPE_CHECKING:
    from tlx.models import Outputs
    from tlx.plan.config import Config


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
        yield ok("weights", load(config, *_outputs(config)))
    except UserError as error:
        from tlx.models.weights.download import NotHere

        broken = of_error("weights", error, "see backbone.weights in configs/README.md")
        if not isinstance(error.__cause__, NotHere) or constants.HF_HUB_OFFLINE or not reachable(server):
            yield broken
        else:
            said = f"{error.where} is not on this machine; {shown} answers, so training would download it at its start"
            yield replace(broken, verdict="warning", said=f"{said}. Compute nodes may have no internet")


def _outputs(config: Config) -> tuple[Outputs, Sequence[str] | None, Mapping[str, Any] | None]:
    """How many, for a backbone of the user's own, which may want the right number, and their names and scale, for a
    head that is kept; any number will do where there are no shards."""
    from tlx.base.errors import UserError
    from tlx.tasks import outputs_of
    from tlx.train.components import task_of, unknown_outputs
    from tlx.train.data import count_samples, known_names, known_scale

    try:
        samples = count_samples(config)
        task = task_of(config, samples)
    except UserError:  # the finding on the shards says why
        return unknown_outputs(config), None, None
    return outputs_of(task), known_names(config, samples, task), known_scale(samples, task)


def load(
    config: Config,
    outputs: int | Outputs,
    names: Sequence[str] | None = None,
    scale: Mapping[str, Any] | None = None,
) -> str:
    """Loads the backbone as training does, without a network; says where its weights were.

    Args:
        names, scale: of the outputs, where they are known.

    Raises:
        UserError: they are not on this machine (with the command that fetches them), are damaged or do not fit.
    """
    from tlx.models.weights import download
    from tlx.train.components import backbone_of

    if config.backbone.weights == "none" and not config.keeps_head:
        return f"{config.backbone.name} begins with random ones (backbone.weights=none)"
    with download.without_network():
        backbone = backbone_of(config, outputs, names=names, scale=scale)
    return str(backbone.loaded) if backbone.loaded else f"{config.backbone.name} needs none"
