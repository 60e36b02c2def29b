"""data.test: judged once, at the end of a finished training, by the weights that validation has chosen."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlx.base.errors import UserError
from tlx.base.location import shown
from tlx.data.stream.reader import BadSample
from tlx.ranks.together import by_main, together
from tlx.runs.run_files import mapping
from tlx.train.step import share_unreadable
from tlx.use.evaluate import AtTheEnd, Look, Options, hash_of
from tlx.use.judged_data import JudgedData, Reading
from tlx.use.load import find_file, load

if TYPE_CHECKING:
    from tlx.train.run import Run


def judge_test(run: Run, folder: Path) -> bool:
    """Judges the chosen weights on data.test, which is `run.tested` then; all ranks at once. What fails here is told,
    and the training is done all the same. False where a stop was asked for first: a later start looks.

    Args:
        folder: the run's, with a whole checkpoint of the end.
    """
    if run.sets is None or run.sets.test is None:
        return True
    try:
        run.tested = _headline(run, _look(run, JudgedData(run.sets.test), folder))
    except UserError as error:
        if any(run.world.gather(run.stop.asked(look=run.world.main))):
            return False
        run.journal.note(
            f"WARNING: the training is done and its weights are saved, and data.test was not judged: {error}\n"
            f"  -> {later(folder, run.sets.test.location)}"
        )
    return True


def later(folder: Path, test: str) -> str:
    """The command that looks where the training has not."""
    return f"tlx evaluate {shlex.quote(str(folder))} --data {shlex.quote(shown(test))}"


def _look(run: Run, test: JudgedData, folder: Path) -> Mapping[str, Any]:
    from torch.backends import cudnn

    config, world, val = run.config, run.world, run.sets.val if run.sets is not None else None

    def between() -> None:
        world.watch.beat("evaluation")
        if run.stop.asked(look=world.main):
            raise UserError("a stop was asked for")

    def accept(bad: Sequence[BadSample]) -> None:
        unreadable = run.progress.bad | {one.where: one.reason for one in bad}
        share_unreadable(unreadable, run.quota, world)
        run.progress.bad = unreadable

    together(world, between)
    model = together(world, lambda: load(folder, device=str(world.device)), faults=True)
    weights, sha256 = by_main(world, lambda: _weights(folder), faults=True)
    reading = Reading(config.evaluate.samples, config.data.workers, skip_bad=True, between=between, faults=True)
    end = AtTheEnd(test, JudgedData(val) if val is not None else None, run.progress.step, accept)
    run.journal.note(f"judging the chosen weights on data.test: {len(test.source):,} samples of {test.name}")
    # as `tlx evaluate` computes, without the settings of cuDNN that training has made
    with cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=True):
        return Look(model, weights, sha256, folder, Options(reading=reading), world, end).taken(test)


def _weights(folder: Path) -> tuple[Path, str]:
    """The file of the chosen ones, and its hash."""
    file = find_file(folder, "best")[0]
    return file, hash_of(file)


def _headline(run: Run, look: Mapping[str, Any]) -> dict[str, Any]:
    """Of what is recorded, what result.json tells; `headline`: metrics that lines for people show."""
    kept = ("data", "digest", "samples", "weights", "batch", "metrics", "recorded", "look")
    named = getattr(run.task, "headline", None) or run.task.metrics
    headline = [name for name in named if name in look["metrics"]]
    temperature = mapping(look.get("temperature")).get("temperature")
    own = {"skipped": len(look["skipped"]), "headline": headline, "temperature": temperature}
    return {**{name: look[name] for name in kept}, **own}
