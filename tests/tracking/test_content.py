"""What trackers show beside numbers, of one real training with all of them: read back from W&B's offline files by the
client's own reader, from a server after ``tlx track sync``, from TensorBoard's events, from an MLflow store, from a
tracker of an outside package."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from composed import two_phases
from images import make_shards
from places import ROOT
from tracked import records
from wandb_server import FakeServer, served

from tlx.plan.comparable import comparable
from tlx.plan.config import parse
from tlx.runs.metrics_file import MetricsFile, read_rows
from tlx.tracking import RunInfo, guarded, wandb
from tlx.tracking.phase_end import EVEN, MISTAKES, PhaseEnd, phase_ends
from tlx.tracking.sync import sync
from tlx.tracking.tracker import GuardedTracker
from tlx.tracking.wandb_service import let_go
from tlx.train import command as training

WANDB = {
    "name": "wandb", "project": "p", "mode": "offline", "group": "seeds", "job_type": "fit", "run_name": "first",
    "notes": "why", "tags": ["a"], "artifacts": "all", "console": True, "alerts": True, "code": "diff",
}  # fmt: skip


WHO = ["-c", "user.name=me", "-c", "user.email=me@host"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Iterator[Path]:
    """A training with every tracker."""
    pytest.importorskip("mlflow")
    out = tmp_path_factory.mktemp("content")
    shards = make_shards(out / "s", classes=3, per_class={"train": 8, "val": 20}, size=32)
    mlflow = {"name": "mlflow", "uri": f"sqlite:///{out}/mlflow.db", "experiment": "e", "artifacts": "best"}
    trackers = [WANDB, "tensorboard", mlflow, "outside_parts:diary"]
    with pytest.MonkeyPatch.context() as patched:
        for name in [n for n in os.environ if n.startswith(("WANDB_", "MLFLOW_")) or n == "RANK"]:
            patched.delenv(name)
        patched.setenv("WANDB_ERROR_REPORTING", "false")
        patched.syspath_prepend(str(ROOT / "tests" / "outside" / "src"))
        patched.chdir(out)  # MLflow keeps artifacts beside where it runs
        (out / "code.py").write_text("a = 1\n")
        for words in (["init", "-q"], ["add", "code.py"], [*WHO, "commit", "-q", "-m", "first"]):
            subprocess.run(["git", *words], check=True)
        (out / "code.py").write_text("a = 2\n")
        track = {"every": 1, "report": False, "trackers": trackers}
        training.train(parse({**two_phases(shards, out / "run"), "track": track}))
        yield out / "run"


def steps(run: Path) -> list[int]:
    return sorted({row["step"] for row in read_rows(run / "metrics.jsonl")})


def of(found: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [record[kind] for record in found if record["type"] == kind]


@pytest.fixture(scope="module")
def offline(run: Path) -> list[dict[str, Any]]:
    return records(run)


def table(run: Path, name: str, step: int) -> dict[str, Any]:
    (file,) = (run / "wandb" / "latest-run" / "files" / "media" / "table").glob(f"{name}_{step}_*.table.json")
    return json.loads(file.read_text())


# --- W&B, offline


def test_the_run_is_named_grouped_and_noted_and_its_config_is_comparable(offline) -> None:
    (header,) = of(offline, "run")
    about = [header.get(key) for key in ("display_name", "run_group", "job_type", "notes", "tags", "project")]
    assert about == ["first", "seeds", "fit", "why", ["a"], "p"]
    config = header["config"]["update"]
    parts = ("head", "unfreeze", "task", "objective", "optimizer")
    assert [config[part]["name"] for part in parts] == [
        "linear",
        "two_phase",
        "classification",
        "cross_entropy",
        "adamw",
    ]
    assert config["phases"]["each"]["curve"] == {"name": "constant"}
    assert config["track"]["trackers"]["1"]["name"] == "tensorboard"
    assert config["plan"]["phases"]["fine_tuning"] == {"start": 6, "stop": 12}
    assert config["environment"]["versions"]["torch"]
    assert header["git"]["commit"] == config["code"]["commit"]


def test_each_step_is_there_once_with_its_tables_at_the_ends_of_phases(run, offline) -> None:
    found = [record["item"] for record in of(offline, "history")]
    assert [row["step"] for row in found] == steps(run) == list(range(1, 13))
    for row in found:
        assert row["phase_index"] == (row["step"] > 6)
        assert {"train/grad_norm", "time/images_per_s", "time/data_wait", "lr/fc", "update_ratio/fc"} <= row.keys()
        assert ("lr/features.0.0" in row) == ("update_ratio/features.0.0" in row) == (row["step"] > 6)
        kinds = {key.rpartition(".")[0] for key in row if key.endswith("._type")}
        names = ("per_class", "largest_confusions", "confusion_matrix_table", "predictions")
        ends = {6: "feature_extraction", 12: "fine_tuning"}
        expected = {f"{ends[row['step']]}/{name}" for name in names} | {"phases"} if row["step"] in ends else set()
        assert kinds == expected


def test_the_summary_is_the_best_by_each_metrics_direction(run, offline) -> None:
    summary: dict[str, Any] = {}
    for record in of(offline, "summary"):
        summary |= record["update"]
    rows = read_rows(run / "metrics.jsonl")
    assert summary["val/top1"] == summary["best/val/top1"] == max(r["val/top1"] for r in rows if "val/top1" in r)
    assert summary["val/loss"] == min(r["val/loss"] for r in rows if "val/loss" in r)
    none = {record["name"] for record in of(offline, "metric") if record.get("summary", {}).get("none")}
    assert none == {"val/top1", "val/loss"}, "W&B would write the latest over them"


def test_tables_say_what_was_told(run, offline) -> None:
    (end, last) = phase_ends(run)
    per_class = table(run, "feature_extraction/per_class", 6)
    assert per_class["columns"] == ["class", "support", "told", "precision", "recall", "f1"]
    told = json.loads((run / "result.json").read_text())["phases"]["feature_extraction"]["last"]["val/per_class"]
    assert [row[0] for row in per_class["data"]] == ["class0", "class1", "class2"]
    assert [row[1] for row in per_class["data"]] == [20, 20, 20]
    assert [row[4] for row in per_class["data"]] == pytest.approx(told)
    matrix = table(run, "feature_extraction/confusion_matrix_table", 6)["data"]
    wrong = sum(count for truth, guess, count in matrix if truth != guess)
    assert sum(count for _, _, count in matrix) == 60
    assert wrong == sum(row[2] for row in table(run, "feature_extraction/largest_confusions", 6)["data"]) > 0
    place = "feature_extraction/predictions.table.json"
    listed = (file for record in of(offline, "artifact") for file in record["manifest"]["contents"])
    (file,) = (Path(file["local_path"]) for file in listed if file["path"] == place)
    assert file.is_relative_to(run), "and not in the home of whoever trains"
    pictures = json.loads(file.read_text())
    assert pictures["columns"] == ["id", "picture", "label", "prediction", "probability", "right"]
    assert EVEN < len(pictures["data"]) <= EVEN + MISTAKES
    for _, picture, label, guess, probability, right in pictures["data"]:
        assert (label == guess) is right
        assert 1 / 3 - 0.01 <= probability <= 1
        assert picture["width"] == 32
    assert [row[:4] for row in table(run, "phases", 12)["data"]] == [
        ["feature_extraction", 0, 1, 6],
        ["fine_tuning", 1, 7, 12],
    ]
    assert (end.step, last.step) == (6, 12)


def test_weights_the_difference_of_the_code_the_console_and_an_alert(run, offline) -> None:
    made = {record["name"]: record for record in of(offline, "artifact") if record["type"] != "run_table"}
    (model,) = [record for name, record in made.items() if name.startswith("model-")]
    assert set(model["aliases"]) == {"latest", "best", "last"}
    assert "3 outputs (classification): the best and last weights" in model["description"]
    assert json.loads(model["metadata"])["outputs"] == ["class0", "class1", "class2"]
    (file,) = model["manifest"]["contents"]
    assert file["local_path"].endswith("step-00000012/model.safetensors")
    (code,) = [record for name, record in made.items() if name.startswith("code-")]
    assert code["manifest"]["contents"][0]["path"] == "code.patch"
    assert "-a = 1\n+a = 2\n" in (run / "code.patch").read_text()
    said = "".join(record["line"] for record in of(offline, "output_logger"))
    assert said.splitlines()[-1].startswith("step 12/12")
    assert said == (run / "log.txt").read_text()
    (alert,) = of(offline, "alert")
    assert (alert["title"], alert["level"]) == ("run is done", "INFO")
    assert not (Path.home() / ".local/share/wandb/artifacts/staging" / "never").exists()


# --- W&B, later


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    import wandb as library

    library.teardown()  # it remembers where the server is
    with served() as server:
        for name in [n for n in os.environ if n.startswith("WANDB_")]:
            monkeypatch.delenv(name)
        for name, value in server.account.items():
            monkeypatch.setenv(name, value)
        yield server
        with contextlib.suppress(Exception):
            library.teardown()


def filled(config: dict[str, Any]) -> dict[str, Any]:
    """Without empty mappings, which the service leaves out, and what it adds."""
    of = {key: filled(value) if isinstance(value, dict) else value for key, value in config.items() if key != "_wandb"}
    return {key: value for key, value in of.items() if value != {}}


def copied(run: Path, to: Path, **tracker: Any) -> Path:
    """Without what W&B wrote, and with other arguments of its tracker."""
    shutil.copytree(run, to, symlinks=True, ignore=shutil.ignore_patterns("wandb", "tensorboard"))
    config = yaml.safe_load((to / "config.yaml").read_text())
    config["track"]["trackers"][0] |= tracker
    (to / "config.yaml").write_text(yaml.safe_dump(config))
    return to


def test_what_was_offline_becomes_the_same_run_on_the_server(run, offline, server, tmp_path) -> None:
    folder = copied(run, tmp_path / "run", registry="wandb-registry-model/flowers")
    done = sync(folder)
    assert "sent, too: the best and last weights" in done.text
    (sent,) = server.runs.values()
    assert sent.steps == list(range(1, 13))
    (header,) = of(offline, "run")
    ours, theirs = dict(header["config"]["update"]), {k: v["value"] for k, v in sent.config.items()}
    for config in (ours, theirs):
        config["track"]["trackers"]["0"].pop("registry", None)
    assert filled(ours) == filled(theirs)
    about = ("displayName", "groupName", "jobType", "notes", "tags", "commit")
    assert [sent.about.get(key) for key in about[:5]] == ["first", "seeds", "fit", "why", ["a"]]
    assert sent.about["commit"] == header["git"]["commit"]
    tables = [a.name for a in server.artifacts if a.about["artifactTypeName"] == "run_table"]
    assert len(tables) == 10
    model = server.artifact(f"model-{sent.name}")
    assert set(model.aliases) == {"best", "last", "latest"}
    assert (
        server.uploads[model.files["model.safetensors"]]
        == (folder / "checkpoints" / "step-00000012" / "model.safetensors").read_bytes()
    )
    (link,) = model.links
    assert (link["artifactPortfolioName"], link["projectName"]) == ("flowers", "wandb-registry-model")
    assert {said["alias"] for said in link["aliases"]} == {"best", "last"}
    assert [line for line in sent.console.values() if "step 12/12" in line]
    count = len(server.artifacts)
    assert "nothing was sent" in sync(folder).text
    assert (sent.steps, len(server.artifacts)) == (list(range(1, 13)), count)


def test_tables_come_once_when_a_start_is_killed_at_the_end_of_a_phase(run, server, tmp_path) -> None:
    folder, both = copied(run, tmp_path / "run"), phase_ends(run)
    result, rows = json.loads((folder / "result.json").read_text()), read_rows(run / "metrics.jsonl")
    progress = {"step": 6, "phases": {"feature_extraction": result["phases"]["feature_extraction"]}}
    for name in ("result.json", "wandb.json", "metrics.jsonl"):
        (folder / name).unlink()
    (folder / "checkpoints" / "latest" / "state.json").write_text(json.dumps({"progress": progress}))
    metrics = MetricsFile(folder / "metrics.jsonl")

    def start(first: int, last: int, end: PhaseEnd) -> GuardedTracker:
        logger = guarded("wandb", lambda: wandb(RunInfo(folder, "a", "id", {}, first > 1), project="p"))
        for row in (row for row in rows if first <= row["step"] <= last):
            metrics.append(row)
            logger.log(row)
        logger.phase_ended(end)
        return logger

    start(1, 6, both[0])
    let_go()  # nothing is sent any more: as a kill
    start(7, 12, both[1]).finish({**result, "finished": True})
    (sent,) = server.runs.values()
    assert sent.steps == list(range(1, 13))
    shown = {row["step"]: {key for key in row if key.endswith("per_class")} for row in sent.sent}
    assert {step: keys for step, keys in shown.items() if keys} == {
        6: {"feature_extraction/per_class"},
        12: {"fine_tuning/per_class"},
    }


def test_what_a_folder_lacks_is_said(run, server, tmp_path) -> None:
    folder = copied(run, tmp_path / "run")
    shutil.rmtree(folder / "checkpoints")
    shutil.rmtree(folder / "predictions")
    said = sync(folder).text
    assert "not sent: the best and last weights" in said
    assert "not sent: tables of phase feature_extraction (the run folder has no predictions of its end)" in said
    (sent,) = server.runs.values()
    assert sent.steps == list(range(1, 13))


def test_a_server_that_refuses_tables_gets_the_numbers(run, server, tmp_path, monkeypatch, capfd) -> None:
    from wandb.sdk.wandb_run import Run

    def refuses(*_: object, **__: object) -> None:
        raise RuntimeError("no room for artifacts")

    monkeypatch.setattr(Run, "_log_artifact", refuses)
    folder = copied(run, tmp_path / "run", artifacts="none", code="none")
    assert "not sent: tables of phase fine_tuning (W&B: no room for artifacts)" in sync(folder).text
    (sent,) = server.runs.values()
    assert sent.steps == list(range(1, 13))
    assert capfd.readouterr().err.count("warning") == 2


# --- TensorBoard


def test_tensorboard_has_texts_pictures_figures_and_hyperparameters(run) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    plugin_data = pytest.importorskip("tensorboard.plugins.hparams.plugin_data_pb2")
    reader = events.EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0, "tensors": 0})
    reader.Reload()
    assert [e.step for e in reader.Scalars("train/grad_norm")] == list(range(1, 13))

    def text(name: str) -> list[tuple[int, str]]:
        return [(e.step, e.tensor_proto.string_val[0].decode()) for e in reader.Tensors(f"{name}/text_summary")]

    assert [(step, said.partition(",")[0]) for step, said in text("phase")] == [
        (1, "feature_extraction"),
        (7, "fine_tuning"),
    ]
    assert '"two_phase"' in text("config")[0][1]
    assert "| fine_tuning | 6 | 12 |" in text("plan")[0][1]
    assert "| class0 | 20 |" in text("feature_extraction/per_class")[0][1]
    assert "3 outputs" in text("model/best")[0][1]
    images = reader.Tags()["images"]
    assert "feature_extraction/confusion_matrix" in images
    assert sum(name.startswith("feature_extraction/predictions/") for name in images) > EVEN
    (shown,) = reader.Images("feature_extraction/predictions/00")
    assert (shown.width, shown.height, shown.step) == (32, 32, 6)
    session = reader.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    hyper = plugin_data.HParamsPluginData.FromString(session).session_start_info.hparams
    assert hyper["optimizer.name"].string_value == "adamw"
    best = json.loads((run / "result.json").read_text())["best"]["value"]
    assert [round(e.value, 5) for e in reader.Scalars("hparam/best/val/top1")] == [round(best, 5)]


# --- MLflow


def test_mlflow_has_parameters_metrics_by_step_tags_and_artifacts(run) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{run.parent}/mlflow.db")
    (found,) = client.search_runs([client.get_experiment_by_name("e").experiment_id])
    assert (found.info.status, found.info.run_name) == ("FINISHED", "run")
    assert found.data.params["optimizer.name"] == "adamw"
    assert found.data.params["backbone.args.dropout"] == "0.1"
    assert found.data.tags["tlx.phase.1"] == "fine_tuning: steps 7 to 12"
    assert found.data.tags["tlx.versions.torch"]
    rows = read_rows(run / "metrics.jsonl")
    for name in ("train/loss", "val/top1", "update_ratio/fc"):
        ours = {row["step"]: row[name] for row in rows if name in row}
        theirs = client.get_metric_history(found.info.run_id, name)
        assert sorted(m.step for m in theirs) == sorted(ours)
        assert {m.step: m.value for m in theirs} == pytest.approx(ours)
    assert found.data.metrics["best/val/top1"] == max(r["val/top1"] for r in rows if "val/top1" in r)

    def paths(below: str | None = None) -> set[str]:
        listed = client.list_artifacts(found.info.run_id, below)
        return {p for f in listed for p in (paths(f.path) if f.is_dir else {f.path})}

    have = paths()
    assert {"config.json", "log.txt", "feature_extraction/per_class.csv", "fine_tuning/predictions.csv"} <= have
    assert {"model/best/model.safetensors", "model/best/model.json", "model/best/README.md"} <= have
    assert sum(p.startswith("feature_extraction/predictions/") for p in have) > EVEN


# --- a tracker of an outside package


def test_a_tracker_from_outside_hears_of_phases_pictures_and_weights(run) -> None:
    said = (run / "diary.txt").read_text().splitlines()
    kinds = [line.split()[0] for line in said if not line.startswith("picture")]
    assert kinds.count("phase") == kinds.count("table") == 2
    first = next(n for n, line in enumerate(said) if line.startswith("phase"))
    assert (said[first - 1], said[first].split()[1:3]) == ("row 6", ["feature_extraction", "6"])
    pictures = [line.split() for line in said if line.startswith("picture")]
    assert len(pictures) > 2 * EVEN
    assert all(int(words[-1]) > 0 for words in pictures)
    assert said[-2:] == ["model best+last 12 model.safetensors True", "end True"]


# --- the configuration


def test_a_part_is_always_a_mapping() -> None:
    raw = {
        "unfreeze": "two_phase", "head": {"name": "linear", "dropout": 0.1},
        "optimizer": {"name": "sgd", "args": {"momentum": 1}},
        "transforms": ["horizontal_flip", {"name": "resize", "size": 2}],
        "phases": {"each": {"curve": "cosine", "lr": 1.0}},
        "data": {"train": "https://me:PASSW0RD@host/train?sig=SIGN4TURE", "batch": 8}, "unknown": "kept", "mix": None,
    }  # fmt: skip
    assert comparable(raw) == {
        "unfreeze": {"name": "two_phase"}, "head": {"name": "linear", "dropout": 0.1},
        "optimizer": {"name": "sgd", "momentum": 1},
        "transforms": {"0": {"name": "horizontal_flip"}, "1": {"name": "resize", "size": 2}},
        "phases": {"each": {"curve": {"name": "cosine"}, "lr": 1.0}},
        "data": {"train": "https://host/train", "batch": 8}, "unknown": "kept", "mix": None,
    }  # fmt: skip
