"""MLflow: one run per training, however often it was started, each step in it once; tables, pictures, weights."""

from __future__ import annotations

import io
import json
import math
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tlx.tracking import surroundings
from tlx.tracking.phase_end import PhaseEnd, Table, phase_ends
from tlx.tracking.tensorboard_run import flat
from tlx.tracking.tracker import RunInfo, TrackingError, of_test
from tlx.tracking.trained import Artifacts, TrainedModel

RUN_ID = "tlx.run_id"
"""The tag by which a later start finds the run."""

PARAMETER, BATCH = 6000, 1000
"""Characters of a parameter; metrics that MLflow takes at once."""


class MlflowRun:
    """A run of an MLflow store.

    Args:
        client: mlflow's. run_id: MLflow's.
        rows: those before this start, of which the store may lack some.
    """

    def __init__(
        self, run: RunInfo, client: Any, run_id: str, artifacts: Artifacts, rows: Iterable[Mapping[str, Any]]
    ) -> None:
        self.run, self.client, self.run_id, self.artifacts = run, client, run_id, artifacts
        # a step's numbers go as one, `step` among them: what a later start trains again is not sent again
        self._reached = max((int(known.value) for known in client.get_metric_history(run_id, "step")), default=-1)
        self._held: dict[str, Any] = {}
        self._ends = {end.step: end for end in phase_ends(run.folder)}
        self.finish_s = 900.0 if artifacts != "none" else 0.0
        for row in rows:
            self.log(row)

    def log(self, row: Mapping[str, Any]) -> None:
        """Takes a row; it goes when the next step begins, with all that belongs to its own."""
        if self._held and row["step"] < self._held["step"]:
            return
        if self._held and row["step"] != self._held["step"]:
            self._send()
        self._held |= row

    def phase_ended(self, end: PhaseEnd) -> None:
        self._ends[end.step] = end

    def model_trained(self, model: TrainedModel) -> None:
        """Uploads weights, where that was asked for.

        Raises:
            TrackingError: they are gone.
        """
        if self.artifacts == "none" or (self.artifacts == "best" and "best" not in model.aliases):
            return
        if not model.file.is_file():
            raise TrackingError(f"{model.file} is not there")
        for alias in model.aliases:
            self.client.log_artifact(self.run_id, str(model.file), f"model/{alias}")
            self.client.log_text(self.run_id, model.text, f"model/{alias}/README.md")
            about = json.dumps(
                {**dict(model.about), "step": model.step, "weights": model.weights}, indent=2, default=str
            )
            self.client.log_text(self.run_id, about, f"model/{alias}/model.json")

    def finish(self, result: Mapping[str, Any]) -> None:
        finished = result.get("finished", True)
        if finished:
            self._send()
            best, step = result.get("best") or {}, int(result.get("step", 0))
            found = {f"best/{best['metric']}": best["value"]} if best else {}
            self._metrics({**found, **of_test(result)}, step)
        if (self.run.folder / "log.txt").is_file():
            self.client.log_artifact(self.run_id, str(self.run.folder / "log.txt"))
        ended = "FINISHED" if finished else "FAILED" if result.get("fault") else "KILLED"
        self.client.set_terminated(self.run_id, status=ended)

    def _send(self) -> None:
        row, self._held = self._held, {}
        step = row.get("step", -1)
        if step <= self._reached:
            return
        if (end := self._ends.get(step)) is not None:
            self._send_phase(end)
        self._metrics({k: v for k, v in row.items() if k != "step"} | {"step": step}, step)
        self._reached = step

    def _send_phase(self, end: PhaseEnd) -> None:
        self.client.set_tag(self.run_id, f"tlx.phase.{end.index}", f"{end.name}: steps {end.start + 1} to {end.step}")
        for table in (*end.tables(), *(c.largest for c in end.confusions())):
            self.client.log_text(self.run_id, _csv(table), f"{_safe(end.name)}/{table.name}.csv")
        shown = end.pictures()
        columns = ("id", "label", "prediction", "probability", "right")
        rows = tuple((p.id, p.label, p.told, p.probability, p.right) for p in shown)
        if shown:
            text = _csv(Table("predictions", columns, rows))
            self.client.log_text(self.run_id, text, f"{_safe(end.name)}/predictions.csv")
        for picture in shown:
            if picture.jpeg is not None:
                self._picture(picture.jpeg, f"{_safe(end.name)}/predictions/{picture.id}.png")

    def _picture(self, jpeg: bytes, place: str) -> None:
        from PIL import Image

        with Image.open(io.BytesIO(jpeg)) as image:
            self.client.log_image(self.run_id, image.convert("RGB"), place)

    def _metrics(self, values: Mapping[str, Any], step: int) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        numbers = {k: float(v) for k, v in values.items() if isinstance(v, int | float) and math.isfinite(v)}
        entities = [Metric(_safe(name), value, now, step) for name, value in numbers.items()]
        for place in range(0, len(entities), BATCH):
            self.client.log_batch(self.run_id, metrics=entities[place : place + BATCH])


@dataclass(frozen=True)
class Wanted:
    """What a run is called and what it gets. `tags`: of a new run; of them ``mlflow.runName`` is its name."""

    experiment: str
    tags: Mapping[str, str]
    artifacts: Artifacts
    code: surroundings.Code


def begin(run: RunInfo, client: Any, wanted: Wanted, rows: Iterable[Mapping[str, Any]]) -> MlflowRun:
    """Starts a run of an experiment, or goes on with the one that an earlier start has begun."""
    found = client.get_experiment_by_name(wanted.experiment)
    place = found.experiment_id if found is not None else client.create_experiment(wanted.experiment)
    own = client.search_runs([place], f"tags.`{RUN_ID}` = '{run.run_id}'", max_results=1)
    if own:
        run_id = own[0].info.run_id
        client.update_run(run_id, status="RUNNING")
    else:
        run_id = client.create_run(place, tags={RUN_ID: run.run_id, **wanted.tags}).info.run_id
    _describe(run, client, run_id, wanted.code)
    return MlflowRun(run, client, run_id, wanted.artifacts, rows)


def _describe(run: RunInfo, client: Any, run_id: str, code: surroundings.Code) -> None:
    """Parameters, of which MLflow does not let any change: those of the first start stay, and the configuration of the
    newest is an artifact."""
    from mlflow.entities import Param, RunTag

    known = client.get_run(run_id).data.params
    own = {_safe(name): str(value)[:PARAMETER] for name, value in flat(run.config)}
    new = [Param(name, value) for name, value in own.items() if name not in known]
    ran_in = surroundings.read(run.folder)
    if code == "none":
        ran_in = {name: of for name, of in ran_in.items() if name not in ("commit", "modified")}
    tags = [RunTag(f"tlx.{name}", str(value)) for name, value in flat(ran_in)]
    tags += [RunTag("mlflow.source.git.commit", str(ran_in["commit"]))] if "commit" in ran_in else []
    for place in range(0, len(new), 100):
        client.log_batch(run_id, params=new[place : place + 100])
    client.log_batch(run_id, tags=tags)
    client.log_dict(run_id, dict(run.config), "config.json")
    if code == "diff" and (patch := surroundings.patch(run.folder)) is not None:
        client.log_artifact(run_id, str(patch))


def _safe(name: str) -> str:
    """As MLflow takes names of metrics, parameters and files."""
    return re.sub(r"[^\w./ -]", "_", name).strip("/ ") or "_"


def _csv(table: Table) -> str:
    import csv

    with io.StringIO() as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(table.columns)
        writer.writerows(table.rows)
        return file.getvalue()
