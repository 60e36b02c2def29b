"""`tlx init`: from a folder of pictures to a configuration; and `tlx train FOLDER`, which begins with it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from tlx.base.errors import UserError
from tlx.base.launcher import environment
from tlx.base.terminal import as_courtesy, say
from tlx.cli.words import path

_NESTED = "A class is the path of folders to a picture, such as animal/dog; or the first of them."


def init(
    pictures: Annotated[
        Path, typer.Argument(metavar="PHOTOS", help="A folder per class, or train, val, test with these.", parser=path)
    ],
    backbone: Annotated[str | None, typer.Option(help="The network, see tlx models; by default a small one.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="By default NAME.yaml here.", parser=path)] = None,
    shards: Annotated[Path | None, typer.Option(metavar="DIR", help="By default shards/NAME.", parser=path)] = None,
    val: Annotated[float | None, typer.Option(help="Share of each class for validation; 0.2 if there is none.")] = None,
    nested: Annotated[bool | None, typer.Option("--nested/--no-nested", help=_NESTED)] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave unreadable pictures out, and name them.")] = False,
) -> None:
    """Look at pictures, build their shards, and write a configuration that says why it is as it is.

    Nothing is done twice: shards are built again only where the pictures have changed, into a new place. A
    configuration that is there stays.
    """
    from tlx.cli.shards import print_build
    from tlx.init.pictures import Wishes, build
    from tlx.init.start import refuse_unwritable, write

    as_courtesy()
    if out is not None:
        refuse_unwritable(out)
    found = build(pictures, Wishes(shards, val, nested, skip_bad), progress=True)
    print_build(found.built)
    begun = write(found, backbone, out=out)
    say(begun.plan)
    _say_next(begun.file, backbone, was_there=begun.was_there)


def _say_next(file: Path, backbone: str | None, *, was_there: bool) -> None:
    from tlx.plan.defaults import BACKBONE

    network = backbone or BACKBONE
    say(f"\n{file}{' was there already, and says the same' if was_there else ' is written'}. Next:")
    say(f"  tlx train {file}")
    if network.startswith(("timm/", "torchvision/")):
        say("  its weights are downloaded then; for a machine without internet, fetch them on another one:")
        say(f"  tlx weights fetch {network} --to weights   and there: export TLX_WEIGHTS=weights")


def configuration_of(pictures: Path, overrides: Sequence[str]) -> Path:
    """The file for `tlx train FOLDER`: the one of before, where the pictures are the same, or what `tlx init` writes.

    Raises:
        UserError: what `tlx init` would raise; several ranks, and no file yet.
    """
    from tlx.init.pictures import Wishes, build, refuse_others
    from tlx.init.start import backbone_in, existing, made_before, write

    refuse_others(pictures)
    backbone = backbone_in(overrides)
    if environment().size > 1:  # building may take longer than ranks wait for each other
        file = made_before(pictures, backbone)
        if file is None:
            todo = f"tlx init {pictures}{f' --backbone {backbone}' if backbone else ''}   and then the same command"
            raise UserError("several ranks train from shards, which one process builds", where=str(pictures), todo=todo)
        return file
    try:
        found = build(pictures, Wishes(), progress=True)
    except UserError as error:
        if error.todo is None or "--" not in error.todo:
            raise
        todo = f"{error.todo} (of tlx init {pictures}; then the same command)"
        raise UserError(error.what, where=error.where, todo=todo) from error
    file = existing(found.name, found.built.out, backbone)
    if file is not None:
        say(f"{file}, as it was made from {pictures} (shards: {found.built.out})", error=True)
        return file
    from tlx.cli.shards import print_build

    print_build(found.built)
    file = write(found, backbone).file
    say(f"{file} is written: what is trained, and why")
    return file
