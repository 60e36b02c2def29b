"""What is frozen is computed once: the same training from stored features as from pictures."""

from __future__ import annotations

import json
import os
import shutil
import time

import pytest
import torch
from composed import composer, raw_of
from images import make_shards
from safetensors.torch import load_file
from shard_server import serve

from tlx.base.errors import UserError
from tlx.data.pixels.normalise import Normalise
from tlx.data.shards.manifest import Manifest
from tlx.data.stream.pictures import Pictures
from tlx.data.stream.stream import ShardStream
from tlx.features.store import FeatureStore, Layout
from tlx.features.store import _held as held
from tlx.features.stored import StoredFeatures, ViewOfEpoch
from tlx.plan.config import parse
from tlx.runs.metrics_file import read_rows
from tlx.train import command as training
from tlx.train import solved
from tlx.train.loop import fit


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("s") / "s", classes=3, per_class={"train": 8, "val": 5}, size=24)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TLX_FEATURES", str(tmp_path / "features"))
    monkeypatch.delenv("RANK", raising=False)
    return tmp_path / "features"


def settings(shards, run, cache, **over):
    return raw_of(
        shards,
        run,
        **{
            "backbone": {"name": "timm/test_resnet", "weights": "none"},
            "input": {"size": 32},
            "transforms": [{"name": "resize", "size": [32, 32]}],
            "loop": {"ema": {"decay": 0.5}},
            "evaluate": {"batch": 4},
            "cache": cache,
            **over,
        },
    )


def stores(folder):
    return [place for place in folder.iterdir() if place.is_dir()]


def trained(raw):
    """Weights at the end, rows of metrics."""
    training.train(parse(raw))
    rows = list(read_rows(parse(raw).run / "metrics.jsonl"))
    return load_file(parse(raw).run / "checkpoints" / "latest" / "model.safetensors"), rows


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_training_as_from_pictures(shards, tmp_path, folder, workers):
    data = {"train": str(shards / "train"), "val": str(shards / "val"), "batch": 7, "workers": workers}
    off, rows_off = trained(settings(shards, tmp_path / "off", "off", data=data))
    assert not folder.exists()
    on, rows_on = trained(settings(shards, tmp_path / "on", "exact", data=data))
    assert len(stores(folder)) == 2  # of training and of validation pictures
    for name, weight in off.items():
        torch.testing.assert_close(on[name], weight, rtol=1e-3, atol=1e-4)
    assert [row.get("val/top1") for row in rows_on] == [row.get("val/top1") for row in rows_off]
    state = json.loads((tmp_path / "on" / "checkpoints" / "latest" / "state.json").read_text())["progress"]["phases"]
    assert state["feature_extraction"]["cache"]["cut"] == "input of fc, 96 float32"
    assert state["fine_tuning"]["cache"] is None


def test_each_epoch_shows_another_of_the_kept_views_and_then_they_come_again(shards, tmp_path, folder):
    """In the first epochs those that a training from pictures shows."""
    flips = [{"name": "random_resized_crop", "scale": [0.5, 1]}, "horizontal_flip"]
    over = {"transforms": flips, "unfreeze": "head_only", "phases": {"each": {"lr": 0.02, "duration": "2ep"}}}
    off, _ = trained(settings(shards, tmp_path / "off", "off", **over))
    on, _ = trained(settings(shards, tmp_path / "on", {"views": 2}, **over))
    for name, weight in off.items():
        torch.testing.assert_close(on[name], weight, rtol=1e-5, atol=1e-6)
    over["phases"] = {"each": {"lr": 0.02, "duration": "4ep"}}
    again, _ = trained(settings(shards, tmp_path / "again", {"views": 2}, **over))
    assert len(stores(folder)) == 2
    another, _ = trained(settings(shards, tmp_path / "off4", "off", **over))
    assert not torch.allclose(again["fc.weight"], another["fc.weight"], atol=1e-4)


def test_of_a_few_pictures_of_each_class_only_those_are_read(shards, tmp_path, folder, monkeypatch):
    data = {"train": str(shards / "train"), "val": str(shards / "val"), "batch": 4, "workers": 0}
    over = {"data": {**data, "sampling": {"limit": 2}}, "unfreeze": "head_only"}
    off, _ = trained(settings(shards, tmp_path / "off", "off", **over))
    shown = counted(monkeypatch)
    on, _ = trained(settings(shards, tmp_path / "on", "exact", **over))
    assert len(shown) == 6 + 15
    torch.testing.assert_close(on["fc.weight"], off["fc.weight"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("dtype", "rounding"), [("fp32", 1e-5), ("fp16", 2e-3), ("bf16", 2e-2)])
def test_features_may_be_kept_in_fewer_bits(shards, tmp_path, folder, dtype, rounding):
    over = {"unfreeze": "head_only", "phases": {"each": {"lr": 0.01, "duration": "1ep"}}}
    off, _ = trained(settings(shards, tmp_path / "off", "off", **over))
    on, _ = trained(settings(shards, tmp_path / "on", {"mode": "exact", "dtype": dtype}, **over))
    torch.testing.assert_close(on["fc.weight"], off["fc.weight"], rtol=rounding, atol=rounding)
    sizes = sorted((store / "values").stat().st_size for store in stores(folder))
    assert sizes == [n * 96 * (4 if dtype == "fp32" else 2) for n in (15, 24)]


def test_views_come_again_in_another_order_of_the_seed():
    of = ViewOfEpoch(4, seed=3)
    assert [of(epoch) for epoch in range(4)] == [0, 1, 2, 3]
    cycles = [tuple(of(4 * cycle + n) for n in range(4)) for cycle in range(1, 9)]
    assert all(sorted(cycle) == [0, 1, 2, 3] for cycle in cycles)
    assert len(set(cycles)) > 3
    assert cycles == [tuple(ViewOfEpoch(4, 3)(4 * cycle + n) for n in range(4)) for cycle in range(1, 9)]


def test_auto_is_off_where_pictures_are_drawn(shards, tmp_path, folder):
    trained(settings(shards, tmp_path / "run", "auto", transforms=None, unfreeze="head_only"))
    assert not folder.exists()


def test_frozen_stages_below_the_last_one(shards, tmp_path, monkeypatch):
    """Activations in the middle of the network; the cut moves when more is unfrozen, and no picture is read again."""
    each = {"lr": 0.02, "duration": "2ep"}
    over = {"unfreeze": {"name": "gradual", "every": "2ep"}, "phases": {"each": each}, "loop": {}}
    off, _ = trained(settings(shards, tmp_path / "off", "off", **over))
    shown = counted(monkeypatch)
    on, _ = trained(settings(shards, tmp_path / "on", "exact", **over))
    # once for all phases; of each later one a part of both, to see whether what is there is still what it would be
    from_pictures = 2 * (24 + 15)  # the last phase trains everything: two epochs, each with its evaluation
    assert len(shown) == 24 + 15 + 4 * (4 + 4) + from_pictures
    for name, weight in off.items():
        torch.testing.assert_close(on[name], weight, rtol=1e-2, atol=1e-3)
    state = json.loads((tmp_path / "on" / "checkpoints" / "latest" / "state.json").read_text())["progress"]["phases"]
    cuts = [entry["cache"] and entry["cache"]["cut"].partition(",")[0] for entry in state.values()]
    assert cuts == ["input of fc", *(f"input of layer{n}.0" for n in (4, 3, 2, 1)), None]


def counted(monkeypatch):
    """The pictures that are read from now on, each as often as it is."""
    shown, show = [], Pictures.show
    monkeypatch.setattr(Pictures, "show", lambda self, sample, *rest: shown.append(sample) or show(self, sample, *rest))
    return shown


@pytest.mark.slow
def test_features_that_are_read_more_slowly_than_computed_are_not_kept_unless_asked_for(
    shards, tmp_path, monkeypatch, capsys
):
    read = FeatureStore.read
    monkeypatch.setattr(FeatureStore, "read", lambda self, view, part, cold: time.sleep(0.3))
    over = {"unfreeze": "head_only", "phases": {"each": {"lr": 0.01, "duration": "2ep"}}}
    trained(settings(shards, tmp_path / "auto", "auto", **over))
    state = json.loads((tmp_path / "auto" / "checkpoints" / "latest" / "state.json").read_text())["progress"]
    assert state["phases"]["feature_extraction"]["cache"] is None
    trained(settings(shards, tmp_path / "exact", "exact", **over))
    assert "reading features takes" in capsys.readouterr().out
    state = json.loads((tmp_path / "exact" / "checkpoints" / "latest" / "state.json").read_text())["progress"]
    assert state["phases"]["feature_extraction"]["cache"]["mode"] == "exact"
    monkeypatch.setattr(FeatureStore, "read", read)  # what was found first is what counts
    trained(settings(shards, tmp_path / "again", "auto", **over))
    state = json.loads((tmp_path / "again" / "checkpoints" / "latest" / "state.json").read_text())["progress"]
    assert state["phases"]["feature_extraction"]["cache"] is None


def test_features_in_the_memory_of_a_device_are_the_same(shards, tmp_path, folder):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    manifest, layout = Manifest.open(str(shards / "train")), Layout(2, 24, (3, 2), torch.float16, 5)
    store = FeatureStore(folder / "own", layout)
    store.make({}, None)
    values = torch.randn(2, 24, 3, 2).half()
    for view in range(2):
        for part in range(5):
            places = layout.places(part)
            store.write(view, part, values[view, places.start : places.stop], {})
    stream = ShardStream(manifest, batch=7, seed=3, transform=lambda image: image)
    mapped = StoredFeatures(store, manifest, ViewOfEpoch(2, 3), torch.float32)
    held = mapped.held_in(device)
    assert held.held is not None
    assert mapped.held_on(torch.device("cpu")).held is None
    steps = range(4 * stream.steps_per_epoch)
    ids, kept = [], []
    for one in (mapped, held):
        batches = list(stream.of(one).batches(steps.start, steps.stop))
        kept.append(torch.cat([batch.images.cpu() for batch in batches]))
        ids.append(torch.cat([batch.ids for batch in batches]))
    assert torch.equal(ids[0], ids[1])
    assert torch.equal(kept[0], kept[1])
    view_of_epoch = torch.tensor([ViewOfEpoch(2, 3)(epoch) for epoch in range(4)]).repeat_interleave(24)
    assert torch.equal(kept[0], values[view_of_epoch, ids[0]].float())


def bits(run):
    return {name: weight.clone() for name, weight in run.net.state_dict().items()}


@pytest.mark.parametrize("kept", ["features", "nothing", "half"])
def test_a_phase_that_is_gone_on_with_gives_the_same_bits(shards, tmp_path, folder, monkeypatch, kept):
    """After a kill in the phase, or while features were computed; whether or not they are still there."""
    monkeypatch.delenv("RANK", raising=False)
    usual = settings(shards, tmp_path / "run", "exact", checkpoint={"every": 1})
    usual = {key: value for key, value in usual.items() if key not in ("run", "data")}
    compose = composer(shards, tmp_path / "run", monkeypatch, **usual)
    whole = compose(tmp_path / "whole")
    assert fit(whole)
    run = compose()
    write, parts, killed = FeatureStore.write, [], []

    def counted(store, *part):
        parts.append(part[:2])
        if kept == "half" and len(parts) == 3 and not killed:
            killed.append(True)
            raise KeyboardInterrupt
        write(store, *part)

    if kept == "half":
        for store in stores(folder):
            shutil.rmtree(store)
        monkeypatch.setattr(FeatureStore, "write", counted)
        with pytest.raises(KeyboardInterrupt):
            fit(run)
        assert len(parts) == 3
    else:
        monkeypatch.setattr(run.stop, "asked", lambda look: run.progress.step >= 4)
        assert not fit(run)
        assert run.progress.step == 4
        run.saver.settle()
        if kept == "nothing":
            shutil.rmtree(folder)
    again = compose()
    monkeypatch.setattr(FeatureStore, "write", counted)
    parts.clear()
    assert fit(again)
    assert len(parts) == {"features": 0, "nothing": 6 + 4, "half": 4 + 4}[kept]
    after = bits(again)
    assert all(torch.equal(weight, after[name]) for name, weight in bits(whole).items())


def test_another_network_or_view_or_picture_never_meets_old_features(shards, tmp_path, folder):
    over = {"unfreeze": "head_only"}
    trained(settings(shards, tmp_path / "a", "exact", **over))
    trained(settings(shards, tmp_path / "b", "exact", **over, seed=0))
    assert len(stores(folder)) == 2  # shared
    trained(settings(shards, tmp_path / "c", "exact", **over, seed=1))  # other weights
    assert len(stores(folder)) == 4
    crop = [{"name": "resize", "size": [36, 36]}, {"name": "center_crop", "size": [32, 32]}]
    trained(settings(shards, tmp_path / "d", "exact", **over, transforms=crop))
    assert len(stores(folder)) == 5  # validation pictures are shown as before
    other = make_shards(tmp_path / "s", classes=3, per_class={"train": 8, "val": 5}, size=24, seed=9)
    trained(settings(other, tmp_path / "e", "exact", **over))
    assert len(stores(folder)) == 7


def test_a_full_disk_costs_a_line(shards, tmp_path, capsys, monkeypatch):
    def full(*_words):
        raise OSError(28, "No space left on device")

    over = {"unfreeze": "head_only"}
    off, _ = trained(settings(shards, tmp_path / "off", "off", **over))
    monkeypatch.setattr(FeatureStore, "write", full)
    on, _ = trained(settings(shards, tmp_path / "on", "exact", **over))
    assert all(torch.equal(weight, on[name]) for name, weight in off.items())
    assert "computes from pictures" in capsys.readouterr().out
    monkeypatch.undo()
    trained(settings(shards, tmp_path / "small", {"mode": "exact", "limit": 100}, **over))
    assert "may take 0.00 GB" in capsys.readouterr().out


def test_pictures_that_cannot_be_read_are_replaced_by_the_same_others(tmp_path):
    shards = make_shards(tmp_path / "s", classes=3, per_class={"train": 8, "val": 5}, size=24)
    for split in ("train", "val"):
        damaged = json.loads((shards / split / "index.json").read_text())
        first = shards / split / damaged["shards"][0]["name"]
        content = bytearray(first.read_bytes())
        at = content.index(b"\xff\xd8\xff")
        content[at : at + 3] = b"bad"
        first.write_bytes(content)
    data = {"train": str(shards / "train"), "val": str(shards / "val"), "batch": 7, "workers": 0, "bad_samples": 2}
    over = {"data": data, "unfreeze": "head_only"}
    off, _ = trained(settings(shards, tmp_path / "off", "off", **over))
    on, _ = trained(settings(shards, tmp_path / "on", "exact", **over))
    for name, weight in off.items():
        torch.testing.assert_close(on[name], weight, rtol=1e-5, atol=1e-6)
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("off", "on")]
    assert results[0]["last"]["val/samples"] == results[1]["last"]["val/samples"] == 14


def test_a_head_begins_as_the_logistic_regression_on_features(shards, tmp_path, capsys):
    """Compared with scikit-learn's on the same features."""
    from sklearn.linear_model import LogisticRegression

    from tlx.features.solve import solved_head

    torch.manual_seed(0)
    features, labels = torch.randn(90, 7) * torch.arange(1.0, 8), torch.arange(90) % 3
    features[:, :3] += 4 * torch.nn.functional.one_hot(labels, 3)
    weight, bias, _ = solved_head(features, labels, 3, torch.arange(90), penalties=[0.01])
    scaled = (features - features.mean(0)) / features.std(0, unbiased=False)
    other = LogisticRegression(C=1 / (0.01 * 90), max_iter=10000, tol=1e-8).fit(scaled.numpy(), labels.numpy())
    assert (features @ weight.T + bias).softmax(1).numpy() == pytest.approx(
        other.predict_proba(scaled.numpy()), abs=2e-3
    )
    over = {"unfreeze": "head_only", "head": {"name": "linear", "init": "solved"}}
    _, rows = trained(settings(shards, tmp_path / "on", "exact", **over, phases={"each": {"lr": 1e-9, "duration": 1}}))
    assert "logistic regression on 24 views of 24 pictures (" in capsys.readouterr().out
    assert rows[-1]["val/top1"] > 0.9  # by colours, which random features tell apart
    with pytest.raises(UserError, match=r"head.init: solved: a head is solved from features"):
        trained(settings(shards, tmp_path / "off", "off", **over))


def test_a_head_is_solved_on_as_many_pictures_as_memory_should_hold(shards, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(solved, "_MOST_BYTES", 4 * 96 * 2 * 7)  # two views of seven pictures
    flips = [{"name": "random_resized_crop", "scale": [0.5, 1]}, "horizontal_flip"]
    over = {"unfreeze": "head_only", "head": {"name": "linear", "init": "solved"}, "transforms": flips}
    trained(settings(shards, tmp_path / "on", {"views": 2}, **over, phases={"each": {"lr": 1e-9, "duration": 1}}))
    assert "on 14 views of 7 pictures (there are 24)" in capsys.readouterr().out


@pytest.mark.slow
def test_remote_shards_are_fetched_ahead(shards, tmp_path, monkeypatch):
    asked, ahead = [], Manifest.ahead
    monkeypatch.setattr(Manifest, "ahead", lambda self, some: asked.append(list(some)) or ahead(self, some))
    with serve(shards) as server:
        data = {"train": f"{server.url}/train", "val": str(shards / "val"), "batch": 7, "workers": 0}
        over = {"unfreeze": "head_only", "data": data}
        on, _ = trained(settings(shards, tmp_path / "on", "exact", **over))
        assert asked == [[0, 1], [2]]  # of 8 pictures each: four parts of 4 are measured, then the others
        off, _ = trained(settings(shards, tmp_path / "off", "off", **over))
    torch.testing.assert_close(on["fc.weight"], off["fc.weight"], rtol=1e-5, atol=1e-6)


def test_a_store_in_use_stays_and_what_cannot_fit_costs_nobody_anything(tmp_path):
    def store(name, samples):
        return FeatureStore.of(tmp_path, {"name": name}, Layout(1, samples, (10,), torch.float32, 4))

    first, second, third = store("a", 20), store("b", 8), store("c", 20)
    first.make({}, 1000)
    with pytest.raises(UserError, match="features take"):
        second.make({}, 1000)  # the first one is held by this process
    for handle in held:
        os.close(handle)
    held.clear()
    with pytest.raises(UserError, match="and may take"):
        third.make({}, 700)
    assert first.missing()
    second.make({}, 1000)
    assert not (first.folder / "parts").exists()
    assert second.missing() == [(0, 0), (0, 1)]


def test_features_of_code_that_was_changed_are_computed_anew(shards, tmp_path, folder, monkeypatch, capsys):
    over = {"unfreeze": "head_only"}
    first, _ = trained(settings(shards, tmp_path / "a", "exact", **over))
    normalise = Normalise.__call__
    monkeypatch.setattr(Normalise, "__call__", lambda self, *rest: 2 * normalise(self, *rest))
    off, _ = trained(settings(shards, tmp_path / "off", "off", **over))
    capsys.readouterr()
    on, _ = trained(settings(shards, tmp_path / "on", "exact", **over))
    assert capsys.readouterr().out.count("are not what the network gives now, and are computed anew") == 2
    torch.testing.assert_close(on["fc.weight"], off["fc.weight"], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(first["fc.weight"], off["fc.weight"], atol=1e-4)


@pytest.mark.slow
def test_a_moving_average_of_other_frozen_layers_has_no_features(shards, tmp_path, folder):
    """A phase that freezes again what an earlier one has trained."""
    layers = [("all", {"*": "all"}), ("again", {"fc": "all"})]
    explicit = {"name": "explicit", "phases": [{"name": n, "layers": of, "duration": "2ep"} for n, of in layers]}
    over = {"unfreeze": explicit, "phases": {"each": {"lr": 0.02}}}
    off, rows_off = trained(settings(shards, tmp_path / "off", "off", **over))
    on, rows_on = trained(settings(shards, tmp_path / "on", "exact", **over))
    assert all(torch.equal(weight, off[name]) for name, weight in on.items())
    assert [row.get("ema/val/loss") for row in rows_on] == [row.get("ema/val/loss") for row in rows_off]
    plain = {**over, "loop": {}}
    trained(settings(shards, tmp_path / "plain", "exact", **plain))
    assert len(stores(folder)) == 2  # without the average there are features


def test_pictures_that_were_mended_are_read(tmp_path, folder):
    shards = make_shards(tmp_path / "s", classes=3, per_class={"train": 8, "val": 5}, size=24)
    tar = shards / "train" / json.loads((shards / "train" / "index.json").read_text())["shards"][-1]["name"]
    whole = tar.read_bytes()
    at = whole.rindex(b"\xff\xd8\xff")  # in the last part: the first one is computed again in any case
    tar.write_bytes(whole[:at] + b"bad" + whole[at + 3 :])
    data = {"train": str(shards / "train"), "val": str(shards / "val"), "batch": 7, "workers": 0}
    over = {"unfreeze": "head_only"}
    with pytest.raises(UserError, match="1 unreadable samples, 0 allowed"):
        trained(settings(shards, tmp_path / "a", "exact", **over, data=data))
    tar.write_bytes(whole)
    result, _ = trained(settings(shards, tmp_path / "b", "exact", **over, data=data))
    off, _ = trained(settings(shards, tmp_path / "off", "off", **over, data=data))
    torch.testing.assert_close(result["fc.weight"], off["fc.weight"], rtol=1e-5, atol=1e-6)


def test_auto_keeps_no_more_than_pictures_take(shards, tmp_path, folder, monkeypatch):
    monkeypatch.setattr(FeatureStore, "make", lambda *_: pytest.fail("too large"))
    monkeypatch.setattr(Layout, "bytes", 1 << 30)
    trained(settings(shards, tmp_path / "run", "auto", unfreeze="head_only"))
