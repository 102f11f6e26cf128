import pytest

from moa_search.profiling import window_grid


@pytest.mark.parametrize("length", [1, 31, 32, 33, 512, 1000, 2048, 131_072])
def test_windows_increase_and_end_at_the_length(length):
    windows = window_grid(length, 32)
    assert list(windows) == sorted(set(windows))
    assert windows[-1] == length


def test_every_block_then_six_per_octave():
    windows = window_grid(131_072, 64)
    assert windows[:16] == tuple(range(64, 1025, 64))
    assert [w for w in windows if 1024 < w <= 2048] == [1152, 1280, 1472, 1600, 1856, 2048]
    assert len(windows) < 60
