"""`tlx export`: written beside, loaded as its library loads it, compared with the model, then given its name."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from tlx.base.errors import UserError, did_you_mean
from tlx.base.location import place as place_of
from tlx.base.location import shown as shown_of
from tlx.base.terminal import say
from tlx.data.shards.manifest import Manifest
from tlx.data.stream.file_list import FileList
from tlx.runs.checkpoint import read_state
from tlx.runs.run_files import RunFiles, mapping
from tlx.ship import card, graph, plain
from tlx.ship.agreement import TOLERANCES, Run, Shown, compared
from tlx.ship.placed import placed, refuse_place
from tlx.ship.quantise import Parts, quantised
from tlx.tasks.classification import Classification
from tlx.use import temperature
from tlx.use.evaluate import hash_of, run_of
from tlx.use.inputs import listed
from tlx.use.judged_data import JudgedData, data_of
from tlx.use.load import Which, find_weights, load
from tlx.use.model import Model

_COMPARED = 64  # pictures, where there are as many
_JUDGED = 2048  # pictures that int8 is chosen and judged on, at most: they are in memory
_FEWEST = 8  # of each of its parts


class Format(NamedTuple):
    """
    Attributes:
        suffix: of the file; "" for a folder.
        packages: what it takes beside tlx's own.
    """

    suffix: str = ""
    packages: tuple[str, ...] = ()
    extra: str = ""
    precisions: tuple[str, ...] = ("fp32",)
    preprocess: bool = False
    has_card: bool = False


_ONNX = ("onnx", "onnxruntime", "onnxscript")
FORMATS: Mapping[str, Format] = {
    "timm": Format(),
    "torchvision": Format(),
    "hub": Format(has_card=True),
    "onnx": Format(".onnx", _ONNX, "onnx", ("fp32", "fp16", "int8"), preprocess=True, has_card=True),
    "torch.export": Format(".pt2", preprocess=True),
    "openvino": Format("", (*_ONNX, "openvino"), "openvino", ("fp32", "fp16"), preprocess=True),
}


@dataclass(frozen=True)
class Options:
    """What is asked for.

    Attributes:
        to: one of FORMATS.
        data: shards or a folder to compare on; None: the run's validation data.
        weights: those of a checkpoint, in place of those that were the best.
        calibrate: pictures that int8 is calibrated on.
        max_drop: points of top-1 that int8 may cost.
        push: ``OWNER/NAME`` on the Hub.
    """

    to: str
    data: str | None = None
    weights: Literal["raw", "ema"] | None = None
    precision: str = "fp32"
    preprocess: bool = False
    calibrate: int = 128
    max_drop: float = 1.0
    licences: card.Licences = field(default_factory=card.Licences)
    push: str | None = None

    @property
    def format(self) -> Format:
        return FORMATS[self.to]


def export(place: Path, out: Path, options: Options, *, which: Which = "best", trusted: bool = False) -> dict[str, Any]:
    """Exports a model, on the CPU. `out` is there only where the export says what the model says.

    Raises:
        UserError: a format that the network cannot have, a package that is not installed, no pictures to compare on, an
            export that says something else; something lies at `out`, or it cannot be written; damaged weights; a Hub
            that does not take it.
    """
    _refuse(out, options)
    file, own = find_weights(place, which, options.weights)
    run, sha256 = run_of(place), hash_of(file)
    if own:
        _refuse_damaged(file, sha256)
    model = _described(load(file, device="cpu", trusted=trusted or own), run, sha256)
    library = plain.library_of(model, options.to)[1] if options.to in ("timm", "torchvision", "hub") else ""
    if options.precision == "int8" and not isinstance(model.task, Classification):
        what = f"what int8 costs is measured in top-1, and the task is {model.description.task['name']}"
        raise UserError(what, where="--precision int8", todo="--precision fp16, or fp32")
    making = Making(model, file, sha256, run, out, options, library)
    with placed(out) as work:
        found = making.made(work)
    if options.push is not None:
        found["pushed"] = card.push(out, options.push)
    return found


@dataclass(frozen=True)
class Making:
    """One export.

    Attributes:
        run: None where the file lies in none.
        name: of the network in its library.
    """

    model: Model
    file: Path
    sha256: str
    run: Path | None
    out: Path
    options: Options
    name: str

    def made(self, work: Path) -> dict[str, Any]:
        """Written to a file or folder of `work` that is called as it will be, and compared."""
        options, made = self.options, work / self.out.name
        data = self._data()
        shown = self._shown(data, _drawn(len(data.source))[:_COMPARED])
        run = self._written(work, made)
        precision = "fp32" if options.precision == "int8" else options.precision
        agreement = compared(self.model, shown, run, TOLERANCES[precision])
        found = {
            "out": str(self.out),
            "format": options.to,
            "precision": options.precision,
            "weights": {"file": str(self.file), "sha256": self.sha256},
            "data": data.name,
            "tolerance": TOLERANCES[precision],
            **agreement,
        }
        if options.precision == "int8":
            found["int8"] = self._quantised(work, made, data)
        return {**found, "bytes": sum(f.stat().st_size for f in (made, *made.rglob("*")) if f.is_file())}

    def _written(self, work: Path, made: Path) -> Run:
        """The export, as its own library runs it."""
        model, options = self.model, self.options
        feed = graph.feed_of(model, preprocess=options.preprocess)
        if options.to == "hub":
            plain.write_hub(model, made, self.name, self._card(card.timm_lines(model, options.push or "OWNER/NAME")))
            return plain.run_hub(made, model, feed)
        if options.to in ("timm", "torchvision"):
            plain.write_plain(model, made, options.to, self.name)
            return plain.run_plain(made, feed)
        said = graph.about(model, preprocess=options.preprocess, precision=options.precision)
        program = graph.exported(model, preprocess=options.preprocess)
        if options.to == "torch.export":
            graph.write_program(program, made, said)
            return graph.run_program(made, feed)
        proto, file = graph.onnx_of(program, model), made if options.to == "onnx" else work / "fp32.onnx"
        half = options.precision == "fp16"
        graph.write_onnx(graph.halved(proto) if half and options.to == "onnx" else proto, file, said, self._onnx_card())
        if options.to == "onnx":
            return graph.run_onnx(made, feed)
        graph.write_openvino(file, made, said, half=half)
        return graph.run_openvino(made, feed)

    def _quantised(self, work: Path, made: Path, data: JudgedData) -> dict[str, Any]:
        """In place of the file in fp32."""
        import onnx

        options, fp32, int8 = self.options, work / "fp32.onnx", work / "int8.onnx"
        made.rename(fp32)
        feed = graph.feed_of(self.model, preprocess=options.preprocess)
        found = quantised(fp32, int8, self._parts(data), feed, options.max_drop)
        said = graph.about(self.model, preprocess=options.preprocess, precision="int8", int8=found)
        graph.write_onnx(onnx.load(int8), made, said, self._onnx_card(found))
        return found

    def _onnx_card(self, int8: Mapping[str, Any] | None = None) -> str:
        takes = "uint8" if self.options.preprocess else "float32"
        return self._card(card.onnx_lines(self.out.name, self.model, takes), int8)

    def _card(self, lines: Iterable[str], int8: Mapping[str, Any] | None = None) -> str:
        text = card.body(self.model, lines, card.looks_of(self.run, self.sha256), self.options.licences, int8)
        return card.front_matter(self.options.licences) + text if self.options.to == "hub" else text

    # Pictures

    def _data(self) -> JudgedData:
        """
        Raises:
            UserError: there are none; of int8, none with a class.
        """
        location = self.options.data
        if location is None:
            said = mapping(RunFiles(self.run).config.get("data")) if self.run is not None else {}
            named = said.get("val") or said.get("train")
            if not isinstance(named, str):
                what = "it lies in no run, which would name pictures to compare on"
                raise UserError(what, where=str(self.file), todo="--data SHARDS|FOLDER")
            location = str(place_of(named))
        try:
            if self.options.precision == "int8":
                return data_of(location, self.model)
            (found,) = listed([location])
            return JudgedData(Manifest.open(found) if isinstance(found, str) else FileList(found, location))
        except UserError as error:
            if self.options.data is not None:
                raise
            what = f"the run's data to compare on cannot be used: {error.what}"
            raise UserError(what, where=error.where, todo="--data SHARDS|FOLDER of other pictures") from error

    def _shown(self, data: JudgedData, places: Tensor) -> Shown:
        ids, pixels = self.model.forward.pixels(data.source, places)
        if not len(ids):
            raise UserError("none of the pictures to compare on can be read", where=data.name)
        labels = data.own(self.model, ids)[self._target] if self.options.precision == "int8" else None
        return Shown(data.source, ids, pixels, self.model.forward.outputs(pixels), labels)

    @property
    def _target(self) -> str:
        return next(iter(self.model.task.targets))

    def _parts(self, data: JudgedData) -> Parts:
        """Calibrated on pictures that were trained on, where these are there, else on a part of the others.

        Raises:
            UserError: too few.
        """
        places, wanted = _drawn(len(data.source)), self.options.calibrate
        places = places[data.own(self.model, places)[self._target] >= 0]
        train = self._training()
        if len(places) < 3 * _FEWEST:
            what = f"{len(places)} pictures with a class are too few to choose int8 by and to tell what it costs"
            raise UserError(what, where=data.name, todo="--data SHARDS|FOLDER with more of them, or --precision fp16")
        if train is None or train.digest == data.digest:
            wanted = min(wanted, len(places) // 3)
            _, calibration = self.model.forward.pixels(data.source, places[:wanted])
            places = places[wanted:]
        else:
            _, calibration = self.model.forward.pixels(train, _drawn(len(train))[:wanted])
        shown = self._shown(data, places[:_JUDGED])
        half = len(shown.ids) // 2
        return Parts(calibration, shown[:half], shown[half:])

    def _training(self) -> Manifest | None:
        named = mapping(RunFiles(self.run).config.get("data")).get("train") if self.run is not None else None
        try:
            return Manifest.open(str(place_of(named))) if isinstance(named, str) else None
        except UserError as error:
            say(f"note: calibrated on pictures beside those it is judged by: {error}", error=True)
            return None


def _drawn(count: int) -> Tensor:
    """Places in an order that is drawn, always the same."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))


def _refuse_damaged(file: Path, sha256: str) -> None:
    """Of a checkpoint, which says what was written; an export would agree with whatever is there.

    Raises:
        UserError: it is something else.
    """
    wanted = mapping(read_state(file.parent).get("files")).get(file.name)
    if wanted not in (None, sha256):
        what = "this file is not what was written: its hash is another one"
        raise UserError(what, where=str(file), todo="another checkpoint: tlx status says which there are")


def _described(model: Model, run: Path | None, sha256: str) -> Model:
    """With the temperature of these weights, where one was fitted, and without this machine's folders."""
    said = card.without_folders(model.description)
    fitted = temperature.kept(run, sha256, None) if run is not None else None
    return replace(model, description=replace(said, temperature=fitted["temperature"]) if fitted is not None else said)


def _refuse(out: Path, options: Options) -> None:
    """What can be seen before anything is computed.

    Raises:
        UserError: it cannot be.
    """
    if options.to not in FORMATS:
        raise UserError(f'"{options.to}" is no format{did_you_mean(options.to, FORMATS)}', where="--to")
    form = options.format
    if options.precision not in form.precisions:
        todo = f"{options.to}: {', '.join(form.precisions)}; fp16 and int8: --to onnx"
        raise UserError(f"no {options.precision} in this format", where="--precision", todo=todo)
    if options.preprocess and not form.preprocess:
        todo = "leave it out, or: onnx, torch.export, openvino"
        raise UserError("this format is weights alone", where="--preprocess", todo=todo)
    if options.licences != card.Licences() and not form.has_card:
        raise UserError("this format has no card to write it in", where="--license", todo="--to hub, or --to onnx")
    if options.push is not None and options.to != "hub":
        raise UserError("the Hub shows the folder of --to hub", where="--push", todo="--to hub")
    if form.suffix and out.suffix != form.suffix:
        raise UserError(f"a file of {options.to} ends in {form.suffix}", where=str(out), todo=f"{out}{form.suffix}")
    refuse_place(out)
    absent = [name for name in form.packages if importlib.util.find_spec(name) is None]
    if absent:
        todo = f'pip install "tlx[{form.extra}]"'
        raise UserError(f"{options.to} takes {', '.join(absent)}, which is not installed", where="--to", todo=todo)
    if options.push is not None:
        card.check_repository(options.push)


# What is said of it


def _lines(found: Mapping[str, Any]) -> Iterator[str]:
    yield f"{found['out']}: {found['format']}, {found['precision']}, {found['bytes'] / 1e6:,.1f} MB"
    yield f"  of {found['weights']['file']}"
    said = f"largest difference {found['largest_difference']:.1e} (at most {found['tolerance']:g})"
    yield f"  {found['pictures']} pictures of {shown_of(found['data'])}{', in fp32' * ('int8' in found)}:"
    yield f"  {said}, {found['equal_decisions']} decisions equal"
    if found["format"] == "openvino":
        yield f"  compiled with {graph.EXACT}: without it, processors that have bf16 compute in it"
    if "int8" in found:
        yield from _of_int8(found["int8"])
    if "pushed" in found:
        yield f"  on the Hub: {found['pushed']}"


def _of_int8(int8: Mapping[str, Any]) -> Iterator[str]:
    pictures, drop, speed = int8["pictures"], int8["drop"], int8["pictures_per_second"]
    yield from ("", f"{'int8, calibrated on ' + str(pictures['calibration']) + ' pictures':<44}top-1       loss")
    for one in int8["tried"]:
        chosen = "  chosen" if one["recipe"] == int8["recipe"] else ""
        yield f"  {one['recipe']:<40}{one['top1']:>7.4f}{one['loss']:>11.4f}{chosen}"
    yield f"on {int8['reported']} other pictures than these {pictures['choice']}:"
    yield f"  top-1 {int8['top1']['fp32']:.4f} in fp32, {int8['top1']['int8']:.4f} in int8:"
    yield f"  it costs {drop['value']:.2f} points ({drop['low']:.2f} to {drop['high']:.2f}, 95 %, paired)"
    if int8["equal_decisions"] == int8["reported"]:  # of which no resample has any
        yield f"  none was told otherwise: what happens to up to {300 / int8['reported']:.2g} % would hardly show"
    yield f"  {int8['equal_decisions']} of {int8['reported']} decisions equal"
    yield f"  pictures per second here: {speed['fp32']:.1f} in fp32, {speed['int8']:.1f} in int8:"
    times = int8["times_as_fast"]
    yield f"  {times['value']:.2f} times as fast ({times['lowest']:.2f} to {times['highest']:.2f} in rounds of both)"


def table(found: Mapping[str, Any]) -> str:
    return "\n".join(_lines(found))
