"""What every engine's format has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from moa_search.formats.engines.windows import LayerWindows
from moa_search.formats.signature import ModelSignature


class Engine(ABC):
    """An engine's file.

    Attributes:
        name: Of the format.
        title: What people call the engine.
        keeps_sink: Whether it attends first tokens beside a window.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    keeps_sink: ClassVar[bool] = False

    @abstractmethod
    def claims(self, content: dict[Any, Any]) -> bool:
        """Whether a file's content is of this format."""

    @abstractmethod
    def write(self, windows: LayerWindows, model: ModelSignature) -> dict[str, Any]:
        """The file's content."""

    @abstractmethod
    def read(self, content: dict[Any, Any], model: ModelSignature, source: str) -> LayerWindows:
        """What the engine attends under a file.

        Args:
            content: The file's.
            model: Its model.
            source: Names the file in errors.

        Raises:
            PlanFormatError: The content is no such file.
            ModelMismatchError: It is for another number of layers.
        """
