"""A real browser for the pages: Chromium without a screen, that reaches no other host."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "space"))

from screenshot import browser_path

needs_chromium = pytest.mark.skipif(
    browser_path() is None or shutil.which("chromedriver") is None,
    reason="needs a browser: apt-get install chromium chromium-driver",
)


def complaints(chrome: Any) -> list[str]:
    """What the console of the browser has said since it was last asked."""
    return [entry["message"] for entry in chrome.get_log("browser")]


def requested(chrome: Any) -> set[str]:
    """The addresses that the browser has asked for since it was last asked."""
    messages = [json.loads(entry["message"])["message"] for entry in chrome.get_log("performance")]
    return {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}
