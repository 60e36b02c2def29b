"""`tlx weights`: pretrained weights for machines without internet."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tlx.base.paths import written
from tlx.base.terminal import as_courtesy, say
from tlx.cli.help import examples
from tlx.cli.words import path

weights = typer.Typer(
    help="Bring pretrained weights to machines without internet.", no_args_is_help=True, rich_markup_mode=None
)


@weights.command(
    epilog=examples(
        "tlx weights fetch timm/resnet50 torchvision/vgg16_bn --to weights",
        "tlx weights fetch timm/resnet50.tv_in1k",
        "tlx weights fetch torchvision/resnet50 --tag IMAGENET1K_V1",
        "tlx weights fetch hf-hub:OWNER/REPO@REVISION",
    )
)
def fetch(
    names: Annotated[list[str], typer.Argument(metavar="NAME", help="LIBRARY/NETWORK[.TAG] or hf-hub:OWNER/REPO.")],
    to: Annotated[
        Path | None, typer.Option(help="A folder; else the first of TLX_WEIGHTS, else ./weights.", parser=path)
    ] = None,
    tag: Annotated[str | None, typer.Option("--tag", "--weights", help="Which weights; the default ones.")] = None,
) -> None:
    """Download weights, one safetensors file each, into a folder that machines without internet read."""
    from tlx.models.weights import local_weights as shelf
    from tlx.models.weights.fetch import fetch as fetched

    as_courtesy()  # a reader that has enough is no reason to leave weights out
    folder = to or next(iter(shelf.folders()), Path("weights"))
    for one in fetched(names, folder, tag=tag):
        how = "was there already, kept" if one.kept else f"{one.path.stat().st_size / 2**20:.1f} MB"
        say(f"{one.path}: {how}")
        say(f"  backbone: {{name: {one.backbone or '...'}, weights: {written(one.path.absolute())}}}")
    if folder.absolute() not in [known.absolute() for known in shelf.folders()]:
        say(f"or, for all of them at once: export {shelf.VARIABLE}={folder.absolute()}")
