"""The commands. `tlx X` is `python -m tlx X`; `train` runs under accelerate launch, torchrun and srun too.

Exit codes: 0 done, 2 the user's mistake, 75 stopped on request and resumable, 1 a fault; 141, as of a process that
SIGPIPE has ended, where nobody reads any more what a command is there to print (`tlx plan c.yaml | head -1`). Launchers
turn any non-zero code into 1, a banner and perhaps a restart: under them a mistake and a requested stop exit 0. The
file that TLX_VERDICT names tells, and RUN/status.json of a training that has begun.
"""

from __future__ import annotations

import errno
import math
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tlx import __version__
from tlx.base.errors import TlxError, UserError
from tlx.base.launcher import RESUMABLE, launched, rank, ranked, verdict_file
from tlx.base.terminal import STDOUT, as_courtesy, escaped, flush, folded, hand_over, say, unread, use_utf8
from tlx.cli.bench import bench
from tlx.cli.completion import INSTALL, completion
from tlx.cli.config import EXAMPLES as CONFIG_EXAMPLES
from tlx.cli.config import config
from tlx.cli.doctor import doctor
from tlx.cli.embed import embed
from tlx.cli.evaluate import evaluate
from tlx.cli.export import export
from tlx.cli.help import Grouped, examples
from tlx.cli.init import configuration_of, init
from tlx.cli.lr_find import lr_find
from tlx.cli.neighbours import neighbours
from tlx.cli.predict import predict
from tlx.cli.probe import probe
from tlx.cli.serve import serve
from tlx.cli.shards import shards
from tlx.cli.soup import soup
from tlx.cli.submit import EXAMPLES, WithOptionsOfSbatch, submit
from tlx.cli.sweep import EXAMPLES as OF_SWEEPS
from tlx.cli.sweep import sweep, sweep_trial
from tlx.cli.track import track
from tlx.cli.weights import weights
from tlx.cli.words import FORWARDED, ConfigFile, Overrides, Quiet, announce, config_path, path

if TYPE_CHECKING:
    from tlx.plan.config import Config
    from tlx.runs.processes import Early

app = typer.Typer(
    cls=Grouped,
    help="Transfer learning for images at cluster scale: data -> plan -> loop.",
    epilog=examples(
        "tlx train photos",
        "tlx train configs/flowers102/resnet50.yaml seed=1 phases.each.lr=1e-3",
        "tlx evaluate runs/mine --data photos",
        more="tlx COMMAND --help has examples of each, tlx config KEY explains a key of configurations.",
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},  # commands and sub-commands take them over
)
app.add_typer(shards, name="shards")
app.add_typer(weights, name="weights")
app.add_typer(bench, name="bench")
app.add_typer(track, name="track")
app.command(
    epilog=examples(
        "tlx doctor",
        "tlx doctor mine.yaml run=runs/other",
        "srun ... tlx doctor mine.yaml",
    ),
    context_settings=FORWARDED,
)(doctor)
app.command(
    epilog=examples(
        "tlx predict runs/mine photos --out photos.csv",
        "tlx predict runs/mine a.jpg b.jpg --json",
        "find . -name '*.jpg' | tlx predict runs/mine - --top 3",
        "torchrun --nproc-per-node=4 -m tlx predict runs/mine data/shards/test --out test.parquet",
    ),
)(predict)
app.command(
    epilog=examples(
        "tlx embed runs/mine photos --out photos.parquet",
        "tlx embed timm/resnet50 data/shards/train --out train.npy --dtype float16",
        "torchrun --nproc-per-node=4 -m tlx embed runs/mine data/shards/train --out train.parquet",
    ),
)(embed)
app.command(
    epilog=examples(
        "tlx neighbours train.parquet",
        "tlx neighbours test.parquet --against train.parquet --out found --sheet",
    ),
)(neighbours)
app.command(
    name="lr-find",
    epilog=examples(
        "tlx lr-find mine.yaml",
        "tlx lr-find mine.yaml --phase fine_tuning --seeds 3 --out found",
        "torchrun --nproc-per-node=4 -m tlx lr-find mine.yaml optimizer=sgd",
    ),
    context_settings=FORWARDED,
)(lr_find)
app.command(
    epilog=examples(
        "tlx evaluate runs/mine",
        "tlx evaluate runs/mine --data data/test --out test.csv",
        "tlx evaluate model.safetensors --data photos --tta flip --json",
    ),
)(evaluate)
app.command(
    epilog=examples(
        "tlx export runs/mine mine --to timm",
        "tlx export runs/mine mine.onnx --to onnx --preprocess",
        "tlx export runs/mine mine.onnx --to onnx --precision int8",
        "tlx export runs/mine mine --to hub --push me/mine",
    ),
)(export)
app.command(
    epilog=examples(
        "tlx serve runs/mine",
        "tlx serve mine.onnx --host 0.0.0.0 --port 80",
        "curl -F file=@photo.jpg http://127.0.0.1:8000/predict",
    ),
)(serve)
app.command(
    epilog=examples(
        "tlx soup runs/seed0 runs/seed1 runs/seed2 runs/soup",
        "tlx soup a b ab --method uniform",
    ),
)(soup)
app.command(
    epilog=examples(
        "tlx probe mine.yaml --lr 1e-4..1e-1:log/7 --weight-decay 0,0.01,0.1 --heads linear,cosine",
        "tlx probe mine.yaml --backbones timm/resnet50,timm/deit_tiny_patch16_224 --out networks.png",
        "tlx probe mine.yaml --here --under 30M",
        "tlx probe mine.yaml --shots 1,5,10 --ways 5",
        "tlx probe mine.yaml --forecast",
    ),
    context_settings=FORWARDED,
)(probe)
app.command(
    epilog=examples(
        "tlx init photos",
        "tlx init photos --backbone torchvision/resnet50 --val 0.1",
    ),
)(init)
app.command(epilog=OF_SWEEPS, context_settings=FORWARDED)(sweep)
app.command("sweep-trial", hidden=True)(sweep_trial)
app.command(cls=WithOptionsOfSbatch, epilog=EXAMPLES, context_settings=FORWARDED)(submit)

app.command("config", epilog=examples(*CONFIG_EXAMPLES))(config)
app.command(epilog=INSTALL)(completion)

UNREAD = 141  # 128 and SIGPIPE
WRITE = "Print the same configuration with its schedule written out in full, to edit and to train from."
PICTURE = "Draw layers by time, the colour their rate, into the .png file named next, or CONFIG-plan.png."
PHOTOS = "A YAML file, see configs/; or a folder of pictures."
MEASURE = "Try each phase on the device here: the memory it takes beside the estimate, and the micro-batch that fits."
EXTEND = "Go on with a run by a longer plan (phases, duration, further), where what it has trained stays the same."
REST = "With --extend, where the learning rates so far would have been others: the rest of the new ones from here on."


def _show_version(wanted: bool) -> None:
    if wanted:
        say(f"tlx {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """What may come before a command."""


@app.command(
    epilog=examples(
        "tlx train photos",
        "accelerate launch -m tlx train configs/flowers102/resnet50.yaml seed=1",
    ),
    context_settings=FORWARDED,
)
def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG|PHOTOS", help=PHOTOS, parser=config_path)],
    overrides: Overrides = None,
    fresh: Annotated[bool, typer.Option(help="Move an earlier run folder aside and start anew.")] = False,
    extend: Annotated[bool, typer.Option("--extend", help=EXTEND)] = False,
    rest: Annotated[bool, typer.Option("--rest", help=REST)] = False,
    quiet: Quiet = False,
) -> None:
    """Train, or resume, or show the result of a run that is done.

    Of a folder of pictures: tlx init first, then its configuration.
    """
    as_courtesy()
    if rank() == 0 and not quiet:  # before the imports that take seconds
        say(f"tlx {__version__}: train {config}")
    if not launched():  # a launcher ends when its terminal is closed, and its ranks are asked to stop; see StopRequest
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    from tlx.plan import config as configs

    if config.is_dir():
        config = configuration_of(config, overrides or ())
    wanted = configs.load(config, overrides or (), before_imports=_begin)
    from tlx.train import command as training

    result = training.train(wanted, fresh=fresh, extend=extend, rest=rest, command=True, early=_early())
    if result is not None and rank() == 0:
        from tlx.report.report import is_drawn
        from tlx.train.result import summary

        say(folded(summary(result)))
        if is_drawn(wanted.run):
            say(f"  report: {wanted.run / 'report.html'}")
    _leave(0 if result is not None else RESUMABLE)


def _begin(config: Config) -> None:
    announce(f"{config.run}: {config.backbone.name}; importing torch ...")


def _early() -> Early | None:
    """Of a rank: `python -m tlx` looks before the imports that take seconds, since another one may die meanwhile."""
    if not ranked():
        return None
    from tlx.runs.processes import early

    return early()


@app.command(
    epilog=examples(
        "tlx plan configs/flowers102/vgg16.yaml",
        "tlx plan c.yaml --picture out.png",
        "tlx plan c.yaml --write > mine.yaml, edit it, tlx train mine.yaml",
    ),
    context_settings=FORWARDED,
)
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    write: Annotated[bool, typer.Option("--write", help=WRITE)] = False,
    picture: Annotated[bool, typer.Option("--picture", help=PICTURE)] = False,
    measure: Annotated[bool, typer.Option("--measure", help=MEASURE)] = False,
) -> None:
    """Show who trains when and at which rate, without a GPU or weights."""
    announce(f"reading {config} ...")
    changes, files = _without_files(overrides or [], wanted=picture)
    if measure and write:
        raise UserError("--measure shows the plan, --write prints a configuration: one of the two")
    from tlx.plan import config as configs

    wanted = configs.load(config, changes, before_imports=_begin)
    from tlx.train import build

    made, text = build.plan(wanted, memory=not write, measure=measure)
    if write:
        from tlx.plan.explicit import written_out

        command = shlex.join(["tlx", "plan", str(config), *changes, "--write"])
        hand_over(written_out(wanted, made, command=command), end="")
    else:
        say(text)
    if picture:
        from tlx.report.plan_picture import save

        file = files[0] if files else Path(f"{config.stem}-plan.png")
        save(made, file, title=f"run {wanted.run}\n{wanted.backbone.name}, {wanted.head.name} head")
        say(file, error=write)


def _without_files(words: Sequence[str], *, wanted: bool) -> tuple[list[str], list[Path]]:
    """Overrides, and the file that may follow --picture; typer knows no option whose value may be left out."""
    files = [path(word) for word in words if "=" not in word] if wanted else []
    if len(files) > 1 or any(file.suffix.lower() != ".png" for file in files):
        raise UserError(f"--picture writes one .png file, not {' and '.join(map(str, files))}")
    return [word for word in words if "=" in word or not wanted], files


@app.command(
    epilog=examples(
        "tlx models 'vit*'",
        "tlx models --family resnet --max-params 30M --sort accuracy",
        "tlx models convnext --size 384 --weights in22k",
        "tlx models show timm/vit_tiny_patch16_224",
    ),
)
def models(
    pattern: Annotated[str, typer.Argument(help="A shell pattern or a part of names, or: show NAME.")] = "*",
    name: Annotated[str | None, typer.Argument(help="After show: the model.")] = None,
    library: Annotated[str | None, typer.Option(help="torchvision or timm.")] = None,
    family: Annotated[str | None, typer.Option(help="The library's module: resnet, 'swin*'.")] = None,
    min_params: Annotated[str | None, typer.Option(metavar="COUNT", help="At least these: 5M, 300k.")] = None,
    max_params: Annotated[str | None, typer.Option(metavar="COUNT", help="At most these.")] = None,
    size: Annotated[str | None, typer.Option(metavar="PIXELS", help="Of the images: 224, 224-384, 256-, -256.")] = None,
    weights: Annotated[str | None, typer.Option(metavar="TAG", help="Pretrained weights: in22k, '*_in1k'.")] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Only with pretrained weights.")] = False,
    sort: Annotated[str, typer.Option(help="name, params (small first), accuracy (best first).")] = "name",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """List and choose backbones of torchvision and timm; `models show NAME` tells all about one."""
    from tlx.models import Only, model_table

    only = Only(
        library=library,
        family=family,
        parameters=(
            model_table.number(min_params) if min_params else None,
            model_table.number(max_params) if max_params else None,
        ),
        size=model_table.size_range(size) if size else (None, None),
        weights=weights,
        pretrained=pretrained,
    )
    if pattern == "show":
        from tlx.models.model_summary import portrait

        if name is None or only != Only() or sort != "name" or as_json:
            raise UserError("show takes the name of one model", todo="tlx models show timm/resnet50")
        say(portrait(name))
    elif name is not None:
        raise UserError(f'"{name}" is one argument too many', todo="tlx models PATTERN, or: tlx models show NAME")
    else:
        (hand_over if as_json else say)(
            (model_table.json_lines if as_json else model_table.listing)(pattern, only, sort)
        )


@app.command(
    epilog=examples(
        "tlx status runs/mine",
        "tlx status mine.yaml run=runs/other --folder",
    ),
    context_settings=FORWARDED,
)
def status(
    which: Annotated[
        Path, typer.Argument(metavar="RUN|CONFIG", help="A run's folder, or its configuration.", parser=config_path)
    ],
    overrides: Overrides = None,
    folder: Annotated[bool, typer.Option("--folder", help="Print only the folder, for scripts.")] = False,
    each: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Look whether the configuration takes it. Repeatable.")
    ] = None,
) -> None:
    """Tell where a run stands: running, done, resumable, killed; its step, checkpoints, and who trains it."""
    from tlx.runs.run_status import folder_of, status_text

    run = folder_of(which, overrides or (), each or ())
    hand_over(run) if folder else say(status_text(run))


@app.command(
    epilog=examples(
        "tlx report runs/flowers102-resnet50 runs/flowers102-vgg16",
    ),
)
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Run folders.", parser=path)],
    out: Annotated[
        Path | None, typer.Option(help="Where the comparison goes; by default into the first run.", parser=path)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, not tables; the files as well.")] = False,
    full: Annotated[
        bool, typer.Option("--full", help="Leave nothing out for want of time: maps, and embedding of pictures.")
    ] = False,
) -> None:
    """Write each run's page: verdict, curves, classes, confusions, mistakes as pictures; compare several runs.

    A page takes at most 5 % of its training's time, or 20 s, whichever is longer, unless --full. Runs that differ in
    their seed alone are one group: means, differences with intervals, accuracy against cost.
    """
    from tlx.base.files import json_text
    from tlx.report.report import report as draw
    from tlx.report.report import report_data
    from tlx.use.report import opened

    seconds = math.inf if full else None
    if as_json:
        hand_over(json_text(report_data(runs, out=out, network=opened, seconds=seconds)))
        return
    for drawn in draw(runs, out=out, network=opened, seconds=seconds):
        say(drawn)


def main() -> None:
    """Runs a command; a user's mistake is a message, never a traceback."""
    message = None
    use_utf8()
    try:
        code: Any = app(standalone_mode=False)
    except UserError as error:
        message = str(error)
        if rank() == 0:
            say(f"error: {error}", error=True)
        code = 2
    except TlxError as error:
        message = str(error)
        say(f"fault: {error}", error=True)
        code = 1
    except SystemExit as error:
        lost = error.__context__
        if not isinstance(lost, BrokenPipeError):
            raise
        code = UNREAD if unread(lost) else _fault(lost)  # typer ends both with 1, without a word
    except OSError as error:
        message = _said(error)
        if message is None:
            code = _fault(error)
        else:
            say(f"error: {message}", error=True)
            code = 1 if launched() else 2  # a launcher is to see the fault of its rank
    except UnicodeEncodeError as error:
        code = _tell_locale(error)
    except KeyboardInterrupt:
        code = 130
    except Exception as error:  # click's own mistakes carry their text
        message = error.format_message() if hasattr(error, "format_message") else None
        code = _tell_usage(error) if message is not None else _fault(error)
    code = code if isinstance(code, int) else 0
    _tell_verdict(code, message)
    _leave(code)


def _tell_verdict(code: int, message: str | None) -> None:
    """Of a training, for whoever asked for it by TLX_VERDICT: what has not been said by whoever knew more."""
    from tlx.base import verdict

    if sys.argv[1:2] in (["train"], ["sweep"], ["sweep-trial"]) and verdict_file() is not None:
        status: verdict.Status = "done" if code == 0 else "user-error" if code == 2 else "fault"
        verdict.give_if_none("resumable" if code == 130 else status, **({"message": message[:2000]} if message else {}))


def _tell_usage(error: Any) -> int:
    """Of a command line that click does not understand. A command without its words shows its help, as elsewhere."""
    names: list[str] = []
    context = getattr(error, "ctx", None)
    while context is not None and context.parent is not None:
        names.insert(0, context.info_name)
        context = context.parent
    if type(error).__name__ == "NoArgsIsHelpError":
        say(error.format_message(), error=True)
    else:
        say(f"error: {error.format_message()}\n  -> {' '.join(['tlx', *names])} --help", error=True)
    return 2


def _fault(error: BaseException) -> int:
    """What nobody has thought of: its trace, for a report."""
    say("".join(traceback.format_exception(error)).rstrip("\n"), error=True)
    return 1


_FULL = "free some room, or use another disk"
_DENIED = "make it accessible, or choose another place"
_ABSENT = "is the path right?"
_TODO = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EACCES: _DENIED,
    errno.EPERM: _DENIED,
    errno.EROFS: "this file system is read-only: choose another place",
    errno.ENOENT: _ABSENT,
    errno.ENOTDIR: _ABSENT,
    errno.EISDIR: _ABSENT,
    errno.ELOOP: _ABSENT,
    errno.ENAMETOOLONG: _ABSENT,
}


def _said(error: OSError) -> str | None:
    """Of a file that cannot be read or written, in words; None of other faults."""
    todo = _TODO.get(error.errno or 0)
    if error.filename == STDOUT:
        return f"{STDOUT}: {error.strerror}" + (f"\n  -> {todo}" if todo else "")
    if todo is None or (error.filename is None and todo is not _FULL):
        return None
    where = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes, os.PathLike)) else ""
    return f"{escaped(where)}: {error.strerror}\n  -> {todo}" if where else f"{error.strerror}\n  -> {todo}"


def _tell_locale(error: UnicodeEncodeError) -> int:
    """Of a name that the locale's encoding cannot write."""
    if error.encoding.lower() in ("utf-8", "utf8"):
        return _fault(error)
    name = ascii(error.object)[1:-1][:200]
    lacking = f"{name}: the locale's encoding, {error.encoding}, lacks letters of this name"
    say(f"error: {lacking}\n  -> export PYTHONUTF8=1", error=True)
    return 2


def _leave(code: int) -> None:
    """Ends the process with the code that the exit contract promises."""
    if launched() and code in (2, RESUMABLE):
        code = 0
    flush()
    if ranked():
        # threads of gloo now and then abort a process that leaves through the interpreter's own end, or keep it long
        os._exit(code)
    sys.exit(code)
