"""The page of a run in a real browser: wide, on a phone, in the dark; nothing sticks out, nothing is fetched."""

from __future__ import annotations

import browser as browsers
import numpy as np
import pytest
from told_runs import classified, labelled, told_run

from tlx.report.report import report_run

pytestmark = [pytest.mark.slow, pytest.mark.skipif(browsers.WHY_NOT is not None, reason=str(browsers.WHY_NOT))]

BRIGHT = "return getComputedStyle(document.body).backgroundColor"
FETCHED = (
    "return performance.getEntriesByType('resource').filter((r) => !r.name.startsWith('data:')).map((r) => r.name)"
)
BROKEN = "return [...document.images].filter((i) => !i.complete || !i.naturalWidth).length"


@pytest.mark.parametrize("classes", [2, 17, 102])
def test_a_page_fits_wide_and_narrow_in_the_light_and_in_the_dark(tmp_path, classes):
    names = [f"a rather long name of class {i}" for i in range(classes)]
    page = report_run(told_run(tmp_path / "run", [classified(names, np.arange(300) % classes)]))
    backgrounds = []
    for width, dark in ((1280, False), (390, False), (390, True)):
        profile = tmp_path / f"{width}{dark}"
        with browsers.browser(profile, width=width, dark=dark) as driver:
            driver.get(page.as_uri())
            assert driver.execute_script("return document.documentElement.scrollWidth") <= width
            assert driver.execute_script(FETCHED) == []
            assert driver.execute_script(BROKEN) == 0
            assert [line for line in driver.get_log("browser") if line["level"] == "SEVERE"] == []
            backgrounds.append(driver.execute_script(BRIGHT))
    assert backgrounds[0] == backgrounds[1] != backgrounds[2]


def test_labels_on_a_phone(tmp_path):
    page = report_run(told_run(tmp_path / "run", [labelled(("a", "b"), 40)]))
    with browsers.browser(tmp_path / "b", width=390) as driver:
        driver.get(page.as_uri())
        assert driver.execute_script("return document.documentElement.scrollWidth") <= 390
        assert "Labels missed" in driver.execute_script("return document.body.innerText")
