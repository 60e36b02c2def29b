"""The page of `tlx serve` in a real browser: pictures chosen and dropped, thumbnails, probabilities, what is wrong."""

from __future__ import annotations

import time

import browser as browsers
import pytest
from composed import finished, raw_of
from images import encoded, make_shards, make_target_shards, picture
from served import serving

import tlx
from tlx.serve.network import network_of

pytestmark = [pytest.mark.slow, pytest.mark.skipif(browsers.WHY_NOT is not None, reason=str(browsers.WHY_NOT))]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    place = tmp_path_factory.mktemp("r")
    shards = make_shards(place / "s", classes=3, per_class={"train": 8, "val": 4}, size=16)
    return finished(raw_of(shards, place / "run"))


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    folder = tmp_path_factory.mktemp("m")
    for split, seed in (("train", 0), ("val", 1)):
        make_target_shards(folder / "s" / split, samples=34, seed=seed)
    tasks = {
        "tags": "multilabel",
        "colour": {"name": "classification", "target": "colour"},
        "age": {"name": "regression"},
    }
    tasks["age"]["target"] = "age"
    return finished(raw_of(folder / "s", folder / "run", task={"name": "multitask", "tasks": tasks}))


def cards(driver, count):
    """Once so many have an answer: the text of each part of them, and whether there is a thumbnail with a picture."""
    script = """
    const text = (card, part) => [...card.querySelectorAll(part)].map((one) => one.textContent);
    const drawn = (canvas) => canvas.getContext("2d").getImageData(132, 132, 1, 1).data[3] === 255;
    return [...document.querySelectorAll(".card[data-state]")].map((card) => ({
      state: card.dataset.state, file: text(card, ".file")[0], label: text(card, ".label"),
      names: text(card, ".name"), shares: text(card, ".share"), error: text(card, ".error"),
      parts: text(card, ".part"), values: text(card, ".value"),
      thumbs: [...card.querySelectorAll("canvas")].map(drawn), width: card.getBoundingClientRect().right,
    }));
    """
    until = time.monotonic() + 60
    while len(driver.execute_script(script)) < count and time.monotonic() < until:
        time.sleep(0.1)
    time.sleep(0.5)  # thumbnails come by themselves
    return driver.execute_script(script)


def test_pictures_that_are_chosen_and_dropped(run, tmp_path):
    file, name = tmp_path / "chosen.jpg", "<img src=x onerror=document.title='taken'>.jpg"
    picture(2, size=(90, 120)).save(file)
    dropped = encoded(picture(1, size=(80, 60)), "PNG")
    wanted = tlx.load(run, device="cpu").predict([str(file)])[0]
    with serving(network_of(run, device="cpu")) as (url, _), browsers.browser(tmp_path / "b") as driver:
        driver.get(url)
        driver.find_element("id", "files").send_keys(str(file))
        (chosen,) = cards(driver, 1)
        browsers.drop(driver, [(name, "image/png", dropped), ("cut.jpg", "image/jpeg", file.read_bytes()[:700])])
        first, second, third = cards(driver, 3)
        title, log = driver.title, [line["message"] for line in driver.get_log("browser") if line["level"] == "SEVERE"]
        heading = driver.find_element("id", "network").text
    assert (chosen["state"], chosen["file"], chosen["label"]) == ("answered", "chosen.jpg", [wanted["label"]])
    assert chosen["names"] == [one["label"] for one in wanted["top"]]
    assert chosen["shares"] == [f"{100 * one['probability']:.1f} %" for one in wanted["top"]]
    assert chosen["thumbs"] == [True]
    assert (first["file"], first["state"], first["thumbs"]) == (name, "answered", [True])
    assert (second["file"], second["state"], second["error"]) == ("cut.jpg", "refused", ["damaged: it ends too early"])
    assert third == chosen
    assert (title, heading) == ("tlx serve: toys:small", "toys:small")
    assert not [line for line in log if "422" not in line], log  # of the policy, of scripts


def test_several_tasks_on_a_phone_in_the_dark(several, tmp_path):
    shown = encoded(picture(1, size=(80, 60)))
    with (
        serving(network_of(several, device="cpu")) as (url, _),
        browsers.browser(tmp_path / "b", width=390, height=844, dark=True) as driver,
    ):
        driver.get(url)
        browsers.drop(driver, [("a.jpg", "image/jpeg", shown)])
        (card,) = cards(driver, 1)
        wide = driver.execute_script("return document.documentElement.scrollWidth")
        back = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
        driver.save_screenshot(str(tmp_path / "phone.png"))
    assert card["parts"] == ["tags", "colour", "age"]
    assert set(card["names"]) == {"big", "old", "round", "wet", "blue", "green", "red", "age"}
    assert len(card["shares"]) == 7
    assert (wide, back) == (390, "rgb(15, 20, 26)")
    assert card["width"] <= 390
    assert len(card["values"]) == 1
