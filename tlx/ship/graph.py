"""Networks as graphs: torch.export, ONNX, OpenVINO. Each is given back as its own library reads and runs it."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tlx.base.errors import UserError
from tlx.base.files import plain
from tlx.data.pixels.normalise import Normalise
from tlx.ship.agreement import Run, heads_of
from tlx.tasks import Task
from tlx.use.model import Model

INPUT, SINGLE = "pixels", "logits"
EXACT = {"INFERENCE_PRECISION_HINT": "f32"}
"""For OpenVINO's compile_model, which computes in bf16 where the processor can, whatever the weights are saved in."""


_WHOLE = (
    "a graph, and so onnx, torch.export and openvino, takes a network whose code does not decide by the pixels' values "
    "or by how many pictures there are; tlx predict takes any"
)


def names_of(task: Task) -> list[str]:
    """Of the outputs, a head each; one that is called as the input is gets another name."""
    return [f"{name}_" if name == INPUT else name or SINGLE for name in heads_of(task)]


class Served(nn.Module):
    """The network as others see it: from pixels, normalised or not yet, to its outputs; of several heads by name."""

    def __init__(self, model: Model, *, preprocess: bool) -> None:
        super().__init__()
        self.network = model.module
        self.heads = dict(zip(names_of(model.task), heads_of(model.task).values(), strict=True))
        self.has_one = list(heads_of(model.task)) == [""]
        self.preprocess = preprocess
        self.scale: Tensor
        self.shift: Tensor
        normalise = Normalise(model.description.input, torch.device("cpu"), channels_last=False)
        self.register_buffer("scale", normalise.scale)
        self.register_buffer("shift", normalise.shift)

    def forward(self, pixels: Tensor) -> Tensor | dict[str, Tensor]:
        shown = pixels.float() * self.scale - self.shift if self.preprocess else pixels
        output = self.network(shown)
        output = output[0] if isinstance(output, tuple) else output
        if self.has_one:
            return output[:, self.heads[SINGLE]]  # type: ignore[no-any-return]
        return {name: output[:, columns] for name, columns in self.heads.items()}


def feed_of(model: Model, *, preprocess: bool) -> Callable[[Tensor], Tensor]:
    """From uint8 pixels to what the graph takes."""
    return (
        (lambda pixels: pixels) if preprocess else Normalise(model.description.input, model.device, channels_last=False)
    )


def about(model: Model, *, preprocess: bool, precision: str, **more: Any) -> dict[str, str]:
    """What the file says of itself, as texts of JSON by name."""
    said, names = model.description, model.task.outputs
    how = "uint8 RGB, NCHW, of this size" if preprocess else "float32, NCHW: (pixels / 255 - mean) / std, of this size"
    channels = {1: "grey", 3: "RGB", 4: "RGBA"}.get(said.input.channels, f"{said.input.channels} channels")
    view = {**said.data()["input"], "upright": said.upright, INPUT: how.replace("RGB", channels)}
    labels = {
        shown: [label.removeprefix(f"{name}/") for label in names[columns]]
        for shown, (name, columns) in zip(names_of(model.task), heads_of(model.task).items(), strict=True)
    }
    found = {"labels": labels, "preprocessing": view, "precision": precision, "tlx": said.data(), **more}
    return {name: json.dumps(plain(value)) for name, value in found.items()}


@contextlib.contextmanager
def quiet(what: str, todo: str = "another format may do") -> Iterator[None]:
    """What libraries say on the way is kept from the user, but for a failure.

    Raises:
        UserError: they cannot do it.
        OSError: of the disk.
    """
    said = io.StringIO()
    before = logging.root.manager.disable
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logging.disable(logging.WARNING)
            yield
    except UserError:
        raise
    except Exception as error:  # of torch, onnx, onnxruntime, openvino
        if isinstance(error, OSError) and error.errno is not None:
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        why = f"{type(error).__name__}: {' '.join(lines)[:400]}"
        raise UserError(f"{what} fails: {why}", todo=todo) from error
    finally:
        logging.disable(before)


def exported(model: Model, *, preprocess: bool) -> torch.export.ExportedProgram:
    """Any number of pictures at once."""
    served = Served(model, preprocess=preprocess).eval().requires_grad_(False)
    spec = model.description.input
    example = torch.randint(0, 256, (2, spec.channels, *spec.size), dtype=torch.uint8)
    given = feed_of(model, preprocess=preprocess)(example)
    with quiet("torch.export of this network", todo=_WHOLE):
        return torch.export.export(served, (given,), dynamic_shapes={INPUT: {0: torch.export.Dim("batch")}})


def write_program(program: torch.export.ExportedProgram, file: Path, said: Mapping[str, str]) -> None:
    whole = io.BytesIO()  # a full disk would end the process in torch's own writing
    with quiet("torch.export.save"):
        torch.export.save(program, whole, extra_files={f"{name}.json": text for name, text in said.items()})
    file.write_bytes(whole.getbuffer())


def run_program(file: Path, feed: Callable[[Tensor], Tensor]) -> Run:
    with quiet("torch.export.load"):
        module = torch.export.load(file).module()

    def run(pixels: Tensor) -> Tensor:
        with quiet("the program that was loaded"), torch.inference_mode():
            found = module(feed(pixels))
        return torch.cat(list(found.values()), 1) if isinstance(found, dict) else found

    return run


def onnx_of(program: torch.export.ExportedProgram, model: Model) -> Any:
    """onnx's ModelProto, by torch's exporter."""
    with quiet("torch.onnx.export of this network"):
        made = torch.onnx.export(program, dynamo=True, output_names=names_of(model.task), verbose=False)
        assert made is not None
        proto = made.model_proto
    symbol = proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param == symbol:
                dimension.dim_param = "batch"
    return proto


def halved(proto: Any) -> Any:
    """Its weights and sums in fp16; what goes in and comes out stays as it is."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    with quiet("onnxruntime's conversion to fp16"):
        return convert_float_to_float16(proto, keep_io_types=True)


def write_onnx(proto: Any, file: Path, said: Mapping[str, str], card: str) -> None:
    """
    Args:
        card: Markdown, which viewers show as the model's description.
    """
    import onnx

    proto.doc_string = card
    onnx.helper.set_model_props(proto, dict(said))
    with quiet("onnx.save"):
        onnx.save(proto, file)


def session_of(file: Path) -> Any:
    """onnxruntime's, on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    with quiet("onnxruntime's loading"):
        return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def run_onnx(file: Path, feed: Callable[[Tensor], Tensor]) -> Run:
    session = session_of(file)

    def run(pixels: Tensor) -> Tensor:
        with quiet("onnxruntime"):
            found = session.run(None, {INPUT: feed(pixels).numpy()})
        return torch.from_numpy(np.concatenate([np.asarray(one, np.float32) for one in found], 1))

    return run


def write_openvino(onnx_file: Path, folder: Path, said: Mapping[str, str], *, half: bool) -> None:
    """``model.xml`` and ``model.bin``, which it would save in fp16 by itself."""
    import openvino

    folder.mkdir()
    with quiet("openvino's conversion"):
        made = openvino.Core().read_model(str(onnx_file))  # convert_model reports its use to a server
        for name, text in said.items():
            made.set_rt_info(text, ["tlx", name])
        openvino.save_model(made, str(folder / "model.xml"), compress_to_fp16=half)


def run_openvino(folder: Path, feed: Callable[[Tensor], Tensor]) -> Run:
    import openvino

    with quiet("openvino's loading"):
        network = openvino.Core().compile_model(str(folder / "model.xml"), "CPU", EXACT)

    def run(pixels: Tensor) -> Tensor:
        with quiet("openvino"):
            found = network(feed(pixels).numpy())
        outputs: list[NDArray[np.float32]] = [np.array(found[one]) for one in network.outputs]
        return torch.from_numpy(np.concatenate(outputs, 1))

    return run
