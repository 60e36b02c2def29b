"""`tlx shards`: from pictures to indexed WebDataset tars."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tlx.base.terminal import as_courtesy, drawn, escaped, say
from tlx.cli.help import examples
from tlx.cli.words import path, place

if TYPE_CHECKING:
    from tlx.data.build.write import BuildSummary, PartSummary
    from tlx.data.shards.check import SplitCounts
    from tlx.data.shards.duplicates import Copy, Duplicates
    from tlx.data.shards.notes import Rewrites
    from tlx.data.shards.statistics import Statistics

shards = typer.Typer(help="Build, index, check, show WebDataset shards.", no_args_is_help=True, rich_markup_mode=None)

Shards = Annotated[
    Path,
    typer.Argument(metavar="FOLDER", help="A folder of tars, or of folders of tars (train, val ...).", parser=path),
]
Places = Annotated[
    str,
    typer.Argument(
        metavar="SHARDS", help="A folder of tars, or of folders of tars (train, val), or a URL.", parser=place
    ),
]
Jobs = Annotated[int | None, typer.Option(min=0, help="Processes; one per core by default.")]

_NAMED = 10  # groups of duplicates that are printed


@shards.command(
    epilog=examples(
        "tlx shards build photos shards --val 0.2 --resize 256 --rewrite",
    )
)
def build(
    src: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="Folder per class, CSV, parquet (a file, or a folder of them), what datasets.save_to_disk wrote, "
            "hf:OWNER/NAME[@REVISION][:CONFIG], or torchvision:NAME (torchvision:Flowers102).",
            parser=place,
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Where the shards go.", parser=path)],
    val: Annotated[float | None, typer.Option(help="Share of each class split off for validation.")] = None,
    seed: Annotated[int, typer.Option(help="Of the split and of the shuffle over shards.")] = 0,
    resize: Annotated[
        int | None, typer.Option(help="Make larger pictures smaller: the short side, in pixels. Never larger.")
    ] = None,
    quality: Annotated[int, typer.Option(help="Of JPEGs that were made smaller.")] = 95,
    rewrite: Annotated[
        bool,
        typer.Option(
            "--rewrite", help="Code JPEGs anew, without loss: smaller, faster to read; progressive to baseline."
        ),
    ] = False,
    shard_samples: Annotated[int, typer.Option(help="A shard holds at most so many pictures.")] = 1000,
    shard_mb: Annotated[int, typer.Option(help="And at most so many megabytes.")] = 256,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave unreadable pictures out, and name them.")] = False,
    root: Annotated[
        str | None, typer.Option(metavar="PATH", help="Where torchvision's data set lies.", parser=place)
    ] = None,
    download: Annotated[bool, typer.Option("--download", help="Let torchvision download it there.")] = False,
    variant: Annotated[str | None, typer.Option(help="Of the splits: article, for Flowers102.")] = None,
    path_column: Annotated[
        str, typer.Option(help="The CSV's column of paths, relative to it; of parquet and hf: the pictures'.")
    ] = "path",
    label_column: Annotated[str, typer.Option(help="Its column of class names; '' for none.")] = "label",
    split_column: Annotated[str, typer.Option(help="Its column of train, val and test; '' for none.")] = "split",
    target: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:KIND][=COLUMN,...]",
            help="What else its columns say: a class (colour), labels (tags:labels, with ; between them), numbers "
            "(age:number, box:number=x,y,w,h), labels with a column each (tags:labels=cat,dog: 1, 0, empty: unknown). "
            "Again for each target.",
        ),
    ] = None,
    label_separator: Annotated[str, typer.Option(help="Between labels in a cell.")] = ";",
    separator: Annotated[
        str | None, typer.Option(help="Between its cells, such as ';' or tab; by default whichever its header has.")
    ] = None,
    splits: Annotated[
        bool, typer.Option("--splits/--no-splits", help="Folders called train, val, test are splits, not classes.")
    ] = True,
    nested: Annotated[
        bool, typer.Option("--nested", help="A class is the path of folders to a picture, such as animal/dog/poodle.")
    ] = False,
    no_labels: Annotated[
        bool,
        typer.Option(
            "--no-labels",
            help="Pictures of no class, wherever they lie below SRC: to pretrain on (configs/METHODS.md).",
        ),
    ] = False,
    jobs: Jobs = None,
    part: Annotated[
        str | None,
        typer.Option(
            metavar="I/N", help="Write only this part of the shards, such as 3/8; other machines write others."
        ),
    ] = None,
) -> None:
    """Write shards from a folder per class, a CSV (path,label[,split]), parquet files, or a data set of torchvision
    or of Hugging Face.

    Classes are sorted by value if all are integers, else as text.

    With --target, an empty cell is a missing class or number, and no label at all; among labels, ?name is one that may
    or may not apply, and ? stands for all that are not named.

    Every picture is read to its end, and one that cannot be is named. Pictures are shuffled before they are dealt to
    shards, so each shard has about the mix of classes of the whole. After an interruption the same command goes on.

    On several machines that share OUT: --part 1/8 on one, --part 2/8 on another ... then once without --part, which
    finishes, and writes what is still missing. slurm/shards.sbatch does that.

    It goes on when the shell or the terminal that started it is closed, as under nohup; Ctrl-C or kill end it.
    """
    from tlx.data.build.build_parts import Part
    from tlx.data.build.write import BuildOptions, build_part, build_shards

    as_courtesy()
    with suppress(AttributeError, ValueError):  # of Windows; of another thread than the main one
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    options = BuildOptions(
        val=val,
        seed=seed,
        shard_samples=shard_samples,
        shard_bytes=shard_mb << 20,
        resize=resize,
        quality=quality,
        rewrite=rewrite,
        skip_bad=skip_bad,
        jobs=jobs,
        root=root,
        download=download,
        variant=variant,
        path_column=path_column,
        label_column=label_column,
        split_column=split_column,
        separator=separator,
        splits=splits,
        targets=tuple(target or ()),
        label_separator=label_separator,
        nested=nested,
        labels=not no_labels,
    )
    if part is not None:
        _print_part(build_part(src, out, Part.read(part), options, progress=True), out)
        return
    done = build_shards(src, out, options, progress=True)
    print_build(done)


def print_build(done: BuildSummary) -> None:
    """What a build has found and made."""
    from tlx.data.shards.passed_over import told

    for name in done.bad:
        say(f"left out, unreadable: {escaped(name)}", error=True)
    for line in told(done.left_out):
        say(line, error=True)
    _print_statistics(done.statistics)
    _warn_of_classes({split: said.counts for split, said in done.statistics.items()})
    for split, made in done.splits.items():
        size = made["bytes"] / 2**20
        say(f"{done.out / split}: {made['samples']:,} samples in {_count(made['shards'], 'shard')}, {size:.1f} MB")
    if done.rewrites:
        say(_rewritten(done.rewrites))
    _print_duplicates(done.duplicates, done.splits)
    if done.commit:
        say(f"commit {done.commit}")
    how = "was there already, nothing done" if done.already else f"{done.seconds:.1f} s"
    say(f"{f'{len(done.classes)} classes' if done.classes else 'no class'}; {how}")


def _print_part(done: PartSummary, out: Path) -> None:
    if done.already:
        say(f"{out} is finished, nothing done")
        return
    for name in done.bad:
        say(f"left out, unreadable: {escaped(name)}", error=True)
    before = f", {done.before:,} of them there before" if done.before else ""
    held = (
        f"{done.samples:,} samples in {_count(done.shards, 'shard')}{before}" if done.shards else "no shard left for it"
    )
    say(f"part {done.part}: {held}; {done.seconds:.1f} s")
    say("once all parts are written, the same command without --part finishes the build")


@shards.command(
    epilog=examples(
        "tlx shards index tars --label-key annotation.label --classes names.txt",
    )
)
def index(
    folder: Shards,
    classes: Annotated[
        Path | None, typer.Option(help="Class names: a file, one per line, or indexed shards.", parser=path)
    ] = None,
    label_from: Annotated[
        str | None,
        typer.Option(
            help="Where a sample's label is: cls, json or txt (the member of that name), a whole extension such as "
            "label.cls, folder (cats/0001.jpg is a cats), folders (all: animal/cats/1.jpg is animal/cats), or none. By "
            "default the first of .cls, .json, .txt; the folder, if no sample has any."
        ),
    ] = None,
    label_key: Annotated[
        str | None, typer.Option(help="Where in the .json, such as annotation.label; else label, cls or class.")
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:KIND][=KEY,...]",
            help="What else the .json says, by dotted keys: colour=attributes.colour, tags:labels=annotation.tags, "
            "age:number. Again for each target.",
        ),
    ] = None,
    target_classes: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FILE", help="Class names of a target: a file, one per line, or indexed shards."),
    ] = None,
    picture: Annotated[
        str | None,
        typer.Option(help="Extension of the picture, such as image.jpg, where a sample has several pictures."),
    ] = None,
    last_dot: Annotated[
        bool,
        typer.Option("--last-dot", help="img.2024.0.jpg is sample img.2024.0; else img, as WebDataset has it."),
    ] = False,
    numbers: Annotated[
        str | None,
        typer.Option(
            help="What numbers as labels are: names (of classes) or positions (in their list). To be said only where "
            "both are possible and differ."
        ),
    ] = None,
    fresh: Annotated[
        bool,
        typer.Option("--fresh", help="Forget what an earlier index says: its classes, and where it found the labels."),
    ] = False,
    hashes: Annotated[
        bool,
        typer.Option(
            help="Read all of each tar and keep its SHA-256, so that later changes are noticed (about a second of a "
            "core per GB, at the disk's speed); without, only headers and labels are read."
        ),
    ] = True,
    jobs: Jobs = None,
) -> None:
    """Add the index to tars that were made elsewhere; they stay as they are.

    Labels are names: sorted by value if all are integers, else as text. A list (--classes, or the earlier index, which
    is kept) has its own order, and labels are found in it by name; numbers of .cls, .txt and .json that are no names in
    it are positions from 0.

    Over an earlier index without hashes it adds them; trainings that were stopped go on with either.
    """
    from tlx.data.shards.index import index_folder
    from tlx.data.shards.labels import LabelRule
    from tlx.data.shards.passed_over import told

    as_courtesy()
    rule = LabelRule.make(label_from, label_key, picture, numbers, last_dot=last_dot, targets=target or ())
    made = index_folder(
        folder,
        classes={**({"label": classes} if classes else {}), **_lists_by_target(target_classes or ())},
        labels=rule,
        hashes=hashes,
        jobs=jobs,
        fresh=fresh,
        progress=True,
    )
    for line in told(made.passed_over):
        say(line, error=True)
    for name, manifest in made.manifests.items():
        tars = _count(len(manifest.shards), "shard")
        classes_said = f"{len(manifest.classes)} classes" if manifest.classes else "no class"
        beside = [t for t in manifest.targets if t != "label"]
        said = f", {_count(len(beside), 'target')}: {', '.join(beside)}" if beside else ""
        say(f"{name}: {len(manifest):,} samples in {tars}, {classes_said}{said}")
    if made.kept:
        listed = ", ".join(f'"{escaped(name)}"' for name in made.kept[:_NAMED]) + (
            " ..." if len(made.kept) > _NAMED else ""
        )
        source = "--classes" if classes is not None else "the earlier index or build; --fresh makes a new list"
        say(f"warning: {_count(len(made.kept), 'class', 'classes')} without a sample kept from {source}: {listed}")
    _warn_of_classes({m.name: dict(zip(m.classes, m.counts().tolist(), strict=True)) for m in made.manifests.values()})


@shards.command(
    epilog=examples(
        "tlx shards check shards --json report.json",
    )
)
def check(
    shards: Places,
    report_file: Annotated[
        Path | None, typer.Option("--json", help="Write the whole report to this file.", parser=path)
    ] = None,
    jobs: Jobs = None,
) -> None:
    """Read and decode everything; name every bad sample and duplicate, and every tar whose bytes are not as indexed.

    Exit code 1 if a sample or tar is bad.
    """
    from tlx.base.errors import UserError
    from tlx.base.files import write_whole
    from tlx.data.shards.check import check_shards
    from tlx.data.shards.passed_over import told

    if report_file is not None and not report_file.parent.is_dir():  # said before the work, not after it
        raise UserError("there is no such folder", where=str(report_file.parent), todo="name another file for --json")
    report = check_shards(shards, jobs=jobs, progress=True)
    if report_file is not None:
        write_whole(report_file, json.dumps(report.plain(), indent=1))
    for problem in (*report.bad, *report.stale):
        say(problem)
    for line in told(report.passed_over):
        say(line, error=True)
    _print_statistics(report.statistics)
    _warn_of_classes({name: split.counts for name, split in report.splits.items()})
    _print_duplicates(report.duplicates, report.splits)
    if report.unhashed:
        without = _count(report.unhashed, "tar has", "tars have")
        say(f"note: {without} no hash in the index, so that other bytes may go unseen; tlx shards index adds it")
    say(f"{report.samples:,} samples, {len(report.bad)} bad, {len(report.stale)} tars not as indexed")
    raise typer.Exit(0 if report.good else 1)


@shards.command(
    epilog=examples(
        "tlx shards show shards",
    )
)
def show(shards: Places) -> None:
    """Print counts per class, target and split, and what the build noted of the pictures."""
    from tlx.cli.shard_targets import target_lines
    from tlx.data.shards.check import built_statistics, describe_shards

    splits = describe_shards(shards)
    if any(split.counts for split in splits.values()):
        _print_counts(splits)
    for line in target_lines(splits):
        say(line)
    try:
        _print_statistics(built_statistics(splits))
    except OverflowError:  # of whole numbers that nobody can have counted
        say("what the build noted of the pictures cannot be read: tlx shards build makes it anew")
    for name, split in splits.items():
        say(f"{name}: {split.samples:,} samples in {_count(split.shards, 'shard')}, {split.bytes / 2**20:.1f} MB")


def _lists_by_target(said: Iterable[str]) -> dict[str, Path]:
    from tlx.base.errors import UserError

    found = {}
    for text in said:
        name, equals, file = text.partition("=")
        if not equals or not name or not file:
            raise UserError(f'"{text}" names no list', where="--target-classes", todo="such as colour=colours.txt")
        found[name] = path(file)
    return found


def _warn_of_classes(counts: Mapping[str, Mapping[str, int]]) -> None:
    from tlx.data.shards.class_warnings import class_warnings

    for warning in class_warnings(counts):
        say(f"warning: classes: {warning}")


def _print_counts(splits: Mapping[str, SplitCounts]) -> None:
    from rich import box
    from rich.table import Table

    table = Table("class", *splits, box=box.SIMPLE)
    for name in dict.fromkeys(c for split in splits.values() for c in split.counts):
        table.add_row(escaped(name), *(f"{split.counts.get(name, 0):,}" for split in splits.values()))
    say(drawn(table))


def _print_statistics(statistics: Mapping[str, Statistics]) -> None:
    if not statistics:
        return
    from rich import box
    from rich.table import Table

    table = Table("pictures", *statistics, box=box.SIMPLE)
    said = list(statistics.values())
    table.add_row("width: least, median, greatest", *("{} {} {}".format(*s.width) for s in said))
    table.add_row("height", *("{} {} {}".format(*s.height) for s in said))
    table.add_row("short side below 224", *(f"{s.small:.1%}" for s in said))
    table.add_row("KB per picture", *(f"{s.bytes / 1024:.1f}" for s in said))
    table.add_row("formats", *(", ".join(f"{n} {c:,}" for n, c in s.formats.items()) for s in said))
    if all(s.counts for s in said):
        most = (f"{min(s.counts.values()):,} {max(s.counts.values()):,}" for s in said)
        table.add_row("classes: fewest, most", *most)
    table.add_row("mean of R, G, B", *(" ".join(f"{m:.3f}" for m in s.mean) for s in said))
    table.add_row("standard deviation", *(" ".join(f"{d:.3f}" for d in s.std) for s in said))
    if any(s.measured < s.samples for s in said):
        table.add_row("  (of so many pictures)", *(f"{s.measured:,}" for s in said))
    say(drawn(table))


def _rewritten(rewrites: Rewrites) -> str:
    saved = 1 - rewrites.after / rewrites.before if rewrites.before else 0.0
    failed = f", {rewrites.failed:,} kept because it failed" if rewrites.failed else ""
    return f"{rewrites.rewritten:,} JPEGs coded anew, {saved:.1%} smaller; {rewrites.kept:,} kept{failed}"


def _print_duplicates(duplicates: Duplicates, splits: Iterable[str]) -> None:
    for split in splits:
        groups = duplicates.within(split)
        if groups:
            copies = sum(len(g) - 1 for g in groups)
            say(f"{split}: {_count(copies, 'copy', 'copies')} of other pictures in it, such as {_names(groups[0])}")
    if duplicates.across:
        count = _count(len(duplicates.across), "picture")
        say(f"warning: {count} in several splits: what is trained on is also measured on")
        _print_groups(duplicates.across)
    if duplicates.contradicting:
        say(f"warning: {_count(len(duplicates.contradicting), 'picture')} with a copy that has another label:")
        _print_groups(duplicates.contradicting, labels=True)


def _count(number: int, what: str, several: str | None = None) -> str:
    return f"{number:,} {what if number == 1 else several or what + 's'}"


def _print_groups(groups: tuple[tuple[Copy, ...], ...], *, labels: bool = False) -> None:
    for group in groups[:_NAMED]:
        say(f"  {_names(group, labels=labels)}")
    if len(groups) > _NAMED:
        say(f"  ... and {len(groups) - _NAMED:,} more (tlx shards check --json FILE has all)")


def _names(group: tuple[Copy, ...], *, labels: bool = False) -> str:
    more = f" and {len(group) - 4} more" if len(group) > 4 else ""
    # names are the user's: what a terminal would act on is escaped
    listed = (f"{copy}{f' ({copy.label})' if labels else ''}" for copy in group[:4])
    return " = ".join(map(escaped, listed)) + more
