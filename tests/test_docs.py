"""The documentation: it builds, its commands exist, and the pages generated from the code are up to date."""

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from command_lines import require_parses

from dht.manifest import Manifest
from expert_server.settings import NodeSettings
from peer import errors
from peer.errors import UserError
from talkoot.dashboard.settings import DashboardSettings
from talkoot.serve.settings import ServeSettings
from trainer_client.settings import Sampling, TrainerSettings

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("deploy/**/*.md"))
    if path.name not in ("CHANGELOG.md", "decisions.md")  # what was true once
)
_BLOCK = re.compile(r"^```(?:sh|shell|bash|console)?\n(.*?)^```", re.MULTILINE | re.DOTALL)
_IN_A_LINE = re.compile(r"`(talkoot\s[^`]+)`")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def commands(text: str) -> list[str]:
    """Command lines that begin with `talkoot`, in code blocks and in sentences."""
    blocks = [line for block in _BLOCK.findall(text) for line in block.splitlines()]
    lines = [line for line in blocks if line.startswith("talkoot ")]
    outside = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return lines + [" ".join(line.split()) for line in _IN_A_LINE.findall(outside)]


def test_every_code_is_explained_and_no_other() -> None:
    (listed,) = re.findall(r"TalkootError\n(.*)", errors.__doc__ or "", re.DOTALL)
    known = {UserError.__name__: UserError.code} | {
        name: kind.code
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, UserError) and "code" in vars(kind)
    }
    assert dict(re.findall(r"(\w+Error) +(T\d+)", listed)) == known
    explained = re.findall(r"^### (T\d+)$", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    assert explained == sorted(known.values())


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_commands_in_the_documentation_exist(path: Path) -> None:
    for line in commands(path.read_text()):
        _, *words = shlex.split(re.sub(r"\[[^\]]*\]", "", line), comments=True)
        if any(word in ("COMMAND", "…", "...") for word in words):
            continue  # a pattern, not a command
        try:
            require_parses(words)
        except Exception as error:  # noqa: BLE001  # told with the line that it is about
            pytest.fail(f"{line}: {error}")


def test_commands_are_looked_for_where_people_read() -> None:
    """So the test above can't pass merely because it found nothing."""
    found = {name(path): len(commands(path.read_text())) for path in PAGES}
    assert found["README.md"] > 3
    assert found["docs/volunteer.md"] > 5
    with pytest.raises(LookupError):
        require_parses(["nod"])
    with pytest.raises(Exception, match="--colour"):
        require_parses(["service", "install", "--colour", "3"])
    with pytest.raises(Exception, match="whole number, not 'many'"):
        require_parses(["doctor", "--experts", "many"])


@pytest.mark.parametrize(
    "setting",
    sorted(
        {
            name
            for role in (NodeSettings, TrainerSettings, Sampling, DashboardSettings, ServeSettings)
            for name in role.model_fields
        }
    ),
)
def test_every_setting_is_in_a_guide(setting: str) -> None:
    """Every setting is also in a guide where a user who needs it would look, not only on the page that lists all."""
    shown = re.compile(rf"`{setting}\b|--(no-)?{setting.replace('_', '-')}\b")
    assert [path for path in PAGES if path.name != "settings.md" and shown.search(path.read_text())]


def test_settings_page_is_what_the_code_says() -> None:
    page = runpy.run_path(str(ROOT / "docs" / "settings_page.py"))["page"]
    assert (ROOT / "docs" / "settings.md").read_text() == page(), "run `make settings`"


def test_every_setting_says_what_it_is() -> None:
    rows = re.findall(r"^\| `(\w+)` \|.*\|(.*)\|$", (ROOT / "docs" / "settings.md").read_text(), re.MULTILINE)
    assert len(rows) > 50
    assert [setting for setting, said in rows if not said.strip()] == []


def test_documentation_builds_without_warnings(tmp_path: Path) -> None:
    """mkdocs checks links between pages, their anchors, and that a link leads to every page."""
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    ended = subprocess.run(build, capture_output=True, text=True, timeout=240, cwd=ROOT)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert (tmp_path / "settings" / "index.html").exists()
    assert not list(tmp_path.rglob("*.py"))
    reference = (tmp_path / "api" / "index.html").read_text()
    assert "Joins a swarm as a trainer." in reference, "from a docstring"
    assert not re.search(r'id="[\w.]*\._\w', reference), "what is private is nobody's business"


def test_manifest_of_the_tutorial_is_valid(tmp_path: Path) -> None:
    ((_, text),) = re.findall(
        r"^```(toml)\n(.*?)^```", (ROOT / "docs" / "tutorial.md").read_text(), re.M | re.S
    )
    (tmp_path / "sauna.toml").write_text(text)
    manifest = Manifest.from_toml(tmp_path / "sauna.toml")
    assert manifest.experts_total == 32, "two nodes of 16 experts host them"


def test_pages_fetch_nothing_from_elsewhere(tmp_path: Path) -> None:
    config = (ROOT / "mkdocs.yml").read_text()
    assert "font: false" in config
    assert "http" not in config


def test_links_to_files_outside_the_documentation_lead_somewhere() -> None:
    """mkdocs checks only the links within docs/."""
    for path in PAGES:
        text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
            if "://" not in target:
                assert (path.parent / target).exists(), f"{name(path)}: {target}"


def test_each_test_that_the_page_on_attacks_names_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", (ROOT / "docs" / "attacks.md").read_text())
    assert len(named) > 30
    missing = [
        f"{path}::{test}"
        for path, test in named
        if not (ROOT / path).exists()
        or not re.search(rf"^(async )?def {test}\(", (ROOT / path).read_text(), re.MULTILINE)
    ]
    assert missing == []


def test_architecture_has_a_line_for_every_module() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    sections = re.findall(r"^### (\w+/)$(.*?)(?=^##)", page, re.MULTILINE | re.DOTALL)
    listed = [
        f"{package}{module}.py"
        for package, text in sections
        for module in re.findall(r"^\| `([\w/]+)` \|", text, re.MULTILINE)
    ]
    modules = [
        name(path)
        for package, _ in sections
        for path in (ROOT / package).rglob("*.py")
        if path.name != "__init__.py" and path.parent.name != "wire"
    ]
    assert len(sections) == 5
    assert sorted(listed) == sorted(modules)


def test_the_picture_of_the_floors_shows_what_the_page_lists() -> None:
    picture = runpy.run_path(str(ROOT / "docs" / "architecture_picture.py"))["picture"]
    drawing = (ROOT / "docs" / "img" / "architecture.svg").read_text()
    assert drawing == picture(), "run `make picture`"


def test_the_chart_shows_the_figures_of_the_page_on_benchmarks() -> None:
    script = runpy.run_path(str(ROOT / "docs" / "headline_picture.py"))
    drawn = script["picture"](script["read"]((ROOT / "docs" / "benchmarks.md").read_text()))
    assert (ROOT / "docs" / "img" / "headline.svg").read_text() == drawn, "run `make picture`"


def test_the_recording_plays_only_for_those_who_like_motion() -> None:
    drawing = (ROOT / "docs" / "img" / "demo.svg").read_text()
    ElementTree.fromstring(drawing)
    before, motion = drawing.split("@media (prefers-reduced-motion: no-preference)")
    assert "@keyframes" not in before
    assert "@keyframes" in motion
    assert "prefers-color-scheme: dark" in before
    assert "is killed with SIGKILL" in drawing
    assert "live nodes serve 128 of 128 experts" in drawing, "the demo of this recording worked"
