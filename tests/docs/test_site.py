"""The documentation builds as a site, asks no network for anything, and names commands as they are."""

import importlib.util
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest

from moa_search.cli import evaluate, inspect, profile, search
from moa_search.cli.command import parser_of

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(path.name for path in DOCS.glob("*.md"))
MAIN = {"moa-profile": profile, "moa-search": search, "moa-eval": evaluate, "moa-inspect": inspect}
SHELL = re.compile(r"```sh\n(.*?)```", re.DOTALL)


class Loads(HTMLParser):
    """What a page makes a browser load."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if tag in ("script", "img", "iframe", "source"):
            self.found.append(attributes.get("src"))
        elif tag == "link" and attributes.get("rel") != "canonical":
            self.found.append(attributes.get("href"))


def build(folder):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", DOCS / "site" / "mkdocs.yml", "-d", folder]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_builds_without_warnings_and_loads_nothing_from_the_network(tmp_path):
    done = build(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    for name in PAGES:
        text = (tmp_path / name).with_suffix(".html").read_text()
        outside = [url for url in Loads(text).found if url and re.match(r"(https?:)?//", url)]
        assert not outside, name
        assert re.search(rf'<a href="[^"]*{Path(name).stem}\.html" class="(?:nav-link|dropdown-item)', text), (
            "not in the navigation"
        )
    assert not (tmp_path / "site").exists(), "the site's own configuration is no page"


@pytest.fixture
def hooks():
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "site" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_navigation_follows_the_pages_that_are_there(hooks, tmp_path):
    """A page may land before its place in the navigation, and a place before its page."""
    for name in ("a.md", "b.md", "new.md"):
        (tmp_path / name).touch()
    nav = ["a.md", {"Part": [{"B": "b.md"}, {"C": "missing.md"}]}, {"Gone": [{"D": "gone.md"}]}, {"E": "gone.md"}]
    config = hooks.on_config(SimpleNamespace(docs_dir=str(tmp_path), nav=nav))
    assert config.nav == ["a.md", {"Part": [{"B": "b.md"}]}, {"More": ["new.md"]}]


def test_links_that_leave_the_site_become_text(hooks):
    text = hooks.on_page_markdown("see [the plan](../profiles/x/plan.json) and [files](files.md#plan)")
    assert text == "see the plan (`profiles/x/plan.json` in the repository) and [files](files.md#plan)"


def commands():
    for path in [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]:
        for block in SHELL.findall(path.read_text()):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                start = next((place for place, word in enumerate(words) if word in MAIN), None)
                if start is not None:
                    yield path.name, words[start:]


def options_of(words):
    """All flags of the command that a line runs."""
    module = MAIN[words[0]]
    if len(words) > 1 and words[1] in module.COMMANDS:
        command = module.COMMANDS[words[1]]
    elif module is inspect:
        command = inspect.COMMANDS[inspect.command_for(words[1:])]
    else:
        command = module.MAIN
    return {option for action in parser_of(words[0], command)._actions for option in action.option_strings}


def test_there_are_commands_to_check():
    assert {words[0] for _, words in commands()} == set(MAIN)


@pytest.mark.parametrize(
    ("page", "words"), list(commands()), ids=lambda value: value if isinstance(value, str) else value[0]
)
def test_every_flag_in_the_documentation_is_one(page, words):
    known = options_of(words)
    unknown = [word for word in words if word.startswith("--") and word.partition("=")[0] not in known]
    assert not unknown, f"{page}: {shlex.join(words)}"
