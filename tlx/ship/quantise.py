"""int8, by onnxruntime's static quantiser: several recipes tried, one chosen, and what it costs measured.

Which recipe does least harm depends on the network, and the best of one is the worst of another: each is calibrated on
the same pictures and judged on others. What the chosen one costs is measured on a third part, that neither has seen.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tlx.base.errors import UserError
from tlx.base.terminal import remark, say
from tlx.ship.agreement import Run, Shown, batches
from tlx.ship.graph import INPUT, quiet, run_onnx
from tlx.use.judged import drawn, with_interval

RECIPES: Mapping[str, Mapping[str, Any]] = {
    "minmax": {},
    "minmax, by channel": {"per_channel": True},
    "minmax, by channel, 7 bits": {"per_channel": True, "reduce_range": True},
    "minmax, by channel, products": {"per_channel": True, "op_types_to_quantize": ["Conv", "Gemm", "MatMul"]},
    "minmax, by channel, symmetric": {"per_channel": True, "symmetric": True},
    "percentile, by channel": {"per_channel": True, "calibrate_method": "Percentile"},
    "entropy, by channel, products": {
        "per_channel": True,
        "calibrate_method": "Entropy",
        "op_types_to_quantize": ["Conv", "Gemm", "MatMul"],
    },
}
"""By name: arguments of ``quantize_static``. 7 bits: weights, for processors whose sums of 8-bit products saturate;
products: convolutions and matrix products alone; symmetric: activations around 0."""

_ROUNDS = 12
_AT_ONCE = 8  # pictures of a calibration batch: all that is calculated for them is in memory


@dataclass(frozen=True)
class Parts:
    """Pictures that are in one part alone.

    Attributes:
        calibration: uint8 [n, channels, H, W].
        choice, report: with labels.
    """

    calibration: Tensor
    choice: Shown
    report: Shown


def quantised(fp32: Path, out: Path, parts: Parts, feed: Callable[[Tensor], Tensor], most: float) -> dict[str, Any]:
    """Writes the recipe that has most of `choice` right (of several, the lowest loss), and says what it costs.

    What is held against `most` is the drop that was measured on `report`, in points of top-1; the upper end of its
    interval is told. With few pictures that end lies far above any drop, and to compare it would refuse them all.

    Raises:
        UserError: no recipe can be had; it costs more than `most`.
    """
    ready, tried = fp32.with_name("ready.onnx"), list[dict[str, Any]]()
    _prepare(fp32, ready)
    for place, (name, recipe) in enumerate(RECIPES.items()):
        file = fp32.with_name(f"{place}.onnx")
        remark(f"int8: {name}, recipe {place + 1} of {len(RECIPES)}")
        try:
            _quantise(ready, file, recipe, parts.calibration, feed)
            outputs = _outputs(run_onnx(file, feed), parts.choice.pixels)
        except UserError as error:  # an operator that a recipe cannot have
            say(f"note: {name}: {error.what}", error=True)
            continue
        labels = parts.choice.labels
        assert labels is not None
        loss = float(torch.nn.functional.cross_entropy(outputs, labels).nan_to_num(nan=torch.inf))
        tried.append({"recipe": name, "top1": _top1(outputs, labels), "loss": loss, "file": file})
    if not tried:
        raise UserError("no recipe for int8 works on this network", todo="--precision fp16, or fp32")
    best = min(tried, key=lambda one: (-one["top1"], one["loss"]))
    run8, run32 = run_onnx(best["file"], feed), run_onnx(fp32, feed)
    found = {
        "recipe": best["recipe"],
        "tried": [{key: one[key] for key in ("recipe", "top1", "loss")} for one in tried],
        "pictures": {"calibration": len(parts.calibration), "choice": len(parts.choice.ids)},
        **_cost(run32, run8, parts.report),
        **_speed({"fp32": run32, "int8": run8}, parts.report.pixels[:32]),
    }
    best["file"].rename(out)
    refuse_dear(found, most)
    return found


def refuse_dear(found: Mapping[str, Any], most: float) -> None:
    """
    Raises:
        UserError: it costs more than `most` points of top-1.
    """
    drop = found["drop"]
    if not drop["value"] <= most:
        raise UserError(
            f"int8 costs {drop['value']:.2f} points of top-1 ({drop['low']:.2f} to {drop['high']:.2f} by 95 % of "
            f"resamples of {found['reported']} pictures), by the best of {len(found['tried'])} recipes "
            f"({found['recipe']}); {most:g} are allowed",
            where="--max-drop",
            todo="more pictures to calibrate on (--calibrate), fp16 or fp32; or allow more",
        )


def _prepare(fp32: Path, ready: Path) -> None:
    """Shapes are inferred and constants folded, as the quantiser wants it."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with quiet("onnxruntime's preparation for int8"):
        quant_pre_process(fp32, ready, skip_symbolic_shape=True)


def _quantise(
    ready: Path, file: Path, recipe: Mapping[str, Any], pictures: Tensor, feed: Callable[[Tensor], Tensor]
) -> None:
    from onnxruntime.quantization import CalibrationMethod, QuantType, quantize_static

    symmetric = recipe.get("symmetric", False)
    options = {key: value for key, value in recipe.items() if key not in ("symmetric", "calibrate_method")}
    with quiet("the quantiser"):
        quantize_static(
            ready,
            file,
            _reader(list(batches(pictures, _AT_ONCE)), feed),
            activation_type=QuantType.QInt8 if symmetric else QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod[recipe.get("calibrate_method", "MinMax")],
            extra_options={
                "ActivationSymmetric": symmetric,
                "CalibPercentile": 99.99,
                "CalibStridedMinMax": 1,  # a batch at a time, of every method
            },
            **options,
        )


def _reader(given: Sequence[Tensor], feed: Callable[[Tensor], Tensor]) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left: Iterator[Tensor] = iter(given)

        def __len__(self) -> int:
            return len(given)

        def set_range(self, start_index: int, end_index: int) -> None:
            self.left = iter(given[start_index:end_index])

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.left, None)
            return None if batch is None else {INPUT: feed(batch).numpy()}

    return Reader()


def _outputs(run: Run, pixels: Tensor) -> Tensor:
    return torch.cat([run(some) for some in batches(pixels, 32)])


def _top1(outputs: Tensor, labels: Tensor) -> float:
    return float((outputs.argmax(1) == labels).double().mean())


def _cost(run32: Run, run8: Run, report: Shown) -> dict[str, Any]:
    """Paired: of each picture whether both are right."""
    assert report.labels is not None
    told = {name: _outputs(run, report.pixels).argmax(1) for name, run in (("fp32", run32), ("int8", run8))}
    hits = {name: (of == report.labels).double() for name, of in told.items()}
    each = 100 * (hits["fp32"] - hits["int8"])
    resampled = torch.cat([each[places].mean(1) for places in drawn(len(each), 1000)])
    return {
        "top1": {name: float(of.mean()) for name, of in hits.items()},
        "drop": with_interval(float(each.mean()), resampled).data(),
        "reported": len(each),
        "equal_decisions": int((told["fp32"] == told["int8"]).sum()),
    }


def _speed(runs: Mapping[str, Run], pixels: Tensor) -> dict[str, Any]:
    """Medians of rounds in which both take turns on the same pictures; who begins changes, and one round warms up.
    How many times as fast int8 is, is told round by round: other work on the machine slows both of a round."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(_ROUNDS + 1):
        for name in list(runs)[:: 1 if number % 2 else -1]:
            begun = time.perf_counter()
            runs[name](pixels)
            seconds[name].append(time.perf_counter() - begun)
    ratios = sorted(one / other for one, other in zip(seconds["fp32"][1:], seconds["int8"][1:], strict=True))
    return {
        "pictures_per_second": {name: len(pixels) / statistics.median(of[1:]) for name, of in seconds.items()},
        "times_as_fast": {"value": statistics.median(ratios), "lowest": ratios[0], "highest": ratios[-1]},
    }
