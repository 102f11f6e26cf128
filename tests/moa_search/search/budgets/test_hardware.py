"""Devices by name, from files, and measured."""

import pytest

from moa_search import api
from moa_search.errors import ConfigError
from moa_search.search.budgets.hardware import HARDWARE, Hardware


def test_a_known_device_by_its_name():
    assert Hardware.find("h100-sxm").bandwidth_bytes_per_s == 3.35e12
    assert all(name == device.name for name, device in HARDWARE.items())


def test_what_is_saved_is_loaded(tmp_path):
    device = Hardware(name="mine µ", bandwidth_bytes_per_s=1.5e11, flops_per_s=2e13, tile_query=64, tile_key=32)
    device.save(tmp_path / "mine.yaml")
    assert Hardware.load(tmp_path / "mine.yaml") == Hardware.find(str(tmp_path / "mine.yaml")) == device


def test_numbers_as_people_write_them(tmp_path):
    """YAML takes 2e12 for a string."""
    (tmp_path / "mine.yaml").write_text("name: mine\nbandwidth_bytes_per_s: 2e12\nflops_per_s: 3000000000000\n")
    device = Hardware.load(tmp_path / "mine.yaml")
    assert (device.bandwidth_bytes_per_s, device.flops_per_s, device.tile_query) == (2e12, 3e12, 128)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "expected the keys name, bandwidth_bytes_per_s"),
        ("[1, 2]", "expected the keys"),
        ("name: [", "not a YAML file"),
        ("\x00", "not a YAML file"),
        ("x: " + "9" * 5000, "not a YAML file"),
        ("name: x\nflops_per_s: 1e12", "bandwidth_bytes_per_s: Field required"),
        ("name: x\nbandwidth_bytes_per_s: 1e12\nflops_per_s: .inf", "flops_per_s"),
        ("name: x\nbandwidth_bytes_per_s: -1\nflops_per_s: 1e12", "bandwidth_bytes_per_s"),
        ("name: x\nbandwidth_bytes_per_s: 1e12\nflops_per_s: 1e12\ntile_keys: 64", "did you mean 'tile_key'"),
    ],
)
def test_a_broken_file_is_one_line(tmp_path, content, message):
    path = tmp_path / "broken.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        Hardware.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_no_such_device(tmp_path):
    with pytest.raises(ConfigError, match=r"'h100' is unknown \(did you mean 'h200'\?\); give one of a100-80g"):
        Hardware.find("h100")
    with pytest.raises(ConfigError, match="No such file"):
        Hardware.find(str(tmp_path / "none.yaml"))


@pytest.mark.slow
def test_the_device_at_hand_is_measured(tmp_path):
    output = tmp_path / "hardware.yaml"
    speeds = api.measure_hardware(str(output), device="cpu", tile_key=64)
    assert Hardware.load(output) == speeds
    assert 1e8 < speeds.bandwidth_bytes_per_s < 1e14
    assert 1e8 < speeds.flops_per_s < 1e17
    assert speeds.tile_key == 64
    assert speeds.name.startswith("CPU")


@pytest.mark.parametrize(
    ("options", "message"), [({"tile_key": 0}, "tile_key: 0"), ({"device": "meta"}, "meta"), ({"device": "gpu"}, "gpu")]
)
def test_what_cannot_be_measured_is_told_at_once(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        api.measure_hardware(str(tmp_path / "hardware.yaml"), **options)
    assert not list(tmp_path.iterdir())
