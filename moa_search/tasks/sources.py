"""What a user types to name calibration data: ``[TASK:]DATA[?key=value&key=value]``.

* ``passkey``, ``copy``, ``lines`` and the others: a built-in task over the standard library's texts;
* ``passkey:DATA``: the same over other texts;
* ``records:DATA``, or ``DATA`` alone: question-answer records, conversations, or prompts with completions;
* ``samples:FOLDER``: samples that were saved before.

DATA is a local ``.jsonl``, ``.ndjson``, ``.json``, ``.parquet``, ``.csv``, ``.tsv``, ``.txt`` or ``.md`` file, also
with ``.gz`` or ``.zst``, a pattern such as ``books/*.txt``, a folder, or a Hugging Face dataset id.
"""

from __future__ import annotations

from collections.abc import Sequence

from moa_search.data.sources import ROLES, TURNS, SourceSpec
from moa_search.errors import ConfigError
from moa_search.formats.files import nearest, one_line
from moa_search.tasks.registry import SOURCE_TASKS, TASKS


def parse_source(text: str, tasks: Sequence[str] = (*SOURCE_TASKS, "records", "samples")) -> SourceSpec:
    """The source that ``text`` names.

    Args:
        text: What a user typed.
        tasks: Which tasks it can name, by default those that calibrate.

    Raises:
        ConfigError: It names none; the message says what is wrong.
    """
    where = f"source {one_line(text)!r}"
    body, mark, query = text.partition("?")
    task, colon, data = body.partition(":")
    if not colon:
        task, data = (body, "") if body in tasks else ("records", body)
    named = body.partition(":")[0]
    if named in TASKS and named not in tasks:
        raise ConfigError(f"{where}: {named} can be evaluated, not calibrated on; choose from {', '.join(tasks)}")
    if task not in tasks:
        raise ConfigError(f"{where}: task {task!r} is unknown{nearest(task, tasks)}; choose from {', '.join(tasks)}")
    if not data and (colon or task in ("records", "samples")):
        raise ConfigError(f"{where}: data is missing; write {task}: and a file, folder or dataset id")
    known = _keys(task, data)
    options: dict[str, str] = {}
    for part in query.split("&") if mark else ():
        key, equals, value = part.partition("=")
        if not equals or not value:
            raise ConfigError(f"{where}: {part!r} is not key=value")
        if key not in known:
            takes = f"choose from {', '.join(known)}" if known else "it takes none"
            raise ConfigError(f"{where}: key {key!r} is unknown{nearest(key, known)}; {takes}")
        if key in options:
            raise ConfigError(f"{where}: key {key!r} stands twice")
        options[key] = value
    turns = options.get("turns", TURNS[0])
    if turns not in TURNS:
        raise ConfigError(f"{where}: turns {turns!r} is unknown; choose from {', '.join(TURNS)}")
    columns = {role: options[role] for role in ROLES if role in options}
    hint = "" if colon else nearest(data, SOURCE_TASKS)
    return SourceSpec(text, task, data, options.get("subset"), options.get("split", "train"), columns, turns, hint)


def _keys(task: str, data: str) -> tuple[str, ...]:
    if not data or task == "samples":
        return ()
    if task != "records":
        return ("subset", "split", "text")
    return ("subset", "split", "context", "question", "answer", "messages", "prompt", "completion", "turns")
