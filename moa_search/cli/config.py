"""Configuration files: YAML whose values stay as written, so that options alone decide what they mean."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, ClassVar

import yaml

from moa_search.errors import ConfigError
from moa_search.formats.files import nearest, one_line


class _AsWritten(yaml.SafeLoader):  # type: ignore[misc]
    """Text, lists and mappings; YAML 1.1 would take 7:2 for 422, 1e-1 for text and no for false."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}


_AsWritten.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])


def read_config(file: str, names: Collection[str]) -> dict[str, Any]:
    """The keys of a configuration file, each of which is an option.

    Raises:
        ConfigError: It can't be read, isn't such a file, or has a key twice or one that is no option.
    """
    try:
        node = yaml.compose(Path(file).read_bytes(), Loader=_AsWritten)
        content = None if node is None else _AsWritten("").construct_document(node)
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror or error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: not a YAML file of options ({one_line(' '.join(str(error).split()))})") from None
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: not a YAML file of options; write one per line, such as lengths: [1024, 2048]")
    given = [key.value for key, _ in node.value] if node is not None else []
    for name in given:
        if name not in names:
            known = nearest(str(name), names)
            raise ConfigError(f"{file}: unknown key {one_line(name)!r} in the configuration file{known}")
        if given.count(name) > 1:
            raise ConfigError(f"{file}: the key {name!r} stands {given.count(name)} times; keep one of them")
    return content
