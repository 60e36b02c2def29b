"""`tlx shards`: from pictures to indexed WebDataset tars."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from tlx.data.check import SplitCounts

shards = typer.Typer(help="Build, index, check, show WebDataset shards.", no_args_is_help=True, rich_markup_mode=None)

Shards = Annotated[Path, typer.Argument(help="A folder of tars, or of folders of tars (train, val ...).")]
Jobs = Annotated[int | None, typer.Option(help="Processes; one per core by default.")]


@shards.command(epilog="Example: tlx shards build photos shards --val 0.2 --resize 256")
def build(
    src: Annotated[str, typer.Argument(help="Folder per class, CSV, or torchvision:NAME (torchvision:Flowers102).")],
    out: Annotated[Path, typer.Argument(help="Where the shards go.")],
    val: Annotated[float | None, typer.Option(help="Share of each class split off for validation.")] = None,
    seed: Annotated[int, typer.Option(help="Of the split and of the shuffle over shards.")] = 0,
    resize: Annotated[int | None, typer.Option(help="Make larger pictures smaller: the short side, in pixels.")] = None,
    quality: Annotated[int, typer.Option(help="Of JPEGs that were made smaller.")] = 95,
    shard_samples: Annotated[int, typer.Option(help="A shard holds at most so many pictures.")] = 1000,
    shard_mb: Annotated[int, typer.Option(help="And at most so many megabytes.")] = 256,
    skip_bad: Annotated[bool, typer.Option(help="Leave unreadable pictures out, and name them.")] = False,
    root: Annotated[str | None, typer.Option(help="Where torchvision's data set lies.")] = None,
    download: Annotated[bool, typer.Option(help="Let torchvision download it there.")] = False,
    variant: Annotated[str | None, typer.Option(help="Of the splits: article, for Flowers102.")] = None,
    jobs: Jobs = None,
) -> None:
    """Write shards from a folder per class, a CSV (path,label[,split]) or a torchvision data set."""
    from tlx.data.write import BuildOptions, build_shards

    options = BuildOptions(
        val=val,
        seed=seed,
        shard_samples=shard_samples,
        shard_bytes=shard_mb << 20,
        resize=resize,
        quality=quality,
        skip_bad=skip_bad,
        jobs=jobs,
        root=root,
        download=download,
        variant=variant,
    )
    done = build_shards(src, out, options, progress=True)
    for name in done.bad:
        print(f"left out, unreadable: {name}", file=sys.stderr)
    for name in done.left_out:
        print(f"left out, no picture: {name}", file=sys.stderr)
    for split, made in done.splits.items():
        size = made["bytes"] / 2**20
        print(f"{out / split}: {made['samples']:,} samples in {made['shards']} shards, {size:.1f} MB")
    how = "was there already, nothing done" if done.already else f"{done.seconds:.1f} s"
    print(f"{len(done.classes)} classes; {how}")


@shards.command(epilog="Example: tlx shards index tars --classes names.txt")
def index(
    folder: Shards,
    classes: Annotated[Path | None, typer.Option(help="Class names: a file, one per line, or indexed shards.")] = None,
    jobs: Jobs = None,
) -> None:
    """Add the index to tars that were made elsewhere."""
    from tlx.data.index import index_shards

    for name, manifest in index_shards(folder, classes=classes, jobs=jobs, progress=True).items():
        print(f"{name}: {len(manifest):,} samples in {len(manifest.shards)} shards, {len(manifest.classes)} classes")


@shards.command(epilog="Example: tlx shards check shards")
def check(folder: Shards, jobs: Jobs = None) -> None:
    """Read and decode everything; name every bad sample. Exit code 1 if there is one."""
    from tlx.data.check import check_shards

    report = check_shards(folder, jobs=jobs, progress=True)
    for problem in (*report.bad, *report.stale):
        print(problem)
    print(f"{report.samples:,} samples, {len(report.bad)} bad, {len(report.stale)} tars not as indexed")
    raise typer.Exit(0 if report.good else 1)


@shards.command(epilog="Example: tlx shards show shards")
def show(folder: Shards) -> None:
    """Print counts per class and split."""
    from tlx.data.check import describe_shards

    splits = describe_shards(folder)
    _print_counts(splits)
    for name, split in splits.items():
        print(f"{name}: {split.samples:,} samples in {split.shards} shards, {split.bytes / 2**20:.1f} MB")


def _print_counts(splits: Mapping[str, SplitCounts]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table("class", *splits, box=box.SIMPLE)
    for name in dict.fromkeys(c for split in splits.values() for c in split.counts):
        table.add_row(name, *(f"{split.counts.get(name, 0):,}" for split in splits.values()))
    Console(markup=False, highlight=False).print(table)
