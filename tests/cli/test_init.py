"""`tlx init PHOTOS` and `tlx train PHOTOS`: from a folder of pictures to a configuration that says why; nothing twice,
nothing over what a person wrote. Promised by README."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from commands import invoke, kill_all, start, tlx, wait_for_step
from images import make_folder
from PIL import Image

from tlx.base.errors import UserError
from tlx.cli import init as cli
from tlx.cli.init import configuration_of
from tlx.init.pictures import _places
from tlx.init.start import made_before
from tlx.plan.config import load

BACKBONE = ("--backbone", "toys:small")


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Three classes of eight pictures, in the working folder."""
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "photos", size=24)
    return tmp_path / "photos"


def init(*words):
    done = invoke("init", "photos", *BACKBONE, *words)
    return done.output if done.exit_code == 0 else pytest.fail(done.output)


def test_a_folder_becomes_a_configuration_whose_lines_say_why(photos):
    shown = init()
    assert "shards/photos/train: 18 samples" in shown
    assert "photos-small.yaml is written" in shown
    assert "tlx weights fetch" not in shown
    text = (photos.parent / "photos-small.yaml").read_text()
    assert "# 18 training and 6 validation pictures, 3 classes." in text
    assert all(line.startswith("#") or len(line) <= 120 for line in text.splitlines())
    config = load("photos-small.yaml", ["backbone.weights=none"])
    assert (str(config.run), config.data.train, config.data.batch) == ("runs/photos-small", "shards/photos/train", 32)
    settings = config.settings("feature_extraction")
    assert (str(settings.duration), settings.lr) == ("16ep", 3e-3)
    assert config.settings("fine_tuning").layer_decay.name == "linear"


def test_nothing_is_done_twice_and_what_has_changed_gets_a_place_of_its_own(photos):
    init()
    again = init()
    assert "nothing done" in again
    assert "was there already, and says the same" in again
    before = (photos.parent / "photos-small.yaml").read_bytes()
    shutil.copy(photos / "class0" / "0000.jpg", photos / "class0" / "more.jpg")
    changed = init()
    assert "shards/photos was built, which stays as it is" in changed
    assert "shards/photos-2/train: 19 samples" in changed
    assert (photos.parent / "photos-small.yaml").read_bytes() == before
    assert str(load("photos-2-small.yaml", ["backbone.weights=none"]).run) == "runs/photos-2-small"
    assert "nothing done" in init()  # the newest


def test_a_folder_above_is_known_again_and_has_its_name(photos, monkeypatch):
    (photos.parent / "below").mkdir()
    monkeypatch.chdir(photos.parent / "below")
    for said in ("photos-small.yaml is written", "was there already, and says the same"):
        assert said in invoke("init", "../photos", *BACKBONE).output
    assert [folder.name for folder in Path("shards").iterdir()] == ["photos"]
    assert made_before(Path("../photos"), "toys:small") == Path("photos-small.yaml")
    monkeypatch.chdir(photos / "class0")
    assert next(_places(Path(".."), None)) == ("photos", Path("shards/photos"))


def test_the_command_that_made_a_configuration_is_whole(photos):
    init("--shards", "kept", "--val", "0.5", "--no-nested", "--skip-bad", "--out", "a/mine.yaml")
    first = (photos.parent / "a" / "mine.yaml").read_text().partition("\n")[0]
    words = "--backbone toys:small --out a/mine.yaml --shards kept --val 0.5 --no-nested --skip-bad"
    assert first == f"# Made by: tlx init photos {words}"


def test_an_output_that_cannot_be_written_is_refused_before_shards_are_built(photos):
    refused = invoke("init", "photos", *BACKBONE, "--out", "/proc/x.yaml")
    assert "/proc: cannot be written: " in str(refused.exception)
    assert not (photos.parent / "shards").exists()


def test_an_edited_configuration_stays_and_is_trained(photos):
    init("--val", "0.5")
    file = photos.parent / "photos-small.yaml"
    file.write_text(file.read_text().replace("batch: 32", "batch: 6"))
    edited = file.read_bytes()
    refused = invoke("init", "photos", *BACKBONE)
    assert isinstance(refused.exception, UserError)
    assert "stays as it is\n  -> tlx train photos-small.yaml" in str(refused.exception)
    assert configuration_of(photos.relative_to(photos.parent), ["backbone.name=toys:small"]) == file.relative_to(
        photos.parent
    )
    assert file.read_bytes() == edited


def test_train_makes_what_init_makes_and_then_trains(photos, monkeypatch):
    asked = []
    monkeypatch.setattr("tlx.cli.main.signal.signal", lambda *_: None)  # SIGHUP, of all tests after this one
    monkeypatch.setattr("tlx.train.command.train", lambda config, **_: asked.append(config))
    words = ("train", "photos", "backbone.name=toys:small", "backbone.weights=none", "seed=3")
    first = invoke(*words)
    assert "photos-small.yaml is written" in first.output
    assert "as it was made from photos" in invoke(*words).output
    assert [(str(c.run), c.seed, c.data.batch) for c in asked] == [("runs/photos-small", 3, 32)] * 2


def test_several_ranks_train_what_one_process_has_made(photos, monkeypatch):
    monkeypatch.setattr(cli, "environment", lambda: SimpleNamespace(size=2))
    with pytest.raises(UserError, match=r"tlx init .*photos --backbone toys:small   and then the same command"):
        configuration_of(photos, ["backbone.name=toys:small"])
    init()
    assert str(configuration_of(photos, ["backbone.name=toys:small"])) == "photos-small.yaml"


def test_what_a_folder_holds_is_told(photos):
    for split, names in (("train", range(8)), ("val", range(3))):
        for name in ("class0", "class1", "class2"):
            (photos / split / name).mkdir(parents=True)
            for i in names:
                shutil.copy(photos / name / f"{i:04d}.jpg", photos / split / name)
    for name in ("class0", "class1", "class2"):
        shutil.rmtree(photos / name)
    for i in range(100):
        Image.effect_noise((24, 24), 40 + i).convert("RGB").save(photos / "train" / "class0" / f"more{i}.jpg")
    shown = init()
    assert "warning: 9 pictures in several splits" in shown
    text = (photos.parent / "photos-small.yaml").read_text()
    assert "classes have 8 to 108 pictures; rare ones more often: sampling: {method: sqrt}" in text


def test_a_test_split_is_named_and_reports(photos):
    classes = list(photos.iterdir())
    for split, seed in (("train", 0), ("val", 1), ("test", 2)):
        make_folder(photos / split, size=24, seed=seed)
    for folder in classes:
        shutil.rmtree(folder)
    assert "data.test: 24 samples, judged once, at the end" in init()
    assert load("photos-small.yaml", ["backbone.weights=none"]).data.test == "shards/photos/test"


def broken(photos):
    (photos / "class0" / "broken.jpg").write_bytes(b"\xff\xd8 no picture")


def only(photos, keep):
    for folder in list(photos.iterdir()):
        if folder.name not in keep:
            shutil.rmtree(folder)


def nested(photos):
    for name in ("class0", "class1", "class2"):
        (photos / name / "deep").mkdir()
        for file in photos.joinpath(name).glob("*.jpg"):
            file.rename(photos / name / "deep" / file.name)


def wrapped(photos):
    (photos / "all").mkdir()
    for name in ("class0", "class1", "class2"):
        (photos / name).rename(photos / "all" / name)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda photos: only(photos, ()), "there are no class folders here"),
        (lambda photos: only(photos, ("class1",)), "a classifier needs two classes or more; here: class1"),
        (broken, r"1 unreadable picture:\n.*broken.jpg.*\n.*--skip-bad \(of tlx init photos; then the same command\)"),
        (nested, r"inside of the class folders, such as class0/deep\n  -> --nested makes .*of tlx init photos"),
        (wrapped, r"only one folder here, with folders in it\n  -> name photos/all\?"),
        (lambda photos: (photos / "config.yaml").touch(), "this is a run\n  -> tlx train photos/config.yaml"),
        (lambda photos: (photos / "0.tar").touch(), r"these are shards, not pictures\n  -> .*\{train: photos\}"),
        (lambda photos: (photos.parent / "shards").write_text(""), "this is a file|Not a directory|not a directory"),
    ],
)
def test_a_mistake_is_one_message(photos, make, message):
    make(photos)
    done = invoke("train", "photos", "backbone.name=toys:small")
    assert isinstance(done.exception, UserError | OSError), done.output
    with pytest.raises(type(done.exception), match=message):
        raise done.exception
    assert not list(photos.parent.glob("*.yaml"))


def test_other_things_than_a_folder_are_named(photos):
    (photos.parent / "photos.csv").write_text("path,label\n")
    for what, message in (("photos.csv", "tlx shards build photos.csv"), ("nowhere", "there is no such folder")):
        done = invoke("init", what)
        assert message in str(done.exception)
    assert "tlx init photos makes one" in str(invoke("plan", "photos").exception)


def test_options_are_those_of_the_shards(photos):
    nested(photos)
    assert "3 classes" in init("--nested", "--shards", "elsewhere/mine", "--out", "own.yaml", "--val", "0.25")
    assert load("own.yaml", ["backbone.weights=none"]).data.train == "elsewhere/mine/train"
    broken(photos)
    assert "left out, unreadable" in init("--skip-bad", "--no-nested")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_place_that_cannot_be_written_is_named(photos):
    photos.parent.chmod(0o500)
    try:
        assert isinstance(invoke("init", "photos", *BACKBONE).exception, PermissionError)
    finally:
        photos.parent.chmod(0o700)


@pytest.mark.slow
def test_the_whole_way_killed_and_gone_on_with(photos):
    words = ("train", "photos", "backbone.name=toys:small", "backbone.weights=none", "input.size=16", "data.workers=0")
    process = start(*words)
    run = photos.parent / "runs" / "photos-small"
    try:
        wait_for_step(process, run, 2)
    finally:
        kill_all(process)
    done = tlx(*words)
    assert done.returncode == 0, done.stderr
    assert "photos-small.yaml, as it was made from photos" in done.stderr
    assert (run / "result.json").exists()
    assert tlx(*words).stdout.count("val/top1") >= 1
    with_ranks = tlx(*words, ranks=2)
    assert with_ranks.returncode == 0, with_ranks.stderr
