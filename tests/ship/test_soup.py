"""Averages of trained networks: the right weights, the right choice, statistics of norms, refusals, a run like any
other; nothing is left of what failed."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from commands import environment, invoke
from composed import finished, raw_of, train
from images import make_folder, make_shards, make_target_shards
from places import SUPPORT
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import tlx
from tlx.base.errors import UserError
from tlx.base.inputs import TRAINING_VIEW
from tlx.data.pixels.transforms import train_transform
from tlx.runs.checkpoint import DESCRIBED, damage
from tlx.ship import card
from tlx.ship import soup as souping
from tlx.ship.average import WeightAverage, estimate_statistics
from tlx.ship.soup import Options, soup

READ = ("--workers", "0", "--batch", "8")
ASK = (*READ, "--bootstrap", "20")
GROUPS = {"name": "toys:small", "weights": "none", "args": {"norm": "group"}}
BATCHES = {"name": "toys:small", "weights": "none"}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("s") / "s", classes=3, per_class={"train": 12, "val": 7}, size=16)


@pytest.fixture(scope="module")
def start(shards, tmp_path_factory):
    """What all begin with: averages of networks with nothing in common are none."""
    folder = tmp_path_factory.mktemp("start")
    phases = {"each": {"lr": 0.01, "duration": "2ep"}}
    return {
        name: finished(raw_of(shards, folder / name, backbone=backbone, phases=phases))
        for name, backbone in (("groups", GROUPS), ("batches", BATCHES))
    }


def trained(shards, folder, start, backbone, **over):
    begun = {**backbone, "weights": str(start)}
    raw = raw_of(shards, folder, backbone=begun, head={"name": "linear", "keep": True}, unfreeze="all", **over)
    return finished(raw)


@pytest.fixture(scope="module")
def runs(shards, start, tmp_path_factory):
    """Four of GroupNorm, of which the last has gone astray."""
    folder, made = tmp_path_factory.mktemp("r"), []
    for seed, rate in ((1, 0.01), (2, 0.01), (3, 0.01), (4, 0.4)):
        phases = {"each": {"lr": rate, "duration": "2ep"}}
        made.append(trained(shards, folder / f"r{seed}", start["groups"], GROUPS, seed=seed, phases=phases))
    return made


@pytest.fixture(scope="module")
def moving(shards, start, tmp_path_factory):
    """Two of BatchNorm, whose statistics have moved."""
    folder = tmp_path_factory.mktemp("m")
    phases = {"each": {"lr": 0.05, "duration": "2ep"}}
    return [
        trained(shards, folder / f"m{seed}", start["batches"], BATCHES, seed=seed, phases=phases) for seed in (1, 2)
    ]


def file_of(run, which="best"):
    return run / "checkpoints" / which / "model.safetensors"


def made(*words):
    done = invoke("soup", *words, *ASK, "--json")
    if done.exception is not None:
        raise done.exception
    return json.loads(done.stdout)


def mean_of(runs):
    """In float64, by numpy."""
    files = [load_file(file_of(run)) for run in runs]
    return {name: np.mean([f[name].double().numpy() for f in files], axis=0).astype(np.float32) for name in files[0]}


def metric_of(place, name, *words):
    done = invoke("evaluate", place, *READ, "--bootstrap", "0", "--json", *words)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)["metrics"][name]["value"]


# The right weights, the right choice


def test_uniform_is_numpys_mean(runs, tmp_path):
    found = made(*runs, tmp_path / "soup", "--method", "uniform")
    weights = load_file(file_of(tmp_path / "soup"))
    for name, wanted in mean_of(runs).items():
        np.testing.assert_allclose(weights[name].numpy(), wanted, rtol=2e-7, atol=0)
    assert [one["taken"] for one in found["ingredients"]] == [True] * 4
    assert found["soup"]["value"] == found["value"] == metric_of(tmp_path / "soup", "top1")
    assert found["soup"]["low"] <= found["value"] <= found["soup"]["high"]


@pytest.mark.parametrize("metric", ["loss", "top1", "brier"])
def test_greedy_is_the_papers_recipe(runs, shards, tmp_path, metric):
    """Recipe 1 of Wortsman et al. 2022, by means of numpy in files of weights that `tlx evaluate` judges."""
    sign = 1 if metric == "top1" else -1
    said = safe_open(file_of(runs[0]), "pt").metadata()

    def judged(some):
        save_file({n: torch.from_numpy(a) for n, a in mean_of(some).items()}, tmp_path / "x.safetensors", metadata=said)
        return sign * metric_of(tmp_path / "x.safetensors", metric, "--data", shards / "val", "--trusted")

    order = sorted(runs, key=lambda run: -judged([run]))
    taken = []
    for run in order:
        if not taken or judged([*taken, run]) >= judged(taken):
            taken.append(run)
    found = made(*runs, tmp_path / "soup", "--metric", metric)
    assert [one["name"] for one in found["ingredients"]] == list(map(str, order))
    assert [one["name"] for one in found["ingredients"] if one["taken"]] == list(map(str, taken))
    assert 1 < len(taken) < 4 or metric == "top1"
    assert sign * found["value"] == pytest.approx(judged(taken), abs=1e-6)
    assert sign * found["value"] >= sign * found["ingredients"][0]["value"]
    for name, wanted in mean_of(taken).items():
        np.testing.assert_allclose(load_file(file_of(tmp_path / "soup"))[name].numpy(), wanted, rtol=2e-7, atol=0)


@pytest.mark.slow
def test_each_alone_has_the_number_of_tlx_evaluate(runs, tmp_path):
    done = invoke("soup", *runs[:2], tmp_path / "soup", "--json")  # with what both are by default
    found = json.loads(done.stdout)
    for one in found["ingredients"]:
        told = json.loads(invoke("evaluate", one["name"], "--bootstrap", "0", "--json").stdout)
        assert told["metrics"]["top1"]["value"] == one["value"]
        assert told["weights"]["sha256"] == one["sha256"]


def choice_of(monkeypatch, tmp_path, runs, alone, together, **options):
    """What is taken where evaluations say this."""
    values, steps = iter([*alone, *together]), itertools.count()
    plain = souping.Making._value

    def told(making, look):
        plain(making, look)
        key = id(look)
        if key not in seen:
            seen[key] = (next(values), look)
        return seen[key][0]

    seen = {}
    monkeypatch.setattr(souping.Making, "_value", told)
    out = tmp_path / f"soup{next(steps)}"
    reading = dataclasses.replace(Options().reading, workers=0)
    found = soup(runs, out, Options(bootstrap=0, reading=reading, **options))
    names = [str(run) for run in runs]
    return [(names.index(one["name"]), one["taken"]) for one in found["ingredients"]]


def test_ties_keep_the_order_of_the_words_and_an_average_as_good_is_taken(runs, tmp_path, monkeypatch):
    found = choice_of(monkeypatch, tmp_path, runs[:3], (0.5, 0.7, 0.7), (0.7, 0.69))
    assert found == [(1, True), (2, True), (0, False)]


def test_lower_is_better_where_it_is(runs, tmp_path, monkeypatch):
    found = choice_of(monkeypatch, tmp_path, runs[:3], (0.5, 0.7, 0.6), (0.51, 0.5), metric="ece")
    assert found == [(0, True), (2, False), (1, True)]


def test_of_a_soup_of_one_the_weights_are_the_best_ones_to_the_bit(runs, tmp_path, monkeypatch):
    assert choice_of(monkeypatch, tmp_path, runs[:2], (0.5, 0.7), (0.6,)) == [(1, True), (0, False)]
    own, best = load_file(file_of(tmp_path / "soup0")), load_file(file_of(runs[1]))
    assert all(torch.equal(own[name], best[name]) for name in best)


# Norms


def test_statistics_that_differ_are_estimated_anew_and_others_stay(moving, shards, tmp_path):
    """Means over full batches of what the norm is given; counters are the first one's where nothing was estimated."""
    found = made(*moving, tmp_path / "soup", "--method", "uniform")
    assert found["statistics"] == {"norms": 3, "pictures": 36}
    model = tlx.load(tmp_path / "soup")
    files = [load_file(file_of(run)) for run in moving]
    assert not torch.equal(files[0]["features.0.1.running_mean"], files[1]["features.0.1.running_mean"])
    manifest = tlx.Shards.open(str(shards / "train"))
    places = torch.randperm(36, generator=torch.Generator().manual_seed(0))
    view = train_transform([(name, {}) for name in TRAINING_VIEW], model.description.input)
    pixels = model.forward.pixels(manifest, places.sort().values, view=view)[1][
        places
    ]  # the order in which they are drawn
    assert not torch.equal(pixels, model.forward.pixels(manifest, places)[1])
    normalised = pixels.double() / 255 - torch.tensor(model.description.input.mean)[:, None, None]
    normalised /= torch.tensor(model.description.input.std)[:, None, None]
    with torch.inference_mode():
        given = model.module.features[0][0].double()(normalised)
    batch = min(model.description.batch, 36)
    parts = [given[at : at + batch] for at in range(0, 36 // batch * batch, batch)]
    norm = model.module.features[0][1]
    mean = torch.stack([part.mean((0, 2, 3)) for part in parts]).mean(0)
    variance = torch.stack([part.transpose(0, 1).flatten(1).var(1) for part in parts]).mean(0)
    torch.testing.assert_close(norm.running_mean.double(), mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.running_var.double(), variance, rtol=1e-4, atol=1e-5)


def test_only_what_moved_is_estimated(moving, tmp_path):
    """Statistics that are equal in all were constants of each network."""
    model = tlx.load(moving[0])
    first, second = (load_file(file_of(run)) for run in moving)
    second |= {name: first[name] for name in first if name.startswith("features.1.1.running")}
    average = WeightAverage()
    average.take(first)
    norms = average.write_to(model.module, second)
    assert norms == [model.module.features[0][1], model.module.features[2][1]]
    average.take(second)
    assert average.write_to(model.module) == norms
    before = model.module.features[1][1].running_mean.clone()
    estimate_statistics(model, norms, torch.randint(256, (20, 3, 16, 16), dtype=torch.uint8))
    assert torch.equal(model.module.features[1][1].running_mean, before)
    assert torch.equal(before, first["features.1.1.running_mean"])
    assert not any(module.training for module in model.module.modules())
    assert [norm.momentum for norm in norms] == [0.1, 0.1]


def test_without_training_pictures_it_is_said(moving, tmp_path, shards):
    copies = [Path(shutil.copytree(run, tmp_path / run.name, symlinks=True)) for run in moving]
    for copy in copies:
        config = copy / "config.yaml"
        config.write_text(config.read_text().replace(f"{shards}/train", f"{shards}/gone"))
    done = invoke("soup", *copies, tmp_path / "soup", *ASK)
    assert done.exit_code == 0, done.output
    assert done.stderr.count("statistics of norms (BatchNorm) are the mean of the runs'") == 1
    assert "3 norms had other running statistics in each: averaged" in done.stdout


# A run like any other


@pytest.fixture(scope="module")
def made_of(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("o") / "soup"
    done = invoke("soup", *runs[:3], out, *ASK)
    assert done.exit_code == 0, done.output
    return out, done


def test_it_says_what_it_was_chosen_by_and_on(made_of, runs, shards):
    out, done = made_of
    said = json.loads((out / "model.json").read_text())
    kept = said["provenance"]["averaged"]
    assert (kept["method"], kept["metric"], kept["higher_is_better"]) == ("greedy", "top1", True)
    assert kept["chosen_on"]["data"] == str(shards / "val")
    assert kept["chosen_on"]["digest"] == tlx.Shards.open(str(shards / "val")).digest
    assert {one["sha256"] for one in kept["ingredients"]} == {souping.hash_of(file_of(run)) for run in runs[:3]}
    assert json.loads(safe_open(file_of(out), "pt").metadata()[DESCRIBED])["provenance"] == said["provenance"]
    assert said["metrics"]["top1"] == kept["value"]
    assert "chosen on these pictures" in done.stdout
    assert max(map(len, done.stdout.splitlines()[1:-1])) <= 80
    assert "test" not in said


def test_its_card_names_what_was_averaged_and_its_numbers(made_of):
    out, _ = made_of
    model = tlx.load(out, device="cpu")
    looks = card.looks_of(out, souping.hash_of(file_of(out)))
    told = card.body(model, [], looks, card.Licences()).splitlines()
    taken = [one for one in model.description.provenance["averaged"]["ingredients"] if one["taken"]]
    hashes = ", ".join(one["sha256"][:12] for one in taken)
    assert f"| average of {len(taken)} models | `{hashes}` |" in told
    assert any(f"{looks[0]['metrics']['top1']['value']:.4f}" in line for line in told)


def test_it_has_a_temperature_of_its_own_and_a_look_on_record(made_of, shards):
    out, _ = made_of
    (file,) = (out / "evaluations").glob("*.json")
    (look,) = json.loads(file.read_text())["looks"]
    assert look["weights"] == {"file": str(file_of(out)), "sha256": souping.hash_of(file_of(out)), "step": 0}
    (kept,) = json.loads((out / "temperature.json").read_text())["temperatures"]
    assert tlx.load(out).description.temperature == kept["temperature"] == look["temperature"]["temperature"]
    assert kept["weights"] == look["weights"]["sha256"]


@pytest.mark.slow
def test_all_that_reads_a_run_reads_it(made_of, runs, shards, tmp_path):
    out = Path(shutil.copytree(made_of[0], tmp_path / "soup", symlinks=True))
    photos = make_folder(tmp_path / "p", classes=3, per_class=2, size=(20, 20), seed=5)
    assert damage(out / "checkpoints" / "best") is None
    assert [json.loads(invoke("evaluate", out, *ASK, "--json", "--data", photos).stdout)["look"] for _ in "ab"] == [
        1,
        2,
    ]
    done = invoke("predict", out, photos, *READ)
    rows = list(csv.DictReader(done.stdout.splitlines()))
    assert [row["label"] for row in rows] == [row["label"] for row in tlx.load(out).predict(photos)]
    assert invoke("export", out, tmp_path / "x.pt2", "--to", "torch.export").exit_code == 0
    for words in (("status", out), ("report", out), ("plan", out / "config.yaml"), ("report", out, runs[0])):
        done = invoke(*words)
        assert done.exit_code == 0, done.output
    assert "models' weights, made by tlx soup" in invoke("status", out).stdout
    other = raw_of(
        shards, tmp_path / "on", backbone={**GROUPS, "weights": str(out)}, head={"name": "linear", "keep": True}
    )
    assert train(other)["finished"]
    again = invoke("soup", out, runs[3], tmp_path / "again", *ASK)
    assert again.exit_code == 0, again.output


def test_going_on_in_its_folder_is_refused(made_of):
    out, _ = made_of
    for words in ((), ("--extend", "phases.each.duration=9ep"), ("seed=9",)):
        done = invoke("train", out / "config.yaml", *words)
        assert isinstance(done.exception, UserError)
        assert f"backbone.weights={out}" in str(done.exception)
    assert damage(out / "checkpoints" / "best") is None


def test_several_tasks_with_thresholds_of_their_own(tmp_path):
    for split, seed in (("train", 0), ("val", 1)):
        make_target_shards(tmp_path / "s" / split, samples=34, seed=seed)
    tasks = {"tags": "multilabel", "age": {"name": "regression", "target": "age"}}
    own = {"task": {"name": "multitask", "tasks": tasks}, "backbone": GROUPS, "phases": {"each": {"lr": 0.01}}}
    for seed, over in ((1, {}), (2, {"backbone": {**GROUPS, "weights": str(tmp_path / "1")}})):
        finished(raw_of(tmp_path / "s", tmp_path / str(seed), **{**own, **over}, seed=seed, duration="1ep"))
    found = made(tmp_path / "1", tmp_path / "2", tmp_path / "soup", "--method", "uniform")
    assert found["metric"] == "score"
    model = tlx.load(tmp_path / "soup")
    row = model.evaluate(tmp_path / "s" / "val", batch=8)
    assert found["value"] == row["score"]
    assert model.description.kept["tags/thresholds"] == row["tags/thresholds"]
    assert tlx.load(tmp_path / "1").description.kept["tags/thresholds"] != row["tags/thresholds"]


# Refused


def altered(run, folder, change, *, weights=None):
    """A copy of a run whose file says something else."""
    copy = Path(shutil.copytree(run, folder, symlinks=True))
    file = file_of(copy)
    said = json.loads(safe_open(file, "pt").metadata()[DESCRIBED])
    change(said)
    tensors = {**load_file(file), **(weights or {})}
    save_file(tensors, file, metadata={"format": "pt", DESCRIBED: json.dumps(said)})
    return copy


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda said: said["backbone"].update(name="toys:other"), "network: 'toys:small' -> 'toys:other'"),
        (lambda said: said["backbone"]["args"].update(width=9), "args.width: None -> 9"),
        (lambda said: said["head"].update(name="mlp"), "head.name: 'linear' -> 'mlp'"),
        (lambda said: said["outputs"].reverse(), "outputs: ['class0', 'class1', 'class2'] -> ['class2', "),
        (lambda said: said["targets"]["label"]["target"]["classes"].reverse(), "targets.label.classes"),
        (lambda said: said["task"].update(target="colour"), "task.target"),
        (lambda said: said["input"].update(size=[32, 32]), "input.size: [16, 16] -> [32, 32]"),
        (lambda said: said["input"].update(mean=[0, 0, 0]), "input.mean"),
        (lambda said: said["input"].update(std=[1, 1, 1]), "input.std"),
        (lambda said: said["input"].update(crop_pct=0.5), "input.crop_pct"),
        (lambda said: said.update(upright=False), "upright: True -> False"),
    ],
)
def test_what_is_not_alike_is_named_with_the_run(runs, tmp_path, change, message):
    other = altered(runs[1], tmp_path / "other", change)
    with pytest.raises(UserError) as refused:
        made(runs[0], other, tmp_path / "soup")
    assert message in str(refused.value)
    assert str(refused.value).startswith(f"{other}: it is not built like {runs[0]}")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other"]


def test_tensors_of_another_shape_are_named(runs, tmp_path):
    other = altered(runs[1], tmp_path / "other", lambda said: None, weights={"fc.bias": torch.zeros(4)})
    with pytest.raises(UserError, match=r"fc/bias: 'F32 \[3\]' -> 'F32 \[4\]'"):
        made(runs[0], other, tmp_path / "soup")


def test_what_draws_in_training_alone_may_differ(runs, tmp_path):
    other = altered(runs[1], tmp_path / "other", lambda said: said["backbone"]["args"].update(dropout=0.2))
    assert made(runs[0], other, tmp_path / "soup")["out"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("{0}", "{out}"), "an average is of two networks or more"),
        (("{0}", "{1}", "{0}", "{out}"), "the same weights as those of"),
        (("{0}", "{1}", "{2}"), "it is there already"),
        (("{0}", "{1}", "{out}", "--metric", "top2"), '"top2" is no metric of this task'),
        (("{0}", "{1}", "{out}", "--method", "best"), "no way to average"),
        (("{0}", "{1}", "{out}", "--weights", "ema"), "no moving average"),
        (("{0}", "{gone}", "{out}"), "there is no such file or folder"),
    ],
)
def test_words_that_are_refused(runs, tmp_path, words, message):
    places = {"out": tmp_path / "soup", "gone": tmp_path / "gone"}
    with pytest.raises(UserError, match=message):
        made(*(word.format(*runs, **places) for word in words))
    assert list(tmp_path.iterdir()) == []


def test_validation_data_are_asked_for_where_runs_name_several(runs, shards, tmp_path):
    other = Path(shutil.copytree(runs[1], tmp_path / "other", symlinks=True))
    config = yaml.safe_load((other / "config.yaml").read_text())
    config["data"]["val"] = str(shards / "train")
    (other / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match="different validation data"):
        made(runs[0], other, tmp_path / "soup")
    found = made(runs[0], other, tmp_path / "soup", "--data", shards / "val")
    assert found["chosen_on"]["data"] == str(shards / "val")


def test_files_alone_are_refused_and_beside_a_run_taken(runs, tmp_path):
    files = [Path(shutil.copy(file_of(run), tmp_path / f"{run.name}.safetensors")) for run in runs[:2]]
    with pytest.raises(UserError, match="none of these files lies in a run"):
        made(*files, tmp_path / "soup")
    assert len(made(files[0], runs[1], tmp_path / "soup")["ingredients"]) == 2


def test_other_starts_are_told(runs, tmp_path):
    other = altered(runs[1], tmp_path / "other", lambda said: said["provenance"].update(weights="default"))
    done = invoke("soup", runs[0], other, tmp_path / "soup", *ASK)
    assert "warning: trained from different weights" in done.stderr
    assert "default" in done.stderr


def test_the_runs_test_data_are_no_test_then(runs, tmp_path, shards):
    other = Path(shutil.copytree(runs[1], tmp_path / "other", symlinks=True))
    config = yaml.safe_load((other / "config.yaml").read_text())
    config["data"]["test"] = str(shards / "val")
    (other / "config.yaml").write_text(yaml.safe_dump(config))
    done = invoke("soup", runs[0], other, tmp_path / "soup", *ASK)
    assert f"is data.test of {other}: chosen on it, it is no test any more" in done.stderr


def test_a_network_that_has_diverged_is_named(runs, tmp_path):
    other = altered(runs[1], tmp_path / "other", lambda said: None, weights={"fc.bias": torch.full((3,), torch.nan)})
    with pytest.raises(UserError, match=f"{other}: the model's outputs for 21 pictures are not finite"):
        made(runs[0], other, tmp_path / "soup")


# Nothing is left


@pytest.mark.parametrize("place", ["Look.taken", "Checkpoints.save", "AveragedRun.write_model"])
def test_a_failure_leaves_nothing(runs, tmp_path, monkeypatch, place):
    from tlx.runs.checkpoint import Checkpoints
    from tlx.ship.averaged_run import AveragedRun
    from tlx.use.evaluate import Look

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    name, _, method = place.partition(".")
    owner = {"Look": Look, "Checkpoints": Checkpoints, "AveragedRun": AveragedRun}[name]
    monkeypatch.setattr(owner, method, full)
    done = invoke("soup", *runs[:2], tmp_path / "soup", *ASK)
    assert isinstance(done.exception, UserError)
    assert "No space left on device" in str(done.exception)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 4])
def test_killed_while_it_writes_there_is_no_run(runs, tmp_path, number):
    """At a rename within it, the first one and a later one; the same command makes it then."""
    words = ["soup", *map(str, runs[:2]), str(tmp_path / "soup"), *ASK]
    dead = subprocess.run(
        [sys.executable, str(SUPPORT / "kill_at.py"), *words],
        env=environment(KILL_AT=f"0:os.rename:{number}:rank" if number == 1 else f"0:os.replace:{number}:rank"),
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert dead.returncode == -signal.SIGKILL, dead.stderr
    assert not (tmp_path / "soup").exists()
    assert all(p.name.startswith(".") for p in tmp_path.iterdir())
    assert os.listdir(tmp_path)
    assert invoke(*words).exit_code == 0
    assert damage(tmp_path / "soup" / "checkpoints" / "best") is None


# WiSE-FT


@pytest.mark.slow
def test_wise_ft_stays_where_validation_is_best(shards, runs, start, tmp_path):
    first, second = start["groups"], runs[0]
    found = made(first, second, tmp_path / "wise", "--method", "wise-ft", "--metric", "loss")
    values = {one["alpha"]: one["value"] for one in found["alphas"]}
    assert sorted(values) == [n / 10 for n in range(11)]
    ends = {alpha: metric_of(run, "loss") for alpha, run in ((0.0, first), (1.0, second))}
    assert {alpha: values[alpha] for alpha in ends} == pytest.approx(ends, rel=1e-5)
    chosen = found["alphas"][0]["alpha"]
    assert values[chosen] == min(values.values()) == found["value"]
    weights, of_first, of_second = (load_file(file_of(run)) for run in (tmp_path / "wise", first, second))
    for name, tensor in weights.items():
        wanted = (1 - chosen) * of_first[name].double() + chosen * of_second[name].double()
        torch.testing.assert_close(tensor.double(), wanted, rtol=2e-7, atol=1e-9)
    assert metric_of(tmp_path / "wise", "loss") == pytest.approx(found["value"], rel=1e-6)


def test_an_alpha_that_is_given_is_taken(runs, start, tmp_path):
    found = made(start["groups"], runs[0], tmp_path / "wise", "--method", "wise-ft", "--alpha", "0.5")
    assert [one["alpha"] for one in found["alphas"]] == [0.5]
    own, *ends = (load_file(file_of(run)) for run in (tmp_path / "wise", start["groups"], runs[0]))
    for name, tensor in own.items():
        wanted = sum(end[name].double() for end in ends) / 2
        torch.testing.assert_close(tensor.double(), wanted, rtol=2e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("words", "count", "said"),
    [
        (["--method", "wise-ft"], 3, "these are 3"),
        (["--method", "wise-ft", "--alpha", "1.5"], 2, "no share"),
        (["--alpha", "0.5"], 2, "alpha is of --method wise-ft"),
    ],
)
def test_wise_ft_is_of_two(runs, tmp_path, words, count, said):
    with pytest.raises(UserError, match=said):
        made(*runs[:count], tmp_path / "wise", *words)
