"""simclr and vicreg: losses by hand and by lightly, over ranks as in one process; going on after an end in the middle;
what the pretraining hands over."""

from __future__ import annotations

import math
import multiprocessing

import pytest
import torch
import torch.distributed as dist
from composed import raw_of, smallest_config, train, weights
from images import make_shards
from safetensors.torch import load_file

import tlx.train.loop
from tlx.base.errors import UserError
from tlx.plan.config import parse
from tlx.ranks.collectives import World
from tlx.tasks import Ranks, TaskData, Truth, kinds
from tlx.tasks.embedding import contrasting, nearest_is_own, regularising
from tlx.train.build import plan

EVERYTHING = {"name": "explicit", "phases": [{"name": "all", "layers": {"*": "all"}}]}
HEAD = {"name": "mlp", "hidden": [8]}
VECTORS = torch.randn(7, 2, 5, generator=torch.Generator().manual_seed(0))
LOSSES = {"simclr": contrasting(0.3), "vicreg": regularising(25.0, 25.0, 1.0)}


def test_the_contrast_of_two_pictures_by_hand():
    """Unit vectors at 0, 0, 90 and 90 degrees: of each view one other is alike (1) and two are at right angles (0)."""
    vectors = torch.tensor([[[1.0, 0.0], [2.0, 0.0]], [[0.0, 1.0], [0.0, 3.0]]])
    by_hand = 2 * math.log((math.exp(2) + 2) / math.exp(2))
    assert contrasting(0.5)(vectors, vectors, 0) == pytest.approx(by_hand, rel=1e-6)
    assert nearest_is_own(vectors).all()
    assert not nearest_is_own(vectors.flatten(0, 1)[[0, 2, 1, 3]].unflatten(0, (2, 2))).any()


def test_the_three_terms_of_two_pictures_by_hand():
    """Components 1, -1 and 2, -2 in one view, the same but for the sign of the second in the other: variances 2 and 8,
    covariances 4 and -4; (0 + 16 + 0 + 16) / 4 is the mean square between views."""
    vectors = torch.tensor([[[1.0, 2.0], [1.0, -2.0]], [[-1.0, -2.0], [-1.0, 2.0]]])
    assert regularising(1.0, 0.0, 0.0)(vectors, vectors, 0) == pytest.approx(2 * 8.0)
    assert regularising(0.0, 1.0, 0.0)(vectors, vectors, 0) == 0
    assert regularising(0.0, 0.0, 1.0)(vectors, vectors, 0) == pytest.approx(2 * (16 + 16))
    shrunk = 1 - math.sqrt(0.02 + 1e-4), 1 - math.sqrt(0.08 + 1e-4)
    assert regularising(0.0, 1.0, 0.0)(vectors / 10, vectors / 10, 0) == pytest.approx(sum(shrunk), rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients_are_lightlys(name):
    losses = pytest.importorskip("lightly.loss", exc_type=ImportError)
    theirs = {"simclr": lambda: losses.NTXentLoss(0.3), "vicreg": lambda: losses.VICRegLoss(25.0, 25.0, 1.0)}[name]()
    ours, other = VECTORS.clone().requires_grad_(), VECTORS.clone().requires_grad_()
    loss = LOSSES[name](ours, ours, 0) / len(ours)
    expected = theirs(other[:, 0], other[:, 1])
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(ours.grad, other.grad, atol=1e-6)


def on_rank(rank, size, file, name, box):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=size)
    world = World(rank, size, torch.device("cpu"), False, None)
    cuts = {1: [7], 2: [4, 3], 3: [4, 0, 3]}[size]  # the second of three has a stand-in alone
    start = sum(cuts[:rank])
    own = VECTORS[start : start + cuts[rank]] if cuts[rank] else VECTORS[:1]
    own = own.clone().requires_grad_()
    task = getattr(kinds, name)(TaskData({}, 7, 5, None), width=5, **({"temperature": 0.3} if name == "simclr" else {}))
    truth = Truth({}, idle=not cuts[rank], ranks=Ranks(joined=world.joined))
    loss = task.loss(own.flatten(1), truth)
    loss.backward()
    box.put((rank, loss.item(), own.grad.tolist() if cuts[rank] else []))
    dist.destroy_process_group()


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", LOSSES)
def test_ranks_have_the_loss_and_the_gradient_of_one_process(tmp_path, name, size):
    context = multiprocessing.get_context("fork")
    box = context.Queue()
    ranks = [context.Process(target=on_rank, args=(r, size, tmp_path / "store", name, box)) for r in range(size)]
    for process in ranks:
        process.start()
    found = sorted(box.get(timeout=120) for _ in ranks)
    for process in ranks:
        process.join(60)
    alone = VECTORS.clone().requires_grad_()
    loss = LOSSES[name](alone, alone, 0)
    loss.backward()
    assert sum(of for _, of, _ in found) == pytest.approx(loss.item(), rel=1e-5)
    together = torch.tensor([row for _, _, rows in found for row in rows])
    assert torch.allclose(together, alone.grad, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("e") / "s", classes=3, per_class={"train": 8, "val": 4}, size=16)


def raw(shards, run, task="simclr", **over):
    usual = {"task": task, "head": HEAD, "unfreeze": EVERYTHING, "phases": {"all": {"lr": 0.01, "duration": 8}}}
    usual |= {"track": {"every": 1, "report": False}, "evaluate": {"every": 4}, "checkpoint": {"every": 2}}
    return raw_of(shards, run, **{**usual, **over})


def test_the_same_bits_after_an_end_in_the_middle_and_what_it_hands_over(pictures, tmp_path, monkeypatch):
    probe = {"probe": {"train": str(pictures / "train"), "val": str(pictures / "val"), "k": 3}, "every": 4}
    result = train(raw(pictures, tmp_path / "whole", evaluate=probe))
    assert result["best"]["metric"] == "val/knn"
    assert result["best"]["value"] > 0.5

    def ended(run, *given, step=tlx.train.loop.train_step):
        if run.progress.step == 5:
            raise KeyboardInterrupt
        return step(run, *given)

    with monkeypatch.context() as patched:
        patched.setattr(tlx.train.loop, "train_step", ended)
        with pytest.raises(KeyboardInterrupt):
            train(raw(pictures, tmp_path / "cut", evaluate=probe))
    train(raw(pictures, tmp_path / "cut", evaluate=probe))
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(one[name], other[name]) for name in one)

    # a classifier that begins with the run's best weights, of which one step trains the head alone
    first = {"each": {"lr": 0.01}, "feature_extraction": {"duration": 1}, "fine_tuning": {"duration": 1}}
    backbone = {"name": "toys:small", "weights": str(tmp_path / "whole")}
    over = {"backbone": backbone, "phases": first, "checkpoint": {"every": 1, "keep": 2}, "track": {"report": False}}
    train(raw_of(pictures, tmp_path / "tuned", **over))
    kept = load_file(tmp_path / "tuned" / "checkpoints" / "step-00000001" / "model.safetensors")
    best = load_file(tmp_path / "whole" / "checkpoints" / "best" / "model.safetensors")
    assert all(torch.equal(kept[name], best[name]) for name in best if name.startswith("features"))
    assert kept["fc.weight"].shape[0] == 3


def test_a_setting_that_collapses_is_told_within_an_epoch(pictures, compose):
    alike = {"name": "vicreg", "width": 16, "variance": 0, "covariance": 0}
    data = {"train": str(pictures / "train"), "val": str(pictures / "val"), "batch": 4, "workers": 0}
    over = {"task": alike, "head": HEAD, "unfreeze": EVERYTHING, "phases": {"all": {"lr": 0.05, "duration": "1ep"}}}
    over |= {"data": data}
    run = compose(**over)
    tlx.train.loop.fit(run)
    assert any("collapsed" in note for note in run.notes)
    assert 0 <= run.progress.last["val/spread"] < 0.05
    fine = compose(run=run.folder.with_name("fine"), **{**over, "task": {"name": "vicreg", "width": 16}})
    tlx.train.loop.fit(fine)
    assert not any("collapsed" in note for note in fine.notes)


def test_what_would_be_another_loss_is_refused(pictures, tmp_path):
    def refusal(**over):
        with pytest.raises(UserError) as caught:
            plan(parse(raw(pictures, tmp_path / "r", **over)))
        return str(caught.value)

    data = {"train": str(pictures / "train"), "val": str(pictures / "val"), "workers": 0}
    assert "told from all others" in refusal(loop={"micro_batch": 4})
    assert "one sample" in refusal(data={**data, "batch": 23})
    assert "no metric" in refusal(evaluate={"metric": "val/nn"})
    assert "needs validation data" in refusal(
        data={"train": data["train"], "batch": 8, "workers": 0}, evaluate={"probe": data["train"]}
    )


def test_frozen_layers_and_layer_decay_are_those_of_any_plan(pictures, tmp_path):
    phases = {"each": {"lr": 0.01, "layer_decay": {"name": "exponential", "factor": 0.5}}}
    made, text = plan(parse(raw(pictures, tmp_path / "r", unfreeze="two_phase", phases=phases)))
    rates = made.phases[1].rates(made.phases[1].stop - 1)
    assert rates["head"] > rates["features.2.0"] > rates["features.0.0"] > 0
    assert made.phases[0].trains["features.0.0"] == "frozen"
    assert "2 pictures for each sample" in text


def test_the_default_metric_is_the_probes_where_labels_are_drawn():
    asked = {"probe": "x"}
    assert smallest_config(task="simclr").evaluate.chooses == "val/loss"
    assert smallest_config(task="simclr", evaluate=asked).evaluate.chooses == "val/knn"
    assert smallest_config(task="rotation", evaluate=asked).evaluate.chooses == "val/knn"
    assert smallest_config(evaluate=asked).evaluate.chooses == "val/top1"
