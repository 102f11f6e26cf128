"""A profile in a notebook."""

from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from moa_search.errors import ConfigError
from moa_search.formats.criteria import CRITERIA
from moa_search.search.losses import rule_losses
from moa_search.spans import SpanRule


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    pyplot.close("all")


@pytest.mark.parametrize("criterion", CRITERIA)
def test_the_frame_has_the_losses_that_a_search_sees(tiny_profile, criterion):
    """A rule of one constant window, where row buckets end at it, loses what was measured for that window."""
    frame = tiny_profile.to_frame([criterion])
    sink = tiny_profile.header.sink
    for losses in rule_losses(tiny_profile, [SpanRule(sink + 256, 0)], criterion):
        rows = frame[(frame.length == losses.length) & (frame.window == 256)]
        assert rows[["layer", "kv_head"]].to_numpy().tolist() == [[n // 2, n % 2] for n in range(6)]
        scale = losses.mean.max()
        np.testing.assert_allclose(rows[criterion], losses.mean[:, 0], atol=1e-6 * scale)
        if losses.error is not None:
            np.testing.assert_allclose(rows[f"{criterion}_error"], losses.error[:, 0], rtol=1e-6)


def test_the_frame_is_tidy(native_profile):
    frame = native_profile.to_frame()
    windows = sum(len(entry.header.windows) for entry in native_profile.by_length.values())
    assert len(frame) == windows * 2 * 2, "two layers that are searched, two heads"
    assert set(frame["layer"]) == {0, 2}
    assert not frame.isna().any(axis=None)
    assert list(frame.columns[:6]) == ["length", "layer", "kv_head", "window", "squared", "squared_error"]
    whole = frame[frame.window == frame.length]
    assert (whole["signed"] == 0).all()


def test_influence_of_the_nearest_window(native_profile):
    ax = native_profile.plot_influence(window=100, criterion="squared")
    assert ax.get_title(loc="left") == "1024 tokens: squared loss of a window of 128"
    frame = native_profile.to_frame(["squared"])
    wanted = frame[(frame.length == 1024) & (frame.window == 128)]["squared"].to_numpy().reshape(2, 2)
    shown = ax.images[0].get_array()
    assert np.ma.getmaskarray(shown).tolist() == [[False, True, False]] * 2
    np.testing.assert_allclose(shown[:, [0, 2]], wanted.T)
    assert isinstance(ax.images[0].norm, LogNorm)
    assert ax.images[0].get_clim() == pytest.approx((wanted.max() / 1e3, wanted.max()))


def test_influence_on_given_axes_at_a_given_length(tiny_profile):
    given = Figure().subplots()
    assert tiny_profile.plot_influence(512, ax=given) is given
    assert "512 tokens: signed loss of a window of 64" in given.get_title(loc="left")


def test_what_was_not_profiled(tiny_profile):
    with pytest.raises(ConfigError, match=r"length 600 wasn't profiled; choose from 512, 1024"):
        tiny_profile.plot_influence(600)
    with pytest.raises(ConfigError, match="did you mean 'squared'"):
        tiny_profile.plot_influence(criterion="squard")
    with pytest.raises(ConfigError, match="did you mean 'squared'"):
        tiny_profile.to_frame("squard")
    for window in (0, -5, 1025):
        with pytest.raises(ConfigError, match=f"window {window} is out of range; it must be 1 to 1024"):
            tiny_profile.plot_influence(window=window)


def test_html(native_profile):
    root = ElementTree.fromstring(native_profile._repr_html_())
    titles = [element[0].text for element in root.iter() if element.tag.endswith("rect")]
    losses, _, window = native_profile.influence()
    assert window == 128
    assert titles[0] == f"layer 0, KV head 0: {losses[0, 0]:.3g}"
    assert titles[2] == "layer 1, KV head 0: own window, not measured"
    assert [cell.text for cell in root.iter("td")][:2] == ["512", "3"]
