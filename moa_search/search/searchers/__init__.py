"""Ways to choose rules, side by side behind one interface."""

from moa_search.errors import ConfigError
from moa_search.formats.files import nearest
from moa_search.search.searchers.base import Searcher
from moa_search.search.searchers.duo import DuoSearcher
from moa_search.search.searchers.exact import ExactSearcher, PerLayerSearcher, RecallSearcher
from moa_search.search.searchers.moa import MoASearcher
from moa_search.search.searchers.uniform import UniformSearcher

__all__ = ["SEARCHERS", "Searcher", "find_searcher"]

SEARCHERS: dict[str, Searcher] = {
    searcher.name: searcher
    for searcher in (
        ExactSearcher(),
        MoASearcher(),
        DuoSearcher(),
        PerLayerSearcher(),
        RecallSearcher(),
        UniformSearcher(),
    )
}
"""By name; none touches heads of native layers, which keep the model's own sliding window."""


def find_searcher(name: str) -> Searcher:
    """The searcher of this name.

    Raises:
        ConfigError: There is none.
    """
    if name not in SEARCHERS:
        raise ConfigError(f"searcher {name!r} is unknown{nearest(name, SEARCHERS)}; choose from {', '.join(SEARCHERS)}")
    return SEARCHERS[name]
