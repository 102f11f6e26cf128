"""Ways to choose rules, side by side behind one interface."""

from moa_search.errors import ConfigError
from moa_search.formats.files import nearest
from moa_search.search.searchers.base import Searcher
from moa_search.search.searchers.duo import DuoSearcher
from moa_search.search.searchers.exact import ExactSearcher, PerLayerSearcher, RecallSearcher
from moa_search.search.searchers.moa import MoASearcher
from moa_search.search.searchers.precision import (
    DenseBitsSearcher,
    LayerBitsSearcher,
    OneBitsSearcher,
    SpansSearcher,
    UniformBitsSearcher,
)
from moa_search.search.searchers.uniform import UniformSearcher

__all__ = ["BIT_SEARCHERS", "SEARCHERS", "Searcher", "find_searcher"]

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

BIT_SEARCHERS: dict[str, Searcher] = {
    searcher.name: searcher
    for searcher in (
        SpansSearcher(),
        OneBitsSearcher(),
        UniformBitsSearcher(),
        LayerBitsSearcher(),
        DenseBitsSearcher(),
    )
}
"""Further ones, by name, for budgets in bytes from a profile that knows several precisions."""


def find_searcher(name: str) -> Searcher:
    """The searcher of this name.

    Raises:
        ConfigError: There is none.
    """
    known = SEARCHERS | BIT_SEARCHERS
    if name not in known:
        raise ConfigError(f"searcher {name!r} is unknown{nearest(name, known)}; choose from {', '.join(known)}")
    return known[name]
