"""Checks the app of examples/space in a real browser: it colours each token by its component."""

import io
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from chromium import complaints, needs_chromium, requested
from huggingface_hub import SpaceCard
from PIL import Image
from screenshot import FOLDER, PATIENCE, browser, inspect, running_app
from selenium.webdriver import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_mos.tools.inspection.inspect_mixture import inspect_mixture
from hf_mos.tools.inspection.token_texts import visible

TEXT = "Sentence 7 <b>says</b> ${1 + 1} {{value}} & 3"


@pytest.fixture(scope="module")
def app(mixture: Path) -> Iterator[str]:
    with running_app(mixture) as address:
        yield address


@pytest.fixture
def chrome(app: str) -> Iterator[Any]:
    with browser(1280, 1400) as chrome:
        chrome.get(app)
        yield chrome


def tokens_of(chrome: Any) -> list[Any]:
    return chrome.find_elements(By.CSS_SELECTOR, ".mos-token")


def detail_of(chrome: Any) -> str:
    return chrome.find_element(By.CSS_SELECTOR, ".mos-detail").text


@needs_chromium
def test_a_text_is_coloured_by_component(chrome: Any, mixture: Path) -> None:
    inspect(chrome, TEXT)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(mixture).eval(), AutoTokenizer.from_pretrained(mixture)
    expected = inspect_mixture(model, tokenizer, text=TEXT).text
    tokens = tokens_of(chrome)
    assert "".join(token.text for token in tokens) == f"{TEXT}▸"  # as text, not as HTML or as a template
    backgrounds: dict[str, set[str]] = {}
    for element, token in zip(tokens, expected.tokens, strict=False):
        shares = token.prediction.responsibilities
        label = str(shares.index(max(shares)))
        assert element.get_attribute("data-label") == label
        ink = element.find_element(By.CSS_SELECTOR, ".mos-ink")
        backgrounds.setdefault(label, set()).add(ink.value_of_css_property("border-bottom-color"))
    assert len(backgrounds) > 1
    assert all(len(colors) == 1 for colors in backgrounds.values())  # one colour for each component
    assert len(set.union(*backgrounds.values())) == len(backgrounds)

    index = 4
    ActionChains(chrome).move_to_element(tokens[index]).perform()
    detail = detail_of(chrome)
    prediction = expected.tokens[index].prediction
    assert f"token {expected.tokens[index].token_id}" in detail
    assert f"{prediction.nll:.2f} nats" in detail
    for candidate in (*prediction.top, *prediction.softmax_top, *prediction.component_top[2]):
        assert visible(candidate.text) in detail

    picture = Image.open(io.BytesIO(chrome.get_screenshot_as_png())).convert("RGB")
    assert len(picture.getcolors(maxcolors=2**24)) > 100
    assert complaints(chrome) == []
    assert all(address.startswith((chrome.current_url, "data:", "blob:")) for address in requested(chrome))


@needs_chromium
def test_a_second_text_takes_the_place_of_the_first(chrome: Any) -> None:
    inspect(chrome, TEXT)
    tokens_of(chrome)[3].click()
    chrome.find_element(By.CSS_SELECTOR, ".mos-scale [value=surprise]").click()
    inspect(chrome, "Sentence")
    assert "".join(token.text for token in tokens_of(chrome)) == "Sentence▸"
    assert {token.get_attribute("data-label") for token in tokens_of(chrome)} <= {"0", "1", "2"}
    tokens_of(chrome)[-1].click()
    assert "What comes next" in detail_of(chrome)
    assert complaints(chrome) == []


@needs_chromium
def test_no_text_is_an_error_in_words(chrome: Any) -> None:
    box = WebDriverWait(chrome, PATIENCE).until(lambda c: c.find_element(By.CSS_SELECTOR, "#text textarea"))
    box.send_keys(Keys.CONTROL, "a")
    box.send_keys(Keys.DELETE)
    chrome.find_element(By.ID, "inspect").click()
    WebDriverWait(chrome, PATIENCE).until(lambda c: "Type some text first" in c.find_element(By.TAG_NAME, "body").text)
    assert tokens_of(chrome) == []


def test_the_app_refuses_a_softmax(base: Path) -> None:
    command = [sys.executable, str(FOLDER / "app.py"), "--model", str(base)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert process.returncode != 0
    assert "expected a mixture of softmaxes, given LlamaForCausalLM" in process.stderr


def test_the_readme_is_that_of_a_space() -> None:
    card = SpaceCard.load(FOLDER / "README.md")
    constraints = (FOLDER.parents[1] / "constraints.txt").read_text().split()
    assert card.data.sdk == "gradio"
    assert f"gradio=={card.data.sdk_version}" in constraints
    assert (FOLDER / card.data.app_file).is_file()
    address = f"https://huggingface.co/spaces/YOU/SPACE/resolve/main/hf_mos-{version('hf_mos')}-py3-none-any.whl"
    assert (FOLDER / "requirements.txt").read_text() == f"hf_mos[space] @ {address}\n"  # no index has that name
    assert len(card.data.short_description) <= 60  # what the Hub allows


def test_the_picture_is_small() -> None:
    file = FOLDER / "screenshot.png"
    assert file.stat().st_size < 300_000
    with Image.open(file) as picture:
        assert picture.size[0] >= 1000
