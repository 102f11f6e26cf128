"""Plans as pictures."""

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.colors import to_rgba
from matplotlib.image import imread

from moa_search.errors import ConfigError
from moa_search.inspection.plots import plot_spans, save_heat_map


def test_one_map_per_length_with_the_share_of_every_head(tiny_plan):
    figure = plot_spans(tiny_plan, [512, 1024])
    maps = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title(loc="left").split(":")[0] for axes in maps] == ["512 tokens", "1024 tokens"]
    for axes, length in zip(maps, (512, 1024), strict=True):
        shown = axes.images[0].get_array()
        np.testing.assert_allclose(shown, np.array(tiny_plan.spans(length)).T / length)
        assert axes.images[0].get_clim() == (0, 1)
        assert f"{tiny_plan.density(length):.1%}" in axes.get_title(loc="left")


def test_native_layers_are_grey(native_plan):
    (axes,) = [axes for axes in plot_spans(native_plan, [1024]).axes if axes.images]
    shown = axes.images[0].get_array()
    assert np.ma.getmaskarray(shown).tolist() == [[False, True, False]] * 2
    assert axes.images[0].get_cmap().get_bad().tolist() == pytest.approx(to_rgba("lightgrey"))
    assert axes.get_xlabel() == "layer (grey: own window, 128)"
    assert f"{native_plan.density(1024):.1%}" in axes.get_title(loc="left")


def test_png_of_any_size_of_model(sized_plan, tmp_path):
    path = tmp_path / "new" / "spans.png"
    save_heat_map(sized_plan, path, lengths=[2048])
    pixels = imread(path)
    width, height = plot_spans(sized_plan, [2048]).get_size_inches() * 130
    assert pixels.shape[:2] == pytest.approx((height, width), abs=1)
    dense = (abs(pixels - colormaps["viridis"](1.0)) < 0.005).all(-1)
    assert dense.sum() > 0.3 * dense.size / sized_plan.model.num_key_value_heads  # a row of its own, less margins
    assert [file.name for file in path.parent.iterdir()] == ["spans.png"]


def test_an_error_leaves_the_old_picture(tiny_plan, tmp_path, monkeypatch):
    path = tmp_path / "spans.png"
    path.write_bytes(b"old")

    def interrupted(figure, file, **options):
        file.write(b"half a picture")
        raise KeyboardInterrupt

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_heat_map(tiny_plan, path, lengths=[1024])
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("spans.png", b"old")]


def test_a_place_that_cannot_be_written(tiny_plan, tmp_path):
    with pytest.raises(ConfigError, match="can't be written"):
        save_heat_map(tiny_plan, tmp_path, lengths=[1024])
