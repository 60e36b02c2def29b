"""Debian's Chromium, without a screen and without a network of its own."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
WHY_NOT = None if CHROMIUM and DRIVER else "chromium and chromium-driver (Debian's packages) are not installed"
_OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"),
)
DROP = """
const files = arguments[0].map(([name, type, data]) =>
  new File([Uint8Array.from(atob(data), (c) => c.charCodeAt(0))], name, {type}));
const carried = new DataTransfer();
files.forEach((file) => carried.items.add(file));
const how = {bubbles: true, cancelable: true, dataTransfer: carried};
for (const kind of ["dragenter", "dragover", "drop"])
  document.querySelector(".drop").dispatchEvent(new DragEvent(kind, how));
"""


@contextmanager
def browser(profile: Path, *, width: int = 1100, height: int = 900, dark: bool = False) -> Iterator[object]:
    """selenium's driver; `profile` is an empty folder."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for option in (*_OPTIONS, f"--user-data-dir={profile}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
            "width": width, "height": height, "deviceScaleFactor": 2 if width < 600 else 1, "mobile": width < 600,
        })  # fmt: skip
        if dark:
            scheme = [{"name": "prefers-color-scheme", "value": "dark"}]
            driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        yield driver
    finally:
        driver.quit()


def drop(driver: object, files: list[tuple[str, str, bytes]]) -> None:
    """Drops files (name, type, content) on the page."""
    driver.execute_script(DROP, [(name, kind, base64.b64encode(data).decode()) for name, kind, data in files])
