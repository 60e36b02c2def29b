"""`tlx models`: what there is to choose from, and choosing."""

from __future__ import annotations

import json
from fnmatch import fnmatch

import pytest
from typer.testing import CliRunner

from tlx import models
from tlx.base.errors import UserError
from tlx.cli.main import app
from tlx.models import Only
from tlx.models import model_table as catalogue
from tlx.models.libraries import counts


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The user's cache folder, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tlx"


@pytest.fixture(scope="module")
def everything():
    return list(models.search())


def found(pattern="*", *, order="name", **only):
    return list(models.search(pattern, Only(**only), order=order, details=0))


def invoke(*words):
    return CliRunner().invoke(app, ["models", *map(str, words)])


def test_everything_is_listed_with_what_the_libraries_say(everything):
    rows = {row.name: row for row in everything}
    assert len(rows) == len(everything) > 1400
    assert sorted(rows) == [row.name for row in everything]
    assert all(row.family and row.input for row in everything)
    vit, swag = rows["timm/vit_base_patch16_384"], rows["torchvision/vit_h_14"]
    assert (vit.family, vit.input.size, vit.accuracy, vit.parameters) == ("vision_transformer", (384, 384), None, None)
    assert (swag.family, swag.input.size, swag.accuracy) == ("vision_transformer", (518, 518), 0.88552)
    assert swag.parameters == 633_470_440
    assert all(row.accuracy > 0.4 for row in everything if row.name.startswith("torchvision/"))


@pytest.mark.parametrize(
    ("only", "kept"),
    [
        ({"library": "timm"}, lambda r: r.name.startswith("timm/")),
        ({"library": "torchvision", "family": "resnet"}, lambda r: r.family == "resnet" and r.name[:5] == "torch"),
        ({"family": "swin*"}, lambda r: r.family.startswith("swin")),
        ({"size": (384, 384)}, lambda r: r.input.size == (384, 384)),
        ({"size": (None, 160)}, lambda r: max(r.input.size) <= 160),
        ({"size": (500, 600)}, lambda r: all(500 <= n <= 600 for n in r.input.size)),
        ({"size": (700, 800)}, lambda r: r.input.size != (1024, 768) and 700 <= r.input.size[1] <= 800),
        ({"pretrained": True}, lambda r: bool(r.weights)),
        ({"library": "torchvision", "parameters": (None, 3_000_000)}, lambda r: r.name in SMALL),
        ({"library": "torchvision", "parameters": (1_248_424, 1_248_424)}, lambda r: r.name[12:] == "squeezenet1_0"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_filters_keep_what_they_say_and_nothing_else(everything, only, kept):
    names = [row.name for row in found(**only)]
    assert names
    assert names == [row.name for row in everything if kept(row)]


SMALL = [
    "torchvision/mnasnet0_5",
    "torchvision/mobilenet_v3_small",
    "torchvision/shufflenet_v2_x0_5",
    "torchvision/shufflenet_v2_x1_0",
    "torchvision/squeezenet1_0",
    "torchvision/squeezenet1_1",
]


@pytest.mark.parametrize("pattern", ["in22k", "*in22k*", "IN22K", "*_384"])
def test_rows_are_about_the_weights_that_are_asked_for(everything, pattern):
    shell = (pattern if "*" in pattern else f"*{pattern}*").lower()
    rows = found("convnext*", weights=pattern)
    assert {row.name: row.weights for row in rows} == {
        row.name: tags
        for row in everything
        if row.name.partition("/")[2].startswith("convnext")
        and (tags := tuple(t for t in row.weights if fnmatch(t.lower(), shell)))
    }
    if "384" in pattern:
        assert {row.input.size for row in rows} == {(384, 384)}
        assert found("convnext_base", library="timm")[0].input.size != (384, 384)
    first, second = (found("torchvision/resnet50", weights=tag)[0] for tag in ("v1", "v2"))
    assert (first.accuracy, second.accuracy) == (0.7613, 0.80858)


def test_orders():
    by_size = [row.parameters for row in found("resnet1*", library="torchvision", order="params")]
    assert by_size == sorted(by_size)
    shares = [row.accuracy for row in found("*net*50*", order="accuracy")]
    known = [share for share in shares if share is not None]
    assert known == sorted(known, reverse=True)
    assert shares[: len(known)] == known != shares


@pytest.mark.parametrize(
    ("pattern", "only", "message"),
    [
        ("zzz", {}, 'no backbone matches "zzz"'),
        ("*", {"library": "tim"}, 'no library "tim"; did you mean "timm"'),
        ("*", {"family": "resnett"}, 'no family "resnett"; did you mean "resnet"'),
        ("*", {"family": "levit", "library": "torchvision"}, 'no family "levit"'),
        ("vgg16", {"family": "resnet"}, 'left: 4 match "vgg16", none of family resnet'),
        (
            "vgg16",
            {"library": "torchvision", "size": (300, None)},
            "2 of torchvision, none for images of at least 300 pix",
        ),
        ("vgg16", {"family": "vgg", "weights": "x"}, '4 of family vgg, none with weights "x"'),
        ("timm/resnet50[t]", {"pretrained": True}, "none with pretrained weights"),
        (
            "torchvision/vgg16",
            {"pretrained": True, "parameters": (1, 1000)},
            "2 with pretrained weights, none of 1 to 1,000 parameters",
        ),
    ],
)
def test_a_filter_that_leaves_nothing_is_named(pattern, only, message):
    with pytest.raises(UserError) as caught:
        found(pattern, **only)
    assert message in str(caught.value)


TINY = "timm/test_vi[t]"
"""A pattern that matches this name alone."""

NETWORKS = [
    "torchvision/googlenet",
    "torchvision/vit_b_16",
    "timm/resnet18",
    "timm/vit_tiny_patch16_224",
    "timm/test_efficientnet",
    "timm/swinv2_cr_tiny_224",
    "timm/levit_128",
]


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_said_and_counted_is_what_building_shows(name):
    (short,) = models.search(f"{name[:-1]}[{name[-1]}]", details=0, counted=1)
    full = models.describe(name).row
    assert (short.parameters, short.input, short.weights) == (full.parameters, full.input, full.weights)


@pytest.mark.slow
def test_every_network_is_what_it_is_said_to_be(everything):
    for row in everything[::150]:
        (counted,) = (r for r in models.search(row.name, details=0, counted=99) if r.name == row.name)
        full = models.describe(row.name).row
        assert (counted.parameters, counted.input) == (full.parameters, full.input), row.name


def test_counts_are_remembered_for_a_version_and_never_trusted_blindly(cache, monkeypatch):
    (row,) = found(TINY, parameters=(1, None))
    (file,) = cache.iterdir()
    assert json.loads(file.read_text()) == {"timm/test_vit@r160_in1k": row.parameters}
    calls = []
    monkeypatch.setattr(counts, "_count", lambda source, tag: calls.append(source.name) or 7)
    assert found(TINY, parameters=(1, None)) == [row]
    assert not calls
    for damaged in (
        '{"timm/test_vit@r160_in1k": -1}',
        '{"timm/test_vit@r160_in1k": true}',
        "[1]",
        "{",
        "\xff",
        "[" * 10**5,
    ):
        file.write_text(damaged, encoding="latin-1")
        assert found(TINY, parameters=(1, None))[0].parameters == 7
    assert len(calls) == 6
    monkeypatch.setattr(counts, "version", lambda library: "another")
    found(TINY, parameters=(1, None))
    assert len(calls) == 7
    assert len(list(cache.iterdir())) == 2


def test_a_cache_that_cannot_be_written_is_none(cache):
    cache.parent.write_text("a file in its place")
    assert found(TINY, parameters=(1, None))[0].parameters > 100_000


def test_an_interrupted_count_keeps_what_it_has(cache, monkeypatch):
    def impatient(source, tag):
        if source.name != "timm/test_byobnet":
            raise KeyboardInterrupt
        return 5

    monkeypatch.setattr(counts, "_count", impatient)
    with pytest.raises(KeyboardInterrupt):
        found("timm/test_*", parameters=(1, None))
    (file,) = cache.iterdir()
    assert list(json.loads(file.read_text()).values()) == [5]


def test_networks_that_cannot_be_built_or_imported_hide_no_others(monkeypatch):
    from tlx.models.libraries.from_timm import Timm

    monkeypatch.setattr(Timm, "build", lambda *_: 1 / 0)
    rows = {row.name: row for row in models.search("resnet18", details=0, counted=99)}
    assert rows["timm/resnet18"].parameters is None
    assert rows["torchvision/resnet18"].parameters == 11_689_512
    assert "timm/resnet18" in catalogue.listing("resnet18")
    assert [r.name for r in found("resnet18", parameters=(1, None))] == ["torchvision/resnet18"]
    assert found("resnet18", order="params")[0].name == "torchvision/resnet18"  # the unknown ones last


def test_other_packages_networks_are_listed_even_under_a_name_of_a_library(tmp_path, monkeypatch):
    (tmp_path / "lodger_nets.py").write_text("from toys import small\n")
    info = tmp_path / "lodger-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lodger\nVersion: 1.0\n")
    entries = "tiny_18 = lodger_nets:small\nresnet18 = lodger_nets:small\nbroken_18 = nowhere:small\n"
    (info / "entry_points.txt").write_text(f"[tlx.backbone]\n{entries}")
    monkeypatch.syspath_prepend(str(tmp_path))
    rows = {row.name: row for row in models.search("*18", details=0, counted=99)}
    assert rows["tiny_18"].parameters == rows["resnet18"].parameters > 30_000
    assert rows["tiny_18"].family == "toys"
    assert rows["broken_18"].parameters is None
    assert [row.name for row in found("*18", family="toys")] == ["resnet18", "tiny_18"]


def test_the_table_and_json():
    shown = invoke("resnet18", "--library", "torchvision")
    assert shown.exit_code == 0
    for part in ("torchvision/resnet18", "resnet", "11,689,512", "224 x 224", "69.76", "IMAGENET1K_V1", "1 backbone;"):
        assert part in shown.stdout
    rows = [json.loads(line) for line in invoke("resnet18", "--json").stdout.splitlines()]
    assert rows[-1] == {
        "name": "torchvision/resnet18",
        "library": "torchvision",
        "family": "resnet",
        "parameters": 11689512,
        "input": [224, 224],
        "accuracy": 0.69758,
        "weights": ["IMAGENET1K_V1"],
    }
    assert rows[0]["accuracy"] is None
    assert invoke("resnet18", "--json").stderr == ""
    many = invoke("--pretrained").stdout
    assert "parameters are counted of 100 or fewer" in many


def test_the_words_of_the_command():
    words = ["--family", "vgg", "--min-params", "130M", "--max-params", "0.1387b", "--size", "200-", "--weights", "v1"]
    shown = invoke(*words, "--sort", "params", "--json").stdout.splitlines()
    names = [json.loads(line)["name"].partition("/")[2] for line in shown]
    assert names == ["vgg11", "vgg11_bn", "vgg13", "vgg13_bn", "vgg16", "vgg16_bn"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--min-params", "many"), '"many" is not a number of parameters'),
        (("--size", "big"), '"big" is not a size of images'),
        (("--size", "-"), '"-" is not a size'),
        (("--sort", "size"), 'no order "size"; choose from name, params, accuracy'),
        (("show",), "show takes the name of one model"),
        (("show", "timm/resnet18", "--pretrained"), "show takes the name of one model"),
        (("resnet18", "vgg16"), '"vgg16" is one argument too many'),
    ],
)
def test_mistakes(words, message):
    refused = invoke(*words)
    assert isinstance(refused.exception, UserError)
    assert message in str(refused.exception)


def test_numbers_and_ranges():
    said = {"5M": 5_000_000, "300k": 300_000, "1.5B": 1_500_000_000, "25,557,032": 25_557_032, "7": 7}
    assert {text: catalogue.number(text) for text in said} == said
    ranges = {"224": (224, 224), "224-384": (224, 384), "-256": (None, 256), "300-": (300, None)}
    assert {text: catalogue.size_range(text) for text in ranges} == ranges
