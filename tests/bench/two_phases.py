"""A whole recipe from stored features beside its floor; a partly frozen phase from features beside one from pictures.

``python tests/bench/two_phases.py --shards FOLDER --weights FILE --out OUT [--epochs 16] [--tune 8] [--partial 0]``
trains timm's deit_tiny (FILE) on FOLDER/train, judged on FOLDER/val after every epoch: the head for 16 epochs from
features of the plain view, then everything for 8. The floor is what cannot be left out: one forward pass over all
pictures, the steps of the second phase and its evaluations, in bare loops over the same data path. ``--partial N`` has
instead N epochs of a phase that trains the last three blocks and the head, from features and from pictures.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from features import PLAIN, raw_of

from tlx.data.stream.stream import Batch, evaluation_batches
from tlx.plan.config import parse
from tlx.ranks.rendezvous import join_ranks
from tlx.runs.run_folder import RunFolder
from tlx.tasks import Truth
from tlx.train import command
from tlx.train.run import Run
from tlx.train.step import by_step, prepare_phase

ROW = "features, exact, plain view"


def timed(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def trained(raw: dict[str, Any]) -> tuple[float, float]:
    """Seconds of the whole training, and val/top1 at its end."""
    shutil.rmtree(raw["run"], ignore_errors=True)
    shutil.rmtree(raw["cache"]["folder"], ignore_errors=True)
    result: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        seconds = timed(lambda: result.update(command.train(parse(raw))))
    return seconds, result["last"]["val/top1"]


def floor(raw: dict[str, Any]) -> dict[str, float]:
    """Seconds of what cannot be left out."""
    config = parse({**raw, "run": raw["run"] + "-floor", "cache": "off"})
    shutil.rmtree(config.run, ignore_errors=True)
    config.run.mkdir(parents=True)
    with contextlib.redirect_stdout(io.StringIO()):
        run = command.compose(config, join_ranks(config), RunFolder(config.run), silent=True)
    run.stop.close()
    phase = run.plan.phases[-1]
    once = evaluation_batches(
        run.stream.manifest, batch=run.validation_batch, transform=run.stream.transform, workers=run.stream.workers
    )
    found = {"a forward pass over all pictures": timed(lambda: (judged(run, once), judged(run, batches_of(run))))}
    model = prepare_phase(run.net, phase, run.plan, world=run.world, compiled=False)

    def tuning() -> None:
        for _, micros in by_step(run.stream.batches(phase.start, phase.stop)):
            run.optimizer.zero_grad(set_to_none=True)
            for batch in micros:
                loss = run.task.loss(model.forward(run.normalise(batch.images)), Truth.of(batch)) / batch.total
                torch.autograd.backward(loss)
            run.optimizer.step()

    found[f"the {phase.stop - phase.start} steps of the second phase"] = timed(tuning)
    evaluations = -(-(phase.stop - phase.start) // run.plan.steps_per_epoch)
    found[f"its {evaluations} evaluations"] = timed(lambda: [judged(run, batches_of(run)) for _ in range(evaluations)])
    return found


def batches_of(run: Run) -> Iterable[Batch]:
    assert run.validation is not None
    return run.validation.batches()


@torch.no_grad()
def judged(run: Run, batches: Iterable[Batch]) -> None:
    run.net.eval()
    for batch in batches:
        run.net(run.normalise(batch.images)).argmax(1)


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("shards", "weights", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--tune", type=int, default=8)
    parser.add_argument("--partial", type=int, default=0)
    parser.set_defaults(each_epoch=True)
    said = parser.parse_args()
    if said.partial:
        phases = {"each": {"duration": f"{said.partial}ep", "lr": 1e-3}}
        raw = {**raw_of(said, ROW, 0), "unfreeze": {"name": "last_n", "n": 3}, "phases": phases, "transforms": PLAIN}
        features = trained(raw)
        pictures = trained({**raw, "run": raw["run"] + "-pictures", "cache": {**raw["cache"], "mode": "off"}})
        print(
            f"{said.partial} epochs of the last three blocks and the head: {pictures[0]:.1f} s from pictures, ", end=""
        )
        print(f"{features[0]:.1f} s from features, {pictures[0] / features[0]:.2f} times as fast; ", end="")
        print(f"top-1 {100 * pictures[1]:.2f} and {100 * features[1]:.2f} %")
        return
    raw = raw_of(said, ROW, 0)
    seconds, top1 = trained(raw)
    parts = floor(raw)
    for name, value in parts.items():
        print(f"{name}: {value:.1f} s")
    whole = sum(parts.values())
    print(f"floor {whole:.1f} s; tlx with its start {seconds:.1f} s: {seconds / whole:.3f} of it")
    print(f"top-1 {100 * top1:.2f} %")


if __name__ == "__main__":
    main()
