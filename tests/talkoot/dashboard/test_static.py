"""The page's files: they need no other server, and a peer's text cannot become markup or code."""

import re
from pathlib import Path

import pytest

from talkoot.dashboard.app import STATIC

INDEX = (STATIC / "index.html").read_text()
OWN = sorted(path for path in STATIC.iterdir() if path.is_file())


def test_page_and_modules_name_only_files_that_are_there() -> None:
    named = re.findall(r'(?:href|src)="static/([^"]+)"', INDEX)
    assert "app.js" in named
    for module in STATIC.glob("*.js"):
        named += re.findall(r'from "\./([^"]+)"', module.read_text())
    assert not [name for name in named if not (STATIC / name).is_file()]


def test_each_module_is_loaded_ahead() -> None:
    classic = {"theme.js"}
    assert {path.name for path in STATIC.glob("*.js")} - classic == set(
        re.findall(r'static/(\w+\.js)"', INDEX)
    ) - classic


@pytest.mark.parametrize("path", OWN, ids=lambda path: path.name)
def test_nothing_comes_from_elsewhere(path: Path) -> None:
    text = path.read_text().replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?:|//[a-z]+\.[a-z]+/|@import|url\(", text)


@pytest.mark.parametrize("path", [path for path in OWN if path.suffix == ".js"], ids=lambda path: path.name)
def test_no_text_becomes_markup_or_code(path: Path) -> None:
    ways = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|srcdoc|setTimeout\(\""
    )
    assert not re.search(ways, path.read_text())


def test_page_has_neither_inline_script_nor_inline_style() -> None:
    assert not re.search(r"<script(?![^>]* src=)|<style|\sstyle=|\son\w+=", INDEX)


def test_vendored_code_has_its_licence() -> None:
    assert "MIT" in (STATIC / "vendor" / "uPlot.LICENSE.txt").read_text()
