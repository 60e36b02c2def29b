"""What a configuration means that says no durations and rates; README promises that data and backbone are enough."""

from __future__ import annotations

import pytest
from nets import resnet_like

from tlx.base.errors import UserError
from tlx.base.files import json_text
from tlx.plan import defaults
from tlx.plan.config import Config, dump, load, parse
from tlx.plan.data_config import Data
from tlx.plan.plan import Plan
from tlx.runs.extend import adopted, shape
from tlx.runs.run_folder import RunFolder

BARE = {"data": {"train": "data/photos/train"}, "backbone": {"name": "timm/vit_tiny_patch16_224", "weights": "none"}}


def bare(**over):
    return parse({**BARE, **over}, libraries=False)


def test_data_and_backbone_are_a_whole_configuration():
    config = bare()
    assert str(config.run) == "runs/photos-vit_tiny_patch16_224"
    assert config.data.batch == 32
    first, second = Plan.make(config, resnet_like(), samples=64).phases
    assert [(p.name, p.length, p.lr) for p in (first, second)] == [
        ("feature_extraction", 8 * 2, 3e-3),
        ("fine_tuning", 12 * 2, 3e-4),
    ]
    assert (first.warmup, second.warmup) == (0, 2)  # a tenth
    assert second.factors["layer4"] == pytest.approx(0.75)
    assert [p.settings.curve.name for p in (first, second)] == ["cosine", "cosine"]


def test_a_convolutional_network_gets_a_line_over_its_depth():
    config = bare(backbone={"name": "torchvision/resnet18"})
    factors = Plan.make(config, resnet_like(), samples=64).phases[1].factors
    assert (factors["fc"], factors["conv1"]) == (1, pytest.approx(0.1))


def test_the_network_may_be_its_name_alone():
    assert bare(backbone="timm/resnet18") == bare(backbone={"name": "timm/resnet18"})


def test_what_is_said_stays_and_says_nothing_else():
    """A rate has the curve, the warm-up and the layer decay that stand beside it, or none."""
    said = bare(phases={"each": {"lr": 0.1}, "fine_tuning": {"duration": "3ep"}})
    settings = said.settings("fine_tuning")
    assert (str(settings.duration), settings.lr) == ("3ep", 0.1)
    assert (settings.curve.name, settings.layer_decay.name) == ("constant", "none")
    assert str(said.settings("feature_extraction").duration) == "8ep"
    curved = bare(phases={"each": {"curve": "linear"}}).settings("fine_tuning")
    assert (curved.curve.name, curved.lr, curved.layer_decay.name) == ("linear", 3e-4, "exponential")


def test_the_length_of_the_whole_is_shared_as_the_table_has_it():
    config = bare(duration="10ep")
    assert [p.length for p in Plan.make(config, resnet_like(), samples=32).phases] == [4, 6]
    assert str(bare(duration="10ep", unfreeze="head_only").settings("feature_extraction").duration) == "100%"


@pytest.mark.parametrize(
    ("unfreeze", "rates"),
    [
        ("head_only", {"feature_extraction": 3e-3}),
        ("all", {"fine_tuning": 3e-4}),
        ("norms_only", {"norms_only": 1e-3}),
        ({"name": "last_n", "n": 2}, {"last_2": 3e-4}),
        ({"name": "gradual", "every": "1ep", "step": 9}, {"head": 3e-3, "from_conv1": 3e-4}),
    ],
)
def test_every_schedule_of_tlx_has_rates(unfreeze, rates):
    plan = Plan.make(bare(unfreeze=unfreeze), resnet_like(), samples=64)
    assert {p.name: p.lr for p in plan.phases} == rates


def begun(run, **over):
    """The folder of a run with this configuration."""
    folder = RunFolder(run)
    folder.claim(folder.look(bare(run=str(run), **over)))
    folder.release()
    return folder


@pytest.fixture
def later_table(monkeypatch):
    """The table of another version, from when this is called."""
    field = Data.model_fields["batch"]
    former = field.default

    def change():
        monkeypatch.setattr(defaults, "RATES", {"head": 1.0, "part": 1.0, "all": 1.0})
        monkeypatch.setattr(defaults, "USUAL", defaults.TABLE[-1])
        field.default = defaults.USUAL.batch
        rebuild()

    def rebuild():
        Data.model_rebuild(force=True)
        Config.model_rebuild(force=True)

    yield change
    field.default = former
    rebuild()


def test_a_runs_configuration_says_all_of_it_and_is_not_the_tables_any_more(tmp_path, later_table):
    run = tmp_path / "run"
    begun(run, unfreeze="two_phase")
    later_table()
    assert (bare().settings("fine_tuning").lr, bare().data.batch) == (1.0, 256)
    again = load(run / "config.yaml", libraries=False)
    assert (again.settings("fine_tuning").lr, str(again.settings("fine_tuning").duration)) == (3e-4, "12ep")
    folder = RunFolder(run)
    claim = folder.look(bare(run=str(run)))
    assert dump(claim.config) == dump(again)
    folder.claim(claim)  # going on takes nothing away
    folder.release()
    assert dump(RunFolder(run).look(bare(run=str(run))).config) == dump(again)
    (run / "defaults.json").unlink()  # a run of before
    with pytest.raises(UserError, match="another configuration"):
        RunFolder(run).look(bare(run=str(run)))


def test_what_was_said_then_and_is_not_now_is_a_difference(tmp_path):
    run = tmp_path / "run"
    begun(run, data={**BARE["data"], "batch": 16}, phases={"fine_tuning": {"lr": 0.01}})
    with pytest.raises(UserError, match="another configuration") as refused:
        RunFolder(run).look(bare(run=str(run)))
    assert "data.batch: 16 -> 32" in str(refused.value)
    assert "phases.fine_tuning.lr: 0.01 -> 0.0003" in str(refused.value)


def test_an_extended_run_keeps_what_it_had_from_the_table(tmp_path, later_table):
    run = tmp_path / "run"
    begun(run)
    own = shape(bare(run=str(run)))
    entry = {"step": 1, "before": {"config": {}, "result": None}, "asked": own, "now": own}
    (run / "extensions.json").write_text(json_text([entry]))
    later_table()
    config = adopted(run, bare(run=str(run)))
    assert (config.data.batch, config.settings("fine_tuning").lr) == (32, 3e-4)


def test_the_length_of_the_whole_that_is_said_later_is_shared_anew(tmp_path):
    run = tmp_path / "run"
    begun(run)
    longer = adopted(run, bare(run=str(run), duration="30ep"))
    assert [str(longer.settings(name).duration) for name in ("feature_extraction", "fine_tuning")] == ["40%", "60%"]


@pytest.mark.parametrize(
    ("train", "backbone", "run"),
    [
        ("data/17flowers/train", "timm/deit_tiny_patch16_224.fb_in1k", "17flowers-deit_tiny_patch16_224.fb_in1k"),
        ("https://host/sets/birds/train?token=x", "torchvision/resnet18", "birds-resnet18"),
        ("pipe:aws s3 cp s3://x/{} -", "toys:small", "pipe-small"),
        ("my photos", "hf-hub:timm/vit_x", "my-photos-vit_x"),
        ("train", "a/b", "train-b"),
        (".", "a/b", "data-b"),
    ],
)
def test_the_run_is_named_after_data_and_backbone(train, backbone, run):
    assert defaults.run_of(train, backbone) == f"runs/{run}"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("timm/deit_tiny_patch16_224", "transformer"),
        ("timm/swinv2_tiny_window8_256.ms_in1k", "transformer"),
        ("torchvision/vit_b_16", "transformer"),
        ("timm/eva02_small_patch14_224", "transformer"),
        ("hf-hub:timm/beitv2_base_patch16_224", "transformer"),
        ("torchvision/resnet50", "convolutional"),
        ("timm/convnext_tiny", "convolutional"),
        ("timm/mobilevitv2_100", "convolutional"),
        ("toys:small", "convolutional"),
    ],
)
def test_the_kind_of_a_backbone(name, kind):
    assert defaults.kind_of(name) == kind


def test_the_table_is_complete_and_rises():
    below = [row.below for row in defaults.TABLE]
    assert below == sorted(set(below))
    assert below[-1] == float("inf")
    assert defaults.row_of(None) is defaults.USUAL
    assert [defaults.row_of(n).head for n in (10, 999, 1000, 10**7)] == [16, 16, 8, 1]
