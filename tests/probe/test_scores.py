"""What ranks networks and classifiers of few pictures, against slow ways of the same and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import multivariate_normal
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch.nn.functional import normalize

from tlx.base.errors import UserError
from tlx.features.knn import Table, chosen_k, votes
from tlx.probe.costs import _Counting
from tlx.probe.episodes import Accuracy, Wanted, cosine, drawn, judged, prototypes, regression
from tlx.probe.logme import logme


def rows(many=30, width=6, classes=3, apart=1.0, seed=0):
    torch.manual_seed(seed)
    labels = torch.arange(many) % classes
    return torch.randn(many, width) + apart * torch.randn(classes, width)[labels], labels


@pytest.mark.parametrize("width", [6, 40])
def test_logme_is_the_largest_evidence_of_a_gaussian(width):
    """Labels of a class are Gaussian with the covariance 1/beta + F F'/alpha: its density, maximised without the
    paper's equations."""
    features, labels = rows(width=width)
    each = []
    for label in range(3):
        truth = (labels == label).double().numpy()
        gram = features.double().numpy() @ features.double().numpy().T

        def against(at, truth=truth, gram=gram):
            covariance = np.eye(30) / np.exp(at[1]) + gram / np.exp(at[0])
            return -multivariate_normal(np.zeros(30), covariance).logpdf(truth)

        each.append(-min(minimize(against, start, method="Nelder-Mead").fun for start in ([0, 0], [4, 2])))
    assert logme(features, labels, 3) == pytest.approx(np.mean(each) / 30, abs=1e-4)


def test_logme_is_higher_where_classes_are_apart():
    assert logme(*rows(apart=3.0), 3) > logme(*rows(apart=0.3), 3)


def test_neighbours_are_those_of_scikit_learn():
    features, labels = rows(60, apart=0.8)
    others, _ = rows(40, apart=0.8, seed=1)
    table = Table(features, labels, torch.arange(60))
    own = votes(table, Table(others, torch.zeros(40, dtype=torch.int64), torch.arange(40)), 3, 5)
    there = KNeighborsClassifier(5, metric="cosine").fit(features, labels).predict_proba(others)
    torch.testing.assert_close((own / own.sum(1, keepdim=True)).double(), torch.from_numpy(there), atol=0.06, rtol=0)
    hits = {}
    for k in (1, 10):
        one, hits[k] = KNeighborsClassifier(k, metric="cosine"), 0
        for n in range(60):
            one.fit(np.delete(features, n, 0), np.delete(labels, n))
            hits[k] += int(one.predict(features[n][None])[0] == labels[n])
    assert hits[1] != hits[10]
    assert hits[chosen_k(table, 3, (1, 10))] == max(hits.values())


def test_views_of_a_picture_do_not_judge_each_other():
    """The nearest of another class, the next ones of the own; two views of each, of which one would be right always."""
    angles = torch.tensor([0.0, 0.02, 0.2, 0.22]).repeat(2)
    features, labels = torch.stack([angles.cos(), angles.sin()], 1), torch.tensor([0, 1, 0, 0]).repeat(2)
    assert chosen_k(Table(features, labels, torch.arange(8)), 2, (1, 6)) == 1
    assert chosen_k(Table(features, labels, torch.arange(4).repeat(2)), 2, (1, 6)) == 6


@pytest.mark.parametrize("shots", [1, 4])
def test_classifiers_of_episodes(shots):
    """Each by itself: means by hand, scikit-learn's regression of normalised features."""
    torch.manual_seed(shots)
    support, queries = torch.randn(3, 4, shots, 9), torch.randn(3, 20, 9)
    for episode in range(3):
        means = support[episode].mean(1)
        nearest = ((queries[episode][:, None] - means[None]) ** 2).sum(2).argmin(1)
        assert torch.equal(prototypes(support, queries)[episode].argmax(1), nearest)
        known = normalize(support[episode], dim=2).flatten(0, 1).double().numpy()
        other = LogisticRegression(C=1.0, tol=1e-10, max_iter=5000).fit(known, np.repeat(np.arange(4), shots))
        there = torch.from_numpy(other.predict_proba(normalize(queries[episode], dim=1).double().numpy()))
        own = regression(support, queries)[episode].softmax(1)
        torch.testing.assert_close(own, there, atol=1e-4, rtol=1e-3)
    alone = cosine(support[1:2], queries[1:2])
    torch.testing.assert_close(cosine(support, queries)[1:2], alone)


def test_episodes_are_of_the_seed_and_keep_queries_apart():
    labels = torch.arange(120) % 6
    wanted = Wanted([1, 5], ways=4, episodes=50, queries=8)
    places = drawn(labels, list("abcdef"), wanted, seed=3)
    assert torch.equal(places, drawn(labels, list("abcdef"), wanted, seed=3))
    assert not torch.equal(places, drawn(labels, list("abcdef"), wanted, seed=4))
    assert all(len(set(one.flatten().tolist())) == 4 * 13 for one in places)  # a query is no picture to learn from
    assert (labels[places] == labels[places][:, :, :1]).all()
    assert labels[places][:, :, 0].unique().tolist() == list(range(6))


def test_few_pictures_are_worth_less():
    features, labels = rows(300, width=20, classes=6, apart=0.6)
    wanted = Wanted([1, 10], ways=5, episodes=100, queries=10)
    places = drawn(labels, list("abcdef"), wanted, seed=0)
    one, ten = (judged(features, places, shots, wanted) for shots in (1, 10))
    for name in one:
        assert 0.2 < one[name].mean < ten[name].mean - ten[name].half
    chance = judged(torch.randn(300, 20), places, 1, wanted)
    assert all(abs(of.mean - 0.2) < 2 * of.half for of in chance.values())
    assert Accuracy.of(torch.tensor([0.0, 1.0] * 50)).half == pytest.approx(1.96 * 0.05, rel=0.01)


def test_classes_of_too_few_pictures_are_named():
    labels = torch.tensor([0] * 20 + [1] * 9 + [2] * 20)
    with pytest.raises(UserError, match="15 pictures of a class: bee 9") as told:
        drawn(labels, ["ant", "bee", "fly"], Wanted([5], ways=2, queries=10), seed=0)
    assert "fewer --queries" in str(told.value)
    with pytest.raises(UserError, match="4 ways, and 3 classes"):
        drawn(labels, ["ant", "bee", "fly"], Wanted([1], ways=4, queries=2), seed=0)


def test_memory_is_what_is_there_at_once():
    a = torch.randn(500, 500)
    with torch.no_grad(), _Counting() as counting:
        for _ in range(4):
            b = (a @ a).relu()
            del b
    assert counting.peak == 2 * a.nbytes
