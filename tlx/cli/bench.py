"""`tlx bench`: measurements on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tlx.base.errors import UserError
from tlx.base.terminal import hand_over, say
from tlx.cli.help import examples
from tlx.cli.words import FORWARDED, ConfigFile, Overrides, path, place

bench = typer.Typer(
    help="Measure the data path and the training loop on this machine.", no_args_is_help=True, rich_markup_mode=None
)

AsJson = Annotated[bool, typer.Option("--json", help="One JSON object in place of the tables.")]


@bench.command(
    epilog=examples(
        "tlx bench data shards --gpu 1500",
        "tlx bench data --config configs/flowers102/resnet50.yaml",
    )
)
def data(
    manifest: Annotated[
        str | None,
        typer.Argument(
            metavar="[SHARDS]", help="A folder of shards, a folder that holds them as train, or a URL.", parser=place
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="Measure the transforms, input and batch of this configuration.", parser=path)
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Pictures of a batch; 64, or the configuration's.")] = None,
    size: Annotated[int | None, typer.Option(help="Side of what is shown; 224, or the configuration's.")] = None,
    workers: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="Numbers of them to try; by default up to the cores.")
    ] = None,
    gpu: Annotated[
        float | None, typer.Option(metavar="IMAGES/S", help="What the GPU trains, to count workers.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="About how long to measure.")] = 20.0,
    as_json: AsJson = False,
) -> None:
    """Images per second, the floor of this machine, the ratio to it, and how many workers a GPU needs."""
    import dataclasses

    from tlx.base.files import json_text
    from tlx.bench import data as measured
    from tlx.bench.data_text import text
    from tlx.plan import config as configs
    from tlx.train import data as feed

    counts = _numbers(workers) if workers is not None else None
    setup, cache = measured.Setup(), None
    if config is not None:
        wanted = configs.load(config)
        cache, manifest = feed.cache_of(wanted), manifest or wanted.data.train
        shards = measured.open_shards(manifest, cache)
        setup = measured.setup_of(wanted)
    elif manifest is None:
        raise UserError("say which shards to measure", todo="tlx bench data FOLDER, or: tlx bench data --config FILE")
    else:
        shards = measured.open_shards(manifest)
    if size is not None:
        setup = dataclasses.replace(setup, spec=dataclasses.replace(setup.spec, size=(size, size)))
    if batch is not None:
        setup = dataclasses.replace(setup, batch=batch)
    report = measured.measure(shards, setup, workers=counts, seconds=seconds, gpus=[gpu] if gpu is not None else ())
    hand_over(json_text(report.data)) if as_json else say(text(report))


def _numbers(words: str) -> list[int]:
    try:
        return [int(word) for word in words.split(",")]
    except ValueError:
        raise UserError(f'"{words}" is not a list of numbers', where="--workers", todo="for instance 0,1,2") from None


@bench.command(
    epilog=examples(
        "tlx bench train configs/flowers102/resnet50.yaml data.workers=4 --steps 60",
    ),
    context_settings=FORWARDED,
)
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(help="Steps of each loop that are measured.")] = 30,
    phase: Annotated[str | None, typer.Option(help="Which phase; by default the last one.")] = None,
    as_json: AsJson = False,
) -> None:
    """How long the training loop waits for pictures, and what it costs beside a bare PyTorch loop."""
    from tlx.base.files import json_text
    from tlx.bench import train as measured
    from tlx.bench.train_text import text
    from tlx.plan import config as configs

    report = measured.measure(configs.load(config, overrides or ()), steps=steps, phase=phase)
    hand_over(json_text(report.data)) if as_json else say(text(report))


@bench.command(
    epilog=examples(
        "tlx bench cache mine.yaml 'cache={views: 4}'",
    ),
    context_settings=FORWARDED,
)
def cache(
    config: ConfigFile,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of each kind that are measured.")] = 10,
    as_json: AsJson = False,
) -> None:
    """What phases with frozen layers would save by stored features."""
    from tlx.base.files import json_text
    from tlx.bench.cache import measure, text
    from tlx.plan import config as configs

    found = measure(configs.load(config, overrides or ()), steps=steps)
    hand_over(json_text([one.data for one in found])) if as_json else say(text(found))
