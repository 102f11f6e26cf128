"""The generation settings beside a model's weights, by which a folder saved under a plan refuses a plain reload.

``attn_implementation`` in config.json isn't enough: whoever passes another one, or None as `transformers serve` does,
would run dense in silence. An unknown ``cache_implementation`` is an error in every version of transformers, wherever a
model that generates is loaded, and the error quotes it: so it says what to do instead.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moa_search.formats.files import atomic_write
from moa_search.modeling.private import optional_file

FILE = "generation_config.json"
REFUSAL = (
    "this model was saved under a KV cache plan: load it with moa_search.from_pretrained, serve it with moa-serve, or "
    "load it dense with moa_search.load_model"
)
OWN = "moa_cache_implementation"
"""Key of the ``cache_implementation`` that a model had before."""


def refuse_plain_reload(folder: Path) -> None:
    """Put the refusal into a folder's generation settings, if it has any."""
    file = folder / FILE
    if not file.is_file():
        return
    content = json.loads(file.read_text(encoding="utf-8"))
    own = content.get("cache_implementation")
    if own is not None:
        content[OWN] = own
    content["cache_implementation"] = REFUSAL
    with atomic_write(file) as out:
        out.write(f"{json.dumps(content, indent=2, sort_keys=True)}\n".encode())


def settings_of(name: str, **options: Any) -> dict[str, Any]:
    """What `from_pretrained` of transformers has to be told where a folder or repository refuses a plain reload.

    Args:
        name: Folder or hub id.
        **options: Of the hub, such as ``revision``.

    Returns:
        ``generation_config``, or nothing.
    """
    from transformers import GenerationConfig

    file = optional_file(name, FILE, **options)
    if file is None:
        return {}
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
        refuses = content.get("cache_implementation") == REFUSAL
    except (OSError, ValueError, AttributeError):
        return {}  # transformers says what is wrong with it
    if not refuses:
        return {}
    content["cache_implementation"] = content.pop(OWN, None)
    return {"generation_config": GenerationConfig.from_dict(content)}
