from tests.moa_search.bytewise import *  # noqa: F403  # fixtures
