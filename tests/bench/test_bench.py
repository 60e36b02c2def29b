"""`tlx bench` on small shards: what its JSON promises, and how its figures hang together."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
from commands import invoke, tlx, write_config
from composed import raw_of
from images import make_shards

from tlx.base.errors import UserError
from tlx.bench import clock, rates, train_text
from tlx.bench import data as bench
from tlx.bench import train as training
from tlx.bench.data_text import text
from tlx.bench.floor import prepare
from tlx.data.pixels import jpeg_region as regions
from tlx.data.shards.manifest import Manifest
from tlx.plan.config import parse

QUICK = ["--seconds", "0.2", "--workers", "0,1", "--batch", "8", "--size", "64"]
TOY = {
    "backbone": {"name": "toys:small", "weights": "none"},
    "input": {"size": 32},
    "phases": {"each": {"lr": 0.01}, "feature_extraction": {"duration": "1ep"}, "fine_tuning": {"duration": "2ep"}},
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("bench") / "shards", per_class=16, size=(300, 400), shard_samples=20)


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(rates, "_LEAST", 0.02)


def measured(shards, **over):
    about = {"workers": [0], "seconds": 0.1, "gpus": [1e5]} | over
    return bench.measure(Manifest.open(shards / "train"), bench.Setup(batch=8), **about)


def test_data_reports_the_floor_rates_and_workers(shards):
    done = invoke("bench", "data", shards, *QUICK, "--gpu", "100000", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    assert found["shards"] == {**found["shards"], "samples": 48, "location": str(shards / "train")}
    assert found["images"] == {**found["images"], "width": 400, "height": 300, "shown": 64 * 64}
    assert found["decoder"]["name"] == regions.decoder()
    for name, view in found["views"].items():
        assert min(view["cpu_ms"], view["wall_ms"]) > 0, name
        assert 0.5 <= view["ratio"] == pytest.approx(view["cpu_ms"] / view["floor"]["cpu_ms"])
        assert [rate["workers"] for rate in view["rates"]] == [0, 1]
        assert all(rate["images_per_s"] > 0 and rate["cpu_ms"] > 0 for rate in view["rates"])
        per_worker = view["rates"][-1]["images_per_s_per_worker"]
        assert view["workers_for"] == [{"images_per_s": 100_000, "workers": math.ceil(100_000 / per_worker)}]
    assert found["verdict"]


def test_data_is_a_table_for_people(shards):
    report = measured(shards)
    said = text(report)
    assert "a GPU that trains 100,000 images/s needs" in said
    assert "ratio to the floor" in said
    assert said.endswith(bench.verdict(report))


def test_data_measures_the_transforms_of_a_configuration(shards, tmp_path):
    config = {"run": str(tmp_path / "run"), "data": {"train": str(shards / "train"), "batch": 8}}
    config |= {"transforms": ["random_resized_crop", "horizontal_flip", "rand_augment", "augmix"]} | TOY
    done = invoke("bench", "data", "--config", write_config(tmp_path / "c.yaml", config), "--json", *QUICK[:4])
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    assert found["images"]["shown"] == 32 * 32
    assert found["views"]["train"]["ratio"] > 2
    assert "the transforms are random_resized_crop, horizontal_flip, rand_augment, augmix" in found["verdict"]
    assert not (tmp_path / "run").exists()


def test_data_without_the_extension_says_how_to_get_it(shards, monkeypatch):
    monkeypatch.setattr(regions, "_jpeg", None)
    found = measured(shards).data
    assert not found["decoder"]["extension"]
    assert "libjpeg" in found["decoder"]["todo"]
    assert "torchvision" in found["views"]["train"]["floor"]["what"]
    assert "the extension is not in use" in found["verdict"]


def test_a_floor_shows_what_the_loader_shows(shards):
    """Otherwise the ratio compares different work."""
    manifest = Manifest.open(shards / "train")
    for look in bench.looks_of(manifest, bench.Setup()):
        pictures = look.pictures()
        data, key = pictures.reader.read(3), look.key(3)
        floor = prepare(look.framing, [(data, key)], 3, upright=True, scaled=look.scaled)
        if not floor.cuts:
            pytest.skip("the extension is not built")
        floor.resize()
        out = floor._place[: 224 * 224 * 3].copy().reshape(224, 224, 3)
        shown = out.copy()
        assert pictures.show(3, key, lambda key: None, shown) is None
        assert (out == shown).all()


def test_workers_are_counted_upwards():
    view = bench.View(None, [rates.Rate(0, 900.0, 1e-3), rates.Rate(2, 1000.0, 2e-3)])
    assert view.per_worker == 500
    assert [view.workers_for(images) for images in (1, 500, 501, 1250)] == [1, 1, 2, 3]
    assert view.best.workers == 2


def test_processes_that_have_ended_count():
    watch = clock.Watch(processes=True)
    subprocess.run([sys.executable, "-c", "sum(range(10_000_000))"], check=True)
    spent = watch.read()
    assert spent.cpu > 0.05
    assert spent.wall > 0.05


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["data", "nowhere"], "there is no such folder"),
        (["data"], "say which shards to measure"),
        (["data", "{shards}", "--workers", "1,x"], "is not a list of numbers"),
        (["data", "{shards}", "--batch", "0"], "--batch is at least 1"),
        (["data", "--config", "nowhere.yaml"], "cannot be read"),
        (["train", "nowhere.yaml"], "cannot be read"),
        (["train", "{config}", "--phase", "fine_tunin"], 'did you mean "fine_tuning"'),
        (["train", "{config}", "--steps", "1"], "--steps is at least 6"),
    ],
)
def test_mistakes_are_told(shards, tmp_path, words, said):
    config = {"run": str(tmp_path / "run"), "data": {"train": str(shards / "train"), "batch": 8}} | TOY
    write_config(tmp_path / "c.yaml", config)
    with pytest.raises(UserError, match=said):
        raise invoke("bench", *(w.format(shards=shards, config=tmp_path / "c.yaml") for w in words)).exception


def test_a_mistake_ends_with_2():
    done = tlx("bench", "data", "nowhere")
    assert done.returncode == 2
    assert done.stderr.startswith("error: nowhere")


@pytest.mark.slow
def test_train_compares_three_loops_and_writes_nothing(shards, tmp_path):
    config = {"run": str(tmp_path / "run"), "data": {"train": str(shards / "train"), "batch": 8, "workers": 1}} | TOY
    file = write_config(tmp_path / "c.yaml", config, loop={"micro_batch": 4}, mix={"mixup": 0.2})
    (tmp_path / "tmp").mkdir()
    before = sorted(tmp_path.iterdir())
    done = tlx("bench", "train", file, "--steps", "6", "--json", "world.size=2", TMPDIR=str(tmp_path / "tmp"))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["batch"] == 4  # one of two ranks'
    assert found["steps"] == 6
    assert found["phase"] == "fine_tuning"
    assert all(found[f"{name}_ms"] > 0 for name in ("shards", "resident", "bare"))
    assert found["waiting"] == pytest.approx(max(1 - found["resident_ms"] / found["shards_ms"], 0))
    assert found["overhead"] == pytest.approx(found["resident_ms"] / found["bare_ms"] - 1)
    assert found["shards_images_per_s"] == pytest.approx(4 / found["shards_ms"] * 1e3)
    assert found["verdict"]
    assert not any((tmp_path / "tmp").iterdir())
    assert sorted(tmp_path.iterdir()) == before


def test_train_refuses_several_ranks(shards, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = parse({"run": "run", "data": {"train": str(shards / "train"), "batch": 8}} | TOY)
    with pytest.raises(UserError, match="one process"):
        training.measure(config)


def test_train_says_what_its_figures_mean():
    about = {"steps": 30, "batch": 64, "phase": "p", "device": "CPU", "precision": "fp32", "workers": 2}
    waits = training.Report(shards=0.2, resident=0.1, bare=0.1, overheads=[-0.1, 0.0, 0.0, 0.0, 0.0, 0.1], **about)
    assert waits.waiting == 0.5
    assert "raise data.workers (now 2)" in training.verdict(waits)
    assert "as much as a bare one" in training.verdict(waits)
    slow = training.Report(
        shards=0.11, resident=0.11, bare=0.1, overheads=[0.05, 0.1, 0.2, 0.1, 0.1, 0.1], **about
    )  # something in every round, though rounds differ
    assert slow.interval == (0.05, 0.2)
    assert "pictures keep up" in training.verdict(slow)
    assert "the loop costs 10% more than a bare one" in training.verdict(slow)
    assert "over a bare loop: +10.0% (95 % of the median of rounds: +5.0% to +20.0%)" in train_text.text(slow)


def test_an_interval_of_a_median_is_between_ranks_of_the_sign_test():
    """Of 6 values the ends (1 - 2/64 = 0.969); of 15 the 4th and the 12th (0.965), as tables of the sign test say."""
    with pytest.raises(ValueError, match="5 values are too few"):
        clock.median_interval([5.0, 1.0, 4.0, 2.0, 3.0])
    assert clock.median_interval([6.0, 1.0, 5.0, 2.0, 4.0, 3.0]) == (1.0, 6.0)
    assert clock.median_interval([float(n) for n in range(1, 16)]) == (4.0, 12.0)


def test_cache_tells_what_phases_would_save(tmp_path):
    shards = make_shards(tmp_path / "s", classes=3, per_class={"train": 8, "val": 4}, size=16)
    raw = raw_of(shards, tmp_path / "run")
    (tmp_path / "c.yaml").write_text(json.dumps(raw))
    found = invoke("bench", "cache", str(tmp_path / "c.yaml"), "--steps", "2", "--json")
    (only,) = json.loads(found.output)
    assert (only["phase"], only["cut"]) == ("feature_extraction", "input of fc, 32 float32")
    assert only["bytes"] == 24 * 32 * 4
    assert only["before"] == only["steps"] * only["from_pictures"] > 0
    assert not (tmp_path / "run").exists()
