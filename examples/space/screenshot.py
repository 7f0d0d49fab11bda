"""The picture in README.md: the app in a headless Chromium, on a sentence.

    python examples/space/screenshot.py --model quickstart-out

Needs `pip install '.[space]' selenium`, and chromium with its driver (`apt-get install chromium chromium-driver`).
"""

import argparse
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

FOLDER = Path(__file__).resolve().parent
TEXT = "The file is opened for reading. If it does not exist, an OSError is raised. Return a new list with the items."
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
NO_OTHER_HOST = "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"
PATIENCE = 120  # seconds, on a busy machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="quickstart-out", help="folder or Hub id of a mixture")
    parser.add_argument("--text", default=TEXT)
    parser.add_argument("--out", type=Path, default=FOLDER / "screenshot.png")
    arguments = parser.parse_args()
    with running_app(arguments.model) as address, browser(1280, 1460) as chrome:
        chrome.get(address)
        inspect(chrome, arguments.text)
        time.sleep(1)  # until nothing moves any more
        chrome.save_screenshot(str(arguments.out))
    print(f"{arguments.out}: {arguments.out.stat().st_size / 1000:.0f} kB")


def browser_path() -> str | None:
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


@contextmanager
def browser(width: int, height: int, *options: str) -> Iterator[Any]:
    """A headless Chromium that reaches no host but this one, and keeps what its console and its network say."""
    chrome_options = ChromeOptions()
    chrome_options.binary_location = browser_path() or ""
    for option in ("--headless=new", "--hide-scrollbars", "--disable-dev-shm-usage", NO_OTHER_HOST, *options):
        chrome_options.add_argument(option)
    if os.getuid() == 0:
        chrome_options.add_argument("--no-sandbox")  # which root has none of
    chrome_options.add_argument(f"--window-size={width},{height}")
    chrome_options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = Chrome(options=chrome_options, service=ChromeService(shutil.which("chromedriver")))
    try:
        yield chrome
    finally:
        chrome.quit()


@contextmanager
def running_app(model: str | Path) -> Iterator[str]:
    """The address of the app, which runs meanwhile."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    environment = os.environ | {
        "GRADIO_ANALYTICS_ENABLED": "False",
        "HF_HUB_OFFLINE": "1",
        "GRADIO_SERVER_NAME": "127.0.0.1",
    }
    command = [sys.executable, str(FOLDER / "app.py"), "--model", str(model), "--port", str(port)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(address, process)
        yield address
    finally:
        process.terminate()
        process.wait(PATIENCE)


def wait_for(address: str, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            urllib.request.urlopen(address, timeout=10).close()
            return
        except OSError as error:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"expected the app at {address}, which did not start") from error
            time.sleep(0.2)


def inspect(chrome: Any, text: str) -> None:
    """Types a text, presses the button and waits for its tokens."""
    wait = WebDriverWait(chrome, PATIENCE)
    box = wait.until(lambda c: c.find_element(By.CSS_SELECTOR, "#text textarea"))
    box.send_keys(Keys.CONTROL, "a")
    box.send_keys(text)
    former = view_id(chrome)
    chrome.find_element(By.ID, "inspect").click()
    wait.until(lambda c: view_id(c) not in (None, former))
    wait.until(lambda c: c.find_elements(By.CSS_SELECTOR, ".mos-detail table"))


def view_id(chrome: Any) -> str | None:
    return chrome.execute_script("return document.querySelector('.mos-inspection')?.dataset.id")


if __name__ == "__main__":
    main()
