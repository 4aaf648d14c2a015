"""A real browser: the address of a metrics server goes in, what a person would see, hear or press comes out."""

from __future__ import annotations

import base64
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
from gates import HANG_SECONDS, await_true

import input_workers as iw

CHROMIUM, DRIVER = "/usr/bin/chromium", "/usr/bin/chromedriver"
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--window-size=1180,900",
    # No process that comes and goes while a test counts them:
    "--disable-features=SpareRendererForSitePerProcess",
    "--renderer-process-limit=1",
)
ASKED = """return performance.getEntriesByType("resource").filter(entry => entry.name.endsWith("/status.json"))
    .map(entry => [entry.startTime, entry.responseEnd])"""


def chromium(profile: pathlib.Path) -> Iterator[Any]:
    """Yield a driver; end every process of it in the end. Without a browser: skip, but not where everything must run."""
    missing = [path for path in (CHROMIUM, DRIVER) if not os.access(path, os.X_OK)]
    try:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service
    except ImportError:
        missing.append("the package selenium")
    if missing:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"a browser is needed; missing: {', '.join(missing)}")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    before = set(psutil.Process().children(recursive=True))
    driver = webdriver.Chrome(options=options, service=Service(DRIVER), keep_alive=False)
    ours = set(psutil.Process().children(recursive=True)) - before
    try:
        driver.set_page_load_timeout(HANG_SECONDS)
        driver.set_script_timeout(HANG_SECONDS)
        with iw.serve_metrics(0, coordinator=iw.GlobalCoordinator()) as server:
            for page in live_page(driver):  # the first tab leaves a process behind, for the next
                page.open(server)
        yield driver
    finally:
        driver.quit()
        _, left = psutil.wait_procs(ours, HANG_SECONDS)
        for process in left:
            process.kill()
        assert not left, f"the browser left behind: {left}"


class LivePage:
    """A tab with the live page."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver
        self.complains = False  # whether the browser may say so in its console, such as of a server that is gone

    def open(self, server: Any) -> None:
        """Go there, and wait for the first numbers."""
        self.driver.get(f"{server.url}/")
        await_true(lambda: self.js("return !document.querySelector('[data-if=isWaiting]:not([hidden])')"), "the first numbers")

    def js(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def cdp(self, command: str, **parameters: Any) -> Any:
        return self.driver.execute_cdp_cmd(command, parameters)

    def text(self, selector: str) -> str:
        """Return the text of the first such node, as it is in the document."""
        return str(self.js("return document.querySelector(arguments[0]).textContent", selector))

    def texts(self, selector: str) -> list[str]:
        return list(self.js("return [...document.querySelectorAll(arguments[0])].map(node => node.textContent)", selector))

    def rows(self, caption: str) -> list[list[str]]:
        """Return the texts of the rows of the first table of this name."""
        script = """
            const named = [...document.querySelectorAll("main table")].find(table =>
                (table.caption?.textContent ?? table.getAttribute("aria-label")).startsWith(arguments[0]));
            return [...named.tBodies[0].rows].map(row => [...row.cells].map(cell => cell.textContent).filter(text => text));"""
        return list(self.js(script, caption))

    def asked(self) -> list[list[float]]:
        """Return when each answer was asked for and had come, in ms."""
        return list(self.js(ASKED))

    def await_polls(self, number: int) -> None:
        """Wait until so many more answers have come and were shown."""
        wanted = len(self.asked()) + number
        await_true(lambda: len(self.asked()) >= wanted, f"{wanted} answers")
        self.js("return new Promise(shown => requestAnimationFrame(() => requestAnimationFrame(shown)))")

    def looks(self, scheme: str = "light", width: int = 0) -> None:
        """Show it in a colour scheme, and on a screen so wide; 0: the window's."""
        self.cdp("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        if width:
            self.cdp("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 500)
        else:
            self.cdp("Emulation.clearDeviceMetricsOverride")

    def press(self, key: str) -> None:
        from selenium.webdriver import ActionChains

        ActionChains(self.driver).send_keys(key).perform()

    def picture(self, file: pathlib.Path) -> None:
        """Write what is seen, and what is below it."""
        shot = self.cdp("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(shot["data"]))

    def requests(self) -> list[str]:
        """Return the addresses that were asked for since the last time."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [each["params"]["request"]["url"] for each in messages if each["method"] == "Network.requestWillBeSent"]

    def console(self) -> list[dict[str, Any]]:
        """Return what the browser complained of since the last time."""
        return list(self.driver.get_log("browser"))


def live_page(driver: Any) -> Iterator[LivePage]:
    """Yield a tab of its own; its processes end with it, and it has made no complaint."""
    first = driver.current_window_handle
    driver.switch_to.new_window("tab")
    page = LivePage(driver)
    page.requests(), page.console()
    try:
        yield page
        complaints = page.console()
        assert page.complains or not complaints, complaints
    finally:
        driver.close()
        driver.switch_to.window(first)
