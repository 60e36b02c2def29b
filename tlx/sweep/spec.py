"""What a sweep is: its space, what all trials share, how they are chosen; kept in its folder, so that every further
worker does the same or is refused."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

from tlx.base.differences import differences, flat
from tlx.base.errors import UserError
from tlx.base.files import json_text, write_whole
from tlx.base.metrics import Metric
from tlx.base.parsing import from_json, from_yaml
from tlx.plan import config as configs
from tlx.plan.config import Config
from tlx.sweep.grammar import Dimension, Range, parse
from tlx.sweep.space import Point

FILE, BASE, TRIALS, LOGS = "sweep.json", "base.yaml", "trials", "logs"

Sampler = Literal["tpe", "random", "grid"]
Pruner = Literal["median", "hyperband", "none"]
SAMPLERS: tuple[Sampler, ...] = ("tpe", "random", "grid")
PRUNERS: tuple[Pruner, ...] = ("median", "hyperband", "none")


@dataclass(frozen=True)
class Spec:
    """A sweep.

    Attributes:
        folder: of the sweep; runs are in FOLDER/trials/NUMBER.
        fixed: overrides that all trials share.
        text: the configuration file, as it was when the sweep began.
        metric: `evaluate.metric`, on validation data, by which trials are compared.
        evaluations: of one trial, as it was planned.
        run: the folder that the configuration names for a run of its own.
        trials: how many, of all workers together.
    """

    folder: Path
    space: tuple[Dimension, ...]
    fixed: tuple[str, ...]
    text: str
    metric: str
    sampler: Sampler
    pruner: Pruner
    seed: int
    trials: int
    run: str = ""
    evaluations: int = 1

    @property
    def direction(self) -> Literal["maximize", "minimize"]:
        return "maximize" if Metric.of(self.metric).higher_is_better else "minimize"

    @property
    def name(self) -> str:
        return self.folder.name

    def run_of(self, number: int) -> Path:
        """The folder of a trial's run."""
        return self.folder / TRIALS / f"{number:04d}"

    def words(self, point: Point, run: Path) -> list[str]:
        """All overrides of a trial. Test data stay out: what is chosen among trials must not have seen them."""
        return [*self.fixed, *point, f"run={json.dumps(str(run), ensure_ascii=False)}", "data.test=null"]

    def config(self, point: Point, number: int) -> Config:
        """The configuration of a trial.

        Raises:
            ConfigError: its mistakes.
        """
        return configs.load(self.folder / BASE, self.words(point, self.run_of(number)))

    def write(self) -> None:
        """Into the sweep's folder.

        Raises:
            OSError: it cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in (TRIALS, LOGS):
            (self.folder / name).mkdir(exist_ok=True)
        write_whole(self.folder / BASE, self.text)
        write_whole(self.folder / FILE, json_text(self.data()))

    def data(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "format": 1,
            "space": {d.key: d.text for d in self.space},
            "fractions": [d.key for d in self.space if isinstance(d, Range) and not d.whole],
            "fixed": list(self.fixed),
            "metric": self.metric,
            "sampler": self.sampler,
            "pruner": self.pruner,
            "seed": self.seed,
            "trials": self.trials,
            "run": self.run,
            "evaluations": self.evaluations,
        }

    @classmethod
    def read(cls, folder: Path) -> Spec | None:
        """Of a sweep's folder; None where none has begun there.

        Raises:
            UserError: the files are not what tlx wrote.
        """
        file = folder / FILE
        if not file.exists():
            return None
        try:
            said = from_json(file.read_bytes())
            space, _ = parse([f"{key}={text}" for key, text in said["space"].items()])
            fractions = set(said["fractions"])
            return cls(
                folder=folder,
                space=tuple(_settled(d, d.key not in fractions) for d in space),
                fixed=tuple(map(str, said["fixed"])),
                text=(folder / BASE).read_text(encoding="utf-8"),
                metric=str(said["metric"]),
                sampler=cast(Sampler, said["sampler"]),
                pruner=cast(Pruner, said["pruner"]),
                seed=int(said["seed"]),
                trials=int(said["trials"]),
                run=str(said["run"]),
                evaluations=int(said["evaluations"]),
            )
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(
                f"is not what tlx wrote: {error}", where=str(file), todo="name another folder by --out"
            ) from error

    def refuse_other(self, other: Spec) -> None:
        """
        Raises:
            UserError: the sweep in the folder is another one than `other`, which was asked for; with what differs.
        """
        lines = differences(self._compared(), other._compared())
        if lines:
            raise UserError(
                "another sweep has begun here (there -> asked for):\n    " + "\n    ".join(lines),
                where=str(self.folder),
                todo=f"--out with another folder; or go on with that one: tlx sweep {shlex.quote(str(self.folder))}",
            )

    def _compared(self) -> dict[str, Any]:
        """What a further worker must agree with, in words."""
        said = self.data()
        own = {f"space {key}": str(text) for key, text in said["space"].items()}
        own |= {key: str(said[key]) for key in ("sampler", "pruner", "seed")}
        own |= {f"set {word.partition('=')[0]}": word.partition("=")[2] for word in self.fixed}
        return own | flat(from_yaml(self.text), "configuration")


def _settled(dimension: Dimension, whole: bool) -> Dimension:
    return replace(dimension, whole=whole) if isinstance(dimension, Range) else dimension
