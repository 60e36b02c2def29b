"""Run folders and checkpoints of before: what two configurations mean is compared, not how they say it."""

from __future__ import annotations

import json
from contextlib import nullcontext

import pytest
import torch
import yaml
from torch import nn

from tlx.base.errors import UserError
from tlx.plan.config import dump, parse
from tlx.plan.loop_config import EMA
from tlx.plan.saved_config import changes, essential
from tlx.runs.checkpoint import _hash_of
from tlx.runs.extend import FILE, Extend, shape
from tlx.runs.older_meaning import _of_0_1
from tlx.runs.run_folder import RunFolder
from tlx.train.components import backbone_of
from tlx.train.loop import fit
from tlx.train.resume import resume
from tlx.train.run import settle

RAW = {"run": "r", "data": {"train": "t", "val": "v", "batch": 8}, "backbone": {"name": "toys:small"}}
RAW |= {"phases": {"each": {"lr": 0.1, "duration": {"max": "3ep"}}}, "loop": {"ema": {"decay": 0.9, "ramp": False}}}


def as_before(config):
    """The configuration as it was written when `mode` was a key, and `ramp` was none."""
    raw = yaml.safe_load(dump(config))
    raw["evaluate"]["mode"] = "max" if raw["evaluate"]["metric"] == "val/top1" else "min"
    for settings in raw["phases"].values():
        if isinstance(settings.get("duration"), dict):
            settings["duration"]["mode"] = "min"
    if raw["loop"]["ema"]:
        del raw["loop"]["ema"]["ramp"]
    return raw


def test_keys_that_went_and_defaults_that_came_are_no_changes():
    config = parse(RAW)
    assert changes(essential(as_before(config)), config) == []
    table = {"name": "table", "rates": {"features.0": 0.1, "fc": 1.0}}  # names with dots
    config = parse({**RAW, "phases": {"each": {"lr": 0.1, "duration": "3ep", "layer_decay": table}}})
    assert changes(essential(as_before(config)), config) == []


def test_what_means_something_else_is_a_change():
    before = essential(as_before(parse(RAW)))
    ramped = parse({**RAW, "loop": {"ema": {"decay": 0.9}}})
    assert changes(before, ramped) == [
        "loop.ema.ramp: False -> True, a key that came later: loop.ema.ramp=false goes on as it began"
    ]
    assert changes(before, parse({**RAW, "seed": 7})) == ["seed: 0 -> 7"]
    other = parse({**RAW, "evaluate": {"metric": "val/loss"}})
    assert changes(before, other) == ["evaluate.metric: 'val/top1' -> 'val/loss'"]
    kept_the_worst = before | {"evaluate.metric": "val/loss"}  # with mode: max
    said = changes(kept_the_worst, other)
    assert "evaluate.mode: 'max' -> None" in said
    assert any("val/loss is better when it is lower" in line for line in said)
    assert "loop.gone: 1 -> None" in changes(before | {"loop.gone": 1}, parse(RAW))


def rewritten(run, change):
    """The run's folder as older code wrote it."""
    config = as_before(run.config)
    (run.folder / "config.yaml").write_text(yaml.safe_dump(config))
    file = (run.checkpoints.folder / "latest").resolve() / "state.json"
    state = json.loads(file.read_text())
    state["identity"]["config"] = essential(config)
    change(state)
    del state["sha256"]
    file.write_text(json.dumps({**state, "sha256": _hash_of(state)}))


def test_a_run_of_before_goes_on_to_the_same_bits(compose, tmp_path):
    over = {"loop": {"ema": {"decay": 0.9, "ramp": False}}, "evaluate": {"every": 2}, "checkpoint": {"every": 4}}
    whole = compose(tmp_path / "whole", **over)
    assert fit(whole)
    run = compose(**over)
    run.stop.asked = lambda **_: run.progress.step >= 8
    assert not fit(run)
    settle(run)

    def forget(state):
        assert state.pop("ema_updates") == 8
        state["best"].pop("loss")
        state["progress"]["best"].pop("loss")
        for leader in state["progress"]["leaders"]:
            leader.pop("loss")

    rewritten(run, forget)
    ramped = run.config.model_copy(update={"loop": run.config.loop.model_copy(update={"ema": EMA(decay=0.9)})})
    with pytest.raises(UserError, match=r"loop\.ema\.ramp: False -> True"):
        RunFolder(run.folder).refuse_changes(ramped)
    again = compose(**over)
    assert fit(again)
    assert "resumed from" in " ".join(again.notes)
    assert "norm statistics were the network's" in " ".join(again.notes)
    for one, other in ((again.net, whole.net), (again.ema.module, whole.ema.module)):
        for name, tensor in one.state_dict().items():
            assert (tensor == other.state_dict()[name]).all(), name
    assert again.ema.updates == whole.ema.updates == 12


def test_a_checkpoint_whose_configuration_says_something_else_is_refused(compose):
    run = compose()
    assert fit(run)
    settle(run)
    (run.folder / "config.yaml").unlink()
    other = compose(seed=4)
    with pytest.raises(UserError, match=r"belongs to another training:\n    config.seed: 0 -> 4"):
        resume(other)


def older(folder, raw, *, mode="max", phases=(), layers=(), done=False):
    """A folder of tlx 0.1.0 in which something was trained."""
    before = as_before(parse(raw))
    before["evaluate"]["mode"] = mode
    (folder / "config.yaml").write_text(yaml.safe_dump(before))
    (folder / "plan.json").write_text(json.dumps({"phases": phases, "layers": layers}))
    (folder / "checkpoints" / "latest").mkdir(parents=True, exist_ok=True)
    (folder / "checkpoints" / "latest" / "state.json").write_text('{"format": 2}')
    if done:
        (folder / "result.json").write_text('{"finished": true}')
    return RunFolder(folder)


def test_a_run_whose_metric_went_the_wrong_way_is_refused_in_words_and_shown_when_it_is_done(tmp_path):
    raw = {**RAW, "run": str(tmp_path), "evaluate": {"metric": "val/loss"}}
    said = r"evaluate\.metric: 0\.1\.0 kept the worst by val/loss \(evaluate\.mode was max\)(.|\n)*--fresh"
    with pytest.raises(UserError, match=said):
        older(tmp_path, raw).refuse_changes(parse(raw))
    older(tmp_path, raw, mode="min").refuse_changes(parse(raw))
    older(tmp_path, raw, done=True).refuse_changes(parse(raw))
    with pytest.raises(UserError, match="kept the worst by val/loss"):
        RunFolder(tmp_path).extension(
            parse({**raw, "further": {"more": {"duration": "1ep"}}}), Extend(lambda _: pytest.fail("compiled"))
        )
    with pytest.raises(UserError, match="seed: 0 -> 7"):
        RunFolder(tmp_path).refuse_changes(parse({**raw, "seed": 7}))


def test_a_plateau_that_waited_for_the_wrong_way_is_refused(tmp_path):
    """Of a phase's own settings config.yaml held what was said, and the plan the rest."""
    raw = {
        **RAW,
        "run": str(tmp_path),
        "phases": {"each": {"lr": 0.1, "duration": {"max": "3ep", "metric": "val/top1"}}},
    }
    plateau = {"max": "9 steps", "metric": "val/top1", "mode": "min", "patience": 3}
    phases = [{"name": "head", "settings": {"duration": plateau}}]
    with pytest.raises(UserError, match=r"phases\.head\.duration\.metric: 0\.1\.0 waited for val/top1 to fall"):
        older(tmp_path, raw, phases=phases).refuse_changes(parse(raw))
    older(tmp_path, raw, phases=phases, done=True).refuse_changes(parse(raw))
    (tmp_path / "result.json").unlink()
    older(
        tmp_path, raw, phases=[{"name": "head", "settings": {"duration": {**plateau, "mode": "max"}}}]
    ).refuse_changes(parse(raw))


@pytest.mark.parametrize(
    ("name", "args", "refused"),
    [
        ("torchvision/inception_v3", {}, True),
        ("torchvision/inception_v3", {"aux_logits": False}, False),
        ("timm/inception_v3", {"aux_logits": True}, True),
        ("timm/inception_v3", {}, False),
    ],
)
def test_auxiliary_classifiers_are_those_that_the_network_has(tmp_path, name, args, refused):
    raw = {**RAW, "run": str(tmp_path), "backbone": {"name": name, "args": args, "weights": "none"}}
    run = older(tmp_path, raw)
    said = f"backbone \\({name}\\): auxiliary classifiers trained as part of the head"
    with pytest.raises(UserError, match=said) if refused else nullcontext():
        run.refuse_changes(parse(raw))


@pytest.mark.parametrize(
    ("optimizer", "decayed"),
    [({"name": "adamw", "weight_decay": 0.05}, True), ({"name": "adamw"}, True), ({"name": "sgd"}, False)],
)
def test_matrices_that_decayed_before_are_told(optimizer, decayed):
    name = "timm/swinv2_tiny_window8_256"
    config = parse({**RAW, "backbone": {"name": name, "weights": "none"}, "optimizer": optimizer})
    told = "no_decay: 24 matrices that the network's authors exempt decayed (layers.0.blocks.0.attn.cpb_mlp.0.weight)"
    assert list(_of_0_1(config, {})) == [told] * decayed


class Positions(nn.Module):
    """Whose positions are computed by a layer named as Swin V2's."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.cpb_mlp = nn.Sequential(nn.Linear(3, 4))
        self.fc = nn.Linear(4, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(self.cpb_mlp(images.mean((2, 3))))


def positions(classes: int) -> nn.Module:
    return Positions(classes)


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        ({}, True),
        ({"written": {"backbone.weights_key": None}}, False),  # of now
        ({"optimizer": {"name": "adamw", "weight_decay": 0}}, False),
        ({"trains": "norms"}, False),
        ({"trains": "frozen"}, False),
        ({"start": 6}, False),  # a phase that trains them only from here on
        ({"no_decay": ["bias", "norm"]}, False),  # they decay as before
    ],
)
def test_a_run_of_this_format_whose_matrices_decayed_is_refused_where_it_would_go_on_by_halves(
    tmp_path, change, refused
):
    change = {"trains": "all", "start": 0, "written": {}, **change}
    said = {key: change[key] for key in ("optimizer", "no_decay") if key in change}
    raw = {**RAW, "run": str(tmp_path), "backbone": {"name": f"{__name__}:positions", "weights": "none"}, **said}
    layers = {layer.name: {"trains": change["trains"]} for layer in backbone_of(parse(raw), 2).layers}
    run = older(tmp_path, raw, mode=None, phases=[{"name": "head", "start": change["start"], "layers": layers}])
    before = {"backbone.name": raw["backbone"]["name"], **change["written"]}
    state = {"format": 3, "step": 6, "identity": {"config": before}}
    (tmp_path / "checkpoints" / "latest" / "state.json").write_text(json.dumps(state))
    told = (
        r"begun by an earlier tlx, .*\n    no_decay: 1 matrices that the network's authors exempt decayed "
        r"\(cpb_mlp\.0\.weight\)\n  -> let that one finish it, or begin anew by the same command with --fresh"
    )
    with pytest.raises(UserError, match=told) if refused else nullcontext():
        run.refuse_changes(parse(raw))
    (tmp_path / "result.json").write_text('{"finished": true}')
    run.refuse_changes(parse(raw))


def test_a_curve_that_every_phase_overrides_is_none_of_them(tmp_path):
    each = {"lr": 0.1, "duration": "4ep", "warmup": "1ep", "curve": {"name": "step", "every": "2ep"}}
    raw = {**RAW, "run": str(tmp_path), "phases": {"each": each, "head": {"curve": "cosine"}}}
    older(tmp_path, raw, phases=[{"name": "head"}]).refuse_changes(parse(raw))
    with pytest.raises(UserError, match=r"phases\.tuning\.curve \(step\): its points"):
        older(tmp_path, raw, phases=[{"name": "head"}, {"name": "tuning"}]).refuse_changes(parse(raw))


@pytest.mark.parametrize(("step", "refused"), [(4, False), (7, True)])
def test_of_an_extended_run_what_was_trained_before_counts(tmp_path, step, refused):
    """A curve whose points meant something else came with the extension, or was there while 0.1.0 trained its phase."""
    said = {"each": {"lr": 0.1, "duration": "4ep"}}
    changed = {**said, "tuning": {"curve": {"name": "step", "every": "2ep"}, "warmup": "1ep"}}
    raw = {**RAW, "run": str(tmp_path), "phases": {**changed, "head": {}}}
    run = older(tmp_path, raw, phases=[{"name": "head", "start": 0}, {"name": "tuning", "start": 6}])
    former = as_before(parse({**raw, "phases": {**(changed if refused else said), "head": {}}, "seed": 9}))
    asked = shape(parse(raw))
    entry = {"step": step, "before": {"config": former}, "asked": asked, "now": asked}
    (tmp_path / FILE).write_text(json.dumps([entry]))
    with pytest.raises(UserError, match=r"phases\.tuning\.curve \(step\): its points") if refused else nullcontext():
        run.refuse_changes(parse(raw))
