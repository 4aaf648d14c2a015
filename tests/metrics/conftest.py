"""A browser for each module of tests that needs one, and a tab for each test."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from metrics.browser import LivePage, chromium, live_page


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    yield from chromium(tmp_path_factory.mktemp("chromium"))


@pytest.fixture
def page(_nothing_is_left: None, driver: Any) -> Iterator[LivePage]:
    yield from live_page(driver)
