"""Checks for tests that open a page in headless Chromium: console messages and requested addresses."""

import json
import shutil
from typing import Any

import pytest
from screenshot import browser_path

needs_chromium = pytest.mark.skipif(
    browser_path() is None or shutil.which("chromedriver") is None,
    reason="needs a browser: apt-get install chromium chromium-driver",
)


def complaints(chrome: Any) -> list[str]:
    """Messages that the browser's console has received since the last call."""
    return [entry["message"] for entry in chrome.get_log("browser")]


def requested(chrome: Any) -> set[str]:
    """Addresses that the browser has requested since the last call."""
    messages = [json.loads(entry["message"])["message"] for entry in chrome.get_log("performance")]
    return {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}
