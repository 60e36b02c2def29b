"""Classes by their vectors: files, losses, seen and unseen classes, the constant between them, ESZSL, whole runs."""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json

import numpy as np
import pytest
import torch
from composed import composer, raw_of
from images import make_shards
from safetensors.torch import load_file
from task_data import evaluated, make, of_class
from torch.nn.functional import cross_entropy

import tlx
from tlx.base.errors import UserError
from tlx.data.stream.sampling import Sampling, entries, targets
from tlx.features.eszsl import solved_map
from tlx.models.head_modules import Semantic
from tlx.plan.config import load as load_config
from tlx.plan.config import parse
from tlx.tasks import Truth
from tlx.tasks.class_vectors import from_file
from tlx.tasks.stacking import Stacking, harmonic_mean
from tlx.train import command as training
from tlx.train.build import check_metrics, prepared
from tlx.train.components import backbone_of, unknown_outputs
from tlx.train.data import count_samples
from tlx.train.loop import begin

NAMES = ("bee", "lily of the valley", "zebra", "ant")
CLASSES = of_class(*NAMES)
ROWS = {"Bee": [1.0, 0.0, 2.0], "lily-of-the_Valley": [0.5, 0.5, 0.0], "zebra": [0.0, 3.0, 0.0], "ant": [1.0, 1.0, 1.0]}
OTHERS = {"horse": [9.0, 9.0, 9.0]}


def write(folder, ending):
    rows = OTHERS | ROWS
    file = folder / f"vectors{ending}"
    if ending == ".npz":
        np.savez(file, **rows)
    elif ending == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"name": list(rows), "vector": list(rows.values())}), file)
    elif ending == "-2.npz":
        np.savez(file, names=np.array(list(rows)), vectors=np.array(list(rows.values())))
    else:
        comma = {".csv": ",", ".tsv": "\t"}.get(ending, " ")
        head = {".csv": ["name,stripes,wings,legs"], ".vec": [f"{len(rows)} 3"]}.get(ending, [])
        text = "\n".join([*head, *(comma.join([n, *map(str, v)]) for n, v in rows.items())])
        if ending.endswith(".gz"):
            file.write_bytes(gzip.compress(text.encode()))
        else:
            file.write_text(text)
    return file


def attributes(folder, rows=None):
    rows = ROWS if rows is None else rows
    file = folder / "attributes.csv"
    file.write_text("\n".join(",".join([name, *map(str, row)]) for name, row in rows.items()))
    return str(file)


ENDINGS = [
    ".csv",
    ".tsv",
    ".npz",
    "-2.npz",
    pytest.param(".parquet", marks=pytest.mark.slow),
    ".vec",
    ".txt",
    ".txt.gz",
]


@pytest.mark.parametrize("ending", ENDINGS)
def test_each_format_gives_the_vectors_of_classes_in_their_order(tmp_path, ending):
    found = from_file(write(tmp_path, ending), {name: name for name in NAMES})
    assert found.values.tolist() == [ROWS["Bee"], ROWS["lily-of-the_Valley"], ROWS["zebra"], ROWS["ant"]]
    assert found.values.dtype == np.float32


def test_a_class_of_several_words_is_the_mean_of_them_where_the_file_has_words(tmp_path):
    (tmp_path / "words.txt").write_text("tiger 1 0\nlily 0 1\nrose 2 2\n")
    found = from_file(tmp_path / "words.txt", {"tiger_lily": "tiger_lily", "rose": "rose"})
    assert found.values.tolist() == [[0.5, 0.5], [2.0, 2.0]]
    assert "mean: tiger_lily" in found.source


@pytest.mark.parametrize(
    ("text", "names", "said"),
    [
        ("zebar 1 2\nbee 1 2\n", ["bee", "zebra"], 'no vector of class "zebra"; did you mean "zebar"'),
        ("bee 0 0\n", ["bee"], "only zeros"),
        ("bee nan 0\n", ["bee"], "not finite"),
        ("bee 1 2\nbee 1 2\n", ["bee"], "comes twice"),
        ("bee 1 2\nzebra 1\n", ["bee", "zebra"], "line 2 has 1 numbers"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path, text, names, said):
    (tmp_path / "v.txt").write_text(text)
    with pytest.raises(UserError, match=said):
        from_file(tmp_path / "v.txt", {name: name for name in names})


def test_nothing_is_unpickled(tmp_path):
    np.savez(tmp_path / "v.npz", names=np.array(["bee"], object), vectors=np.ones((1, 2)))
    with pytest.raises(UserError, match="allow_pickle"):
        from_file(tmp_path / "v.npz", {"bee": "bee"})
    with pytest.raises(UserError, match=r'no file .*v.npy; did you mean "v.npz"'):
        from_file(tmp_path / "v.npy", {"bee": "bee"})


def drawn(count=60, seed=0):
    random = np.random.default_rng(seed)
    scores = torch.tensor(random.normal(0, 1, (count, 4)), dtype=torch.float32)
    return scores, torch.tensor(random.integers(0, 4, count))


def test_only_seen_classes_are_in_the_loss(tmp_path):
    task, (scores, labels) = make("semantic", CLASSES, embeddings=attributes(tmp_path), unseen=["zebra"]), drawn()
    seen = labels != 2
    place = torch.tensor([0, 1, -1, 2])[labels[seen]]
    expected = cross_entropy(scores[seen][:, [0, 1, 3]], place, reduction="sum")
    assert float(task.loss(scores, Truth({"label": labels}))) == pytest.approx(float(expected), rel=1e-6)
    assert task.weights({"label": labels.numpy()})[:, 0].tolist() == seen.double().tolist()


def test_hinge_is_the_rank_loss_of_devise(tmp_path):
    task = make("semantic", CLASSES, embeddings=attributes(tmp_path), unseen=["zebra"], loss="hinge", margin=0.3)
    scores, labels = drawn(20)
    expected = sum(
        max(0.0, 0.3 - float(row[label]) + float(row[j]))
        for row, label in zip(scores, labels.tolist(), strict=True)
        if label != 2
        for j in (0, 1, 3)
        if j != label
    )
    assert float(task.loss(scores, Truth({"label": labels}))) == pytest.approx(expected, rel=1e-5)


def by_hand(scores, labels, unseen, constant):
    """Mean accuracies of seen and unseen classes, told among all of them."""
    shifted = scores.double().clone()
    shifted[:, [c for c in range(4) if c not in unseen]] -= constant
    hits = shifted.argmax(1) == labels
    each = {c: float(hits[labels == c].double().mean()) for c in set(labels.tolist())}
    kinds = [[of for c, of in each.items() if (c in unseen) == kind] for kind in (False, True)]
    return tuple(float(np.mean(of)) for of in kinds)


@pytest.mark.parametrize("constant", [0.0, 0.5, -0.7])
def test_seen_unseen_and_harmonic_mean_are_those_of_the_papers(tmp_path, constant):
    task = make("semantic", CLASSES, embeddings=attributes(tmp_path), unseen=["zebra", "bee"], calibration=constant)
    scores, labels = drawn(80)
    found = evaluated(task, scores, labels, ranks=3, ids=torch.arange(80))
    seen, unseen = by_hand(scores, labels, (0, 2), 0.0)
    assert (found["seen"], found["unseen"]) == pytest.approx((seen, unseen))
    assert found["harmonic"] == pytest.approx(2 * seen * unseen / (seen + unseen))
    after = by_hand(scores, labels, (0, 2), constant)
    assert (found["calibrated_seen"], found["calibrated_unseen"]) == pytest.approx(after)
    alone = scores[:, [0, 2]].argmax(1) * 2 == labels
    zsl = np.mean([float(alone[labels == c].double().mean()) for c in (0, 2)])
    assert found["zsl"] == pytest.approx(zsl)
    assert found["top1"] == pytest.approx(float((scores.argmax(1) == labels).double().mean()))
    rows = task.rows(scores, {})
    shifted = scores.clone()
    shifted[:, [1, 3]] -= constant
    assert [NAMES.index(row["label"]) for row in rows] == shifted.argmax(1).tolist()


def test_the_best_constant_is_the_best_of_all_and_the_area_that_of_a_fine_grid():
    scores, labels = drawn(50, seed=3)
    stacking = Stacking.of(scores.double(), labels, (0, 2), torch.ones(50, dtype=torch.bool))
    grid = np.linspace(-6, 6, 1201)
    pairs = np.array([by_hand(scores, labels, (0, 2), constant) for constant in grid[::6]])
    best = max(harmonic_mean(*pair) for pair in pairs)
    assert harmonic_mean(*by_hand(scores, labels, (0, 2), stacking.best())) >= best - 1e-9
    curve = np.array([stacking.accuracies(constant) for constant in grid])
    area = ((curve[1:, 0] + curve[:-1, 0]) / 2 * np.diff(curve[:, 1])).sum()
    assert stacking.area() == pytest.approx(area, abs=6e-3)


def test_the_constant_of_validation_is_judged_by_the_other_half_and_kept_for_test_data(tmp_path):
    task = make("semantic", CLASSES, embeddings=attributes(tmp_path), unseen=["zebra"])
    scores, labels = drawn(90, seed=5)
    found = evaluated(task, scores, labels, ids=torch.arange(90))
    ones = torch.ones(45, dtype=torch.bool)
    of_even, of_odd = (Stacking.of(scores[i::2].double(), labels[i::2], (2,), ones).best() for i in (0, 1))
    shifted = scores.double().clone()
    shifted[::2, [0, 1, 3]] -= of_odd
    shifted[1::2, [0, 1, 3]] -= of_even
    assert found["calibrated_unseen"] == pytest.approx(by_hand(shifted, labels, (2,), 0.0)[1])
    [constant] = found["calibration"]
    assert constant == Stacking.of(scores.double(), labels, (2,), torch.ones(90, dtype=torch.bool)).best()
    settled = task.settled(found)
    other, own = drawn(40, seed=6)
    told = evaluated(settled, other, own, ids=torch.arange(40))
    assert told["calibration"] == [constant]
    assert (told["calibrated_seen"], told["calibrated_unseen"]) == pytest.approx(by_hand(other, own, (2,), constant))


def test_what_has_no_answer_is_wrong(tmp_path):
    task = make("semantic", CLASSES, embeddings=attributes(tmp_path), unseen=["zebra"])
    scores, labels = drawn(30)
    scores[:10] = torch.nan
    found = evaluated(task, scores, labels, ids=torch.arange(30))
    right = (scores[10:].argmax(1) == labels[10:]).sum()
    assert found["nonfinite"] == 10
    assert found["top1"] == pytest.approx(float(right) / 30)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"unseen": ["zebr"]}, 'no class "zebr"; did you mean "zebra"'),
        ({"unseen": list(NAMES[:3])}, "1 of 4 classes are seen"),
        ({"names": {"be": "x"}}, 'no class "be"'),
        ({"margin": 0.2}, "is of loss hinge"),
        ({"prompts": ["a {}"]}, "prompts are for a text encoder"),
        ({"width": 3}, "the vectors say it themselves"),
    ],
)
def test_mistakes_are_told(tmp_path, given, said):
    with pytest.raises(UserError, match=said):
        make("semantic", CLASSES, embeddings=attributes(tmp_path), **given)


def plain_eszsl(features, labels, vectors, gamma, lambda_):
    """Equation 9 of the paper, by inverses; penalties in units of mean eigenvalues."""
    present = sorted(set(labels.tolist()))
    x, s = features.numpy().T.astype(np.float64), vectors.numpy()[present].T.astype(np.float64)
    y = np.where(labels.numpy()[:, None] == np.array(present), 1.0, -1.0)
    left, right = x @ x.T, s @ s.T
    left += gamma * np.trace(left) / len(left) * np.eye(len(left))
    right += lambda_ * np.trace(right) / len(right) * np.eye(len(right))
    return np.linalg.inv(left) @ x @ y @ s.T @ np.linalg.inv(right)


def test_the_closed_form_is_that_of_the_paper():
    generator = torch.Generator().manual_seed(0)
    features, vectors = torch.randn(40, 6, generator=generator), torch.randn(5, 3, generator=generator)
    labels = torch.randint(0, 4, (40,), generator=generator)
    found = solved_map(features, labels, vectors, strengths=(0.1,))
    assert (found.gamma, found.accuracy) == (1.0, None)  # nothing to choose from
    np.testing.assert_allclose(found.weight.T, plain_eszsl(features, labels, vectors, 1.0, 1.0), rtol=1e-4, atol=1e-6)


def test_penalties_are_chosen_by_classes_held_out():
    generator = torch.Generator().manual_seed(1)
    vectors = torch.randn(8, 4, generator=generator)
    labels = torch.arange(8).repeat_interleave(6)
    features = vectors[labels] @ torch.randn(4, 10, generator=generator) + torch.randn(48, 10, generator=generator)
    strengths = (0.01, 1.0, 100.0)
    found = solved_map(features, labels, vectors, strengths=strengths)

    def held_out(gamma, lambda_):
        shares = []
        for fold in range(4):
            held = list(range(fold, 8, 4))
            out = np.isin(labels, held)
            weight = plain_eszsl(features[~out], labels[~out], vectors, gamma, lambda_)
            told = np.array(held)[(features[out].numpy() @ weight @ vectors[held].numpy().T).argmax(1)]
            shares += [(told == labels[out].numpy())[labels[out].numpy() == c].mean() for c in held]
        return np.mean(shares)

    scores = {pair: held_out(*pair) for pair in itertools.product(strengths, strengths)}
    assert found.accuracy == pytest.approx(max(scores.values()))
    assert scores[found.gamma, found.lambda_] == pytest.approx(max(scores.values()))


@pytest.mark.parametrize("method", ["all", "balanced", "sqrt"])
def test_an_epoch_shows_nothing_of_classes_left_out_and_all_of_the_others(method):
    labels = np.array([0, 1, 2, 1, 2, 2, 0, 3, 3, 3], np.int32)
    sampling = Sampling(method, without=(1, 3))
    counts = np.bincount(labels)
    ids = entries(sampling, labels, 4, seed=1, epoch=2)
    assert set(labels[ids].tolist()) == {0, 2}
    assert np.bincount(labels[ids], minlength=4).tolist() == targets(sampling, counts).tolist()
    assert len(ids) == 5
    if method == "all":
        assert ids.tolist() == np.flatnonzero(np.isin(labels, (0, 2))).tolist()


# Whole runs


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("s") / "s", classes=4, per_class={"train": 6, "val": 5}, size=24)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TLX_FEATURES", str(tmp_path / "features"))
    monkeypatch.delenv("RANK", raising=False)


def over(folder, shards, **more):
    names = tlx.data.shards.manifest.Manifest.open(shards / "val").classes
    file = attributes(folder, dict(zip(names, np.eye(4)[:, :3] + 0.2, strict=True)))
    task = {"name": "semantic", "embeddings": file, "unseen": [names[1]], **more}
    return {"task": task, "transforms": [{"name": "resize", "size": [16, 16]}], "unfreeze": "head_only"}, names


def test_a_mistake_of_the_task_is_the_only_one_and_weights_are_fetched_before_vectors_are_known(shards, tmp_path):
    settings, names = over(tmp_path, shards)
    settings["task"]["unseen"] = [names[1] + "x"]
    config = parse(raw_of(shards, tmp_path / "run", **settings))
    with pytest.raises(UserError) as caught:
        prepared(config)
    assert "task.unseen" in str(caught.value)
    assert "head semantic" not in str(caught.value)
    known = backbone_of(config, unknown_outputs(config), empty=True)
    assert [tuple(m.vectors.shape) for m in known.module.modules() if isinstance(m, Semantic)] == [(2, 2)]


def test_a_run_leaves_out_unseen_classes_and_its_weights_need_no_file(shards, tmp_path):
    settings, names = over(tmp_path, shards)
    config = parse(raw_of(shards, tmp_path / "run", **settings, cache="exact"))
    assert config.head.name == "semantic"
    assert config.evaluate.metric == "val/harmonic"
    training.train(config)
    (tmp_path / "attributes.csv").unlink()
    run = tmp_path / "run"
    result = json.loads((run / "result.json").read_text())
    assert result["samples_seen"] == 2 * 18  # three of four classes, two epochs
    model = tlx.load(run)
    assert model.task.unseen == (1,)
    assert model.description.kept["calibration"] == [model.task.calibration]
    state = load_file(run / "checkpoints" / "best" / "model.safetensors")
    vectors = next(t for name, t in state.items() if name.endswith(".vectors"))
    np.testing.assert_allclose(np.linalg.norm(vectors.numpy(), axis=1), 1, rtol=1e-6)
    told = model.evaluate(str(shards / "val"))
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    best = json.loads((run / "model.json").read_text())["metrics"]
    assert {name: told[name] for name in ("seen", "unseen", "ausuc")} == pytest.approx(
        {name: best[name] for name in ("seen", "unseen", "ausuc")}
    )
    assert "val/calibrated_harmonic" in row
    again = load_config(run / "config.yaml", libraries=False)
    assert again.task.args["unseen"] == [names[1]]


def test_a_head_begins_as_eszsl_on_seen_pictures_alone(shards, tmp_path, monkeypatch):
    from tlx.train.cached import input_of
    from tlx.train.solved import solve_head

    settings, _ = over(tmp_path, shards)
    head = {"name": "semantic", "init": "solved"}
    run = composer(shards, tmp_path / "run", monkeypatch)(**settings, cache="exact", head=head)
    begin(run, run.plan.phases[0])
    source = input_of(run, run.plan.phases[0])
    solve_head(run, source)
    own = next(one for one in run.net.modules() if isinstance(one, Semantic))
    labels = run.stream.manifest.labels
    shown = np.flatnonzero(labels != 1)
    assert run.stream.loader.among.tolist() == shown.tolist()
    rows = torch.from_numpy(source.stream.stored.store.rows(0)[shown].copy())
    expected = plain_eszsl(rows, torch.from_numpy(labels[shown].astype(np.int64)), own.vectors, 1.0, 1.0)
    np.testing.assert_allclose(own.map.weight.detach().T, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"head": "linear"}, "which head linear has no use for"),
        ({"task": "classification", "head": "semantic"}, "this task has none"),
        ({"head": {"name": "semantic", "init": "projection"}}, "none are"),
    ],
)
def test_head_and_task_belong_together(shards, tmp_path, monkeypatch, change, said):
    settings, _ = over(tmp_path, shards)
    with pytest.raises(UserError, match=said):
        composer(shards, tmp_path / "run", monkeypatch)(**settings | change)


def test_a_validation_without_unseen_pictures_cannot_choose_by_them(shards, tmp_path):
    settings, _ = over(tmp_path, shards)
    config = parse(raw_of(shards, tmp_path / "run", **settings))
    task, _, plan, notes = prepared(config)
    assert any("chance: 25.0% among all classes, 100.0% among unseen ones" in note for note in notes)
    assert any("none of the 1 unseen ones" in note for note in notes)
    samples = count_samples(config)
    own = dataclasses.replace(samples.val["label"], counts=(5, 0, 5, 5))
    check_metrics(config, plan, task, samples)
    with pytest.raises(UserError, match="val/harmonic is never a number; validate on some"):
        check_metrics(config, plan, task, dataclasses.replace(samples, val={"label": own}))
