from tests.moa_search.bytewise import *  # noqa: F403  # fixtures
from tests.moa_search.evaluation.conftest import tiny_model  # noqa: F401
