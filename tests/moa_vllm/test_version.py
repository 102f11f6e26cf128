"""The plug-in is a distribution of its own, of the same version."""

import tomllib
from pathlib import Path

from moa_search.version import __version__

PROJECT = Path(__file__).parents[2] / "vllm-plugin" / "pyproject.toml"


def test_the_plug_in_has_the_version_of_the_package():
    assert tomllib.loads(PROJECT.read_text())["project"]["version"] == __version__
