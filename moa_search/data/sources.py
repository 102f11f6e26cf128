"""What a source of texts or records is; `moa_search.tasks.sources` reads how a user types one."""

from __future__ import annotations

from dataclasses import dataclass, field

TURNS = ("last", "all")
"""Which answers of a conversation can be supervised."""

ROLES: dict[str, tuple[str, ...]] = {
    "context": ("context", "passage", "document", "article", "text", "story"),
    "question": ("question", "query", "instruction", "input", "prompt"),
    "answer": ("answer", "answers", "output", "target", "response"),
    "messages": ("messages", "conversations", "conversation"),
    "prompt": ("prompt",),
    "completion": ("completion",),
    "text": ("text", "content", "document", "article", "context", "passage", "body", "story"),
}
"""What a column is for, and the names that are tried in this order where none is given."""


@dataclass(frozen=True)
class SourceSpec:
    """One source of calibration samples.

    Attributes:
        typed: What the user typed.
        task: A built-in task, ``records`` or ``samples``.
        data: File, pattern, folder or dataset id; empty for the standard library's texts.
        subset: Configuration of a Hugging Face dataset.
        split: Its split, such as ``train`` or ``train[:1000]``.
        columns: Names of columns by role; see `ROLES`.
        turns: Which answers of a conversation are supervised; one of `TURNS`.
        hint: Ends the error of data that can't be read, such as a task with a name like it.
    """

    typed: str
    task: str
    data: str = ""
    subset: str | None = None
    split: str = "train"
    columns: dict[str, str] = field(default_factory=dict)
    turns: str = "last"
    hint: str = field(default="", compare=False)
