"""Launch settings: the table, what overrides it, and what is remembered on disk."""

from __future__ import annotations

import pytest
import torch
from moa_kernels import launch
from moa_kernels.launch import TABLE, LaunchConfig, launch_config, overridden, padded, save_tuned, table_config

CPU = torch.device("cpu")
ODD = LaunchConfig(32, 16, 2, 1)


def test_the_table_covers_every_head_dimension_of_every_architecture():
    for kernel in ("prefill", "decode", "coded_decode", "influence", "coded_influence"):
        for arch in ("sm_80", "sm_86", "sm_90", "interpreter"):
            for dim in (16, 32, 64, 128, 256):
                assert (kernel, arch, dim) in TABLE


@pytest.mark.parametrize(("dim", "tile"), [(1, 16), (16, 16), (17, 32), (64, 64), (80, 128), (96, 128), (256, 256)])
def test_head_dimensions_are_padded_to_powers_of_two(dim, tile):
    assert padded(dim) == tile


@pytest.mark.parametrize(
    ("capability", "arch"),
    [
        ((8, 0), "sm_80"),
        ((8, 6), "sm_86"),
        ((8, 9), "sm_86"),
        ((9, 0), "sm_90"),
        ((10, 0), "sm_90"),
        ((12, 0), "sm_86"),
    ],
)
def test_devices_follow_an_entry_whose_shared_memory_they_have(capability, arch):
    assert launch._arch(capability) == arch


def test_wide_elements_take_smaller_tiles():
    half, single = table_config("prefill", "sm_90", 128, 2), table_config("prefill", "sm_90", 128, 4)
    assert single.block_n * 2 == half.block_n
    assert single.num_stages <= 2


def test_overrides_hold_inside_their_block_only():
    before = launch_config("prefill", CPU, 64, 2)
    with overridden("prefill", ODD):
        assert launch_config("prefill", CPU, 64, 2) == ODD
        assert launch_config("decode", CPU, 64, 2) != ODD
    assert launch_config("prefill", CPU, 64, 2) == before


@pytest.fixture
def pretend_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("MOA_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(launch, "interpreting", lambda: False)
    monkeypatch.setattr(launch, "_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    launch.forget_tuned()
    yield torch.device("cuda")
    launch.forget_tuned()


def test_tuned_settings_come_before_the_table_for_their_device_kernel_and_width(pretend_gpu):
    table = launch_config("prefill", pretend_gpu, 128, 2)
    save_tuned(pretend_gpu, "prefill", 128, 2, ODD)
    save_tuned(pretend_gpu, "decode", 128, 2, LaunchConfig(16, 16, 4, 2))
    assert launch_config("prefill", pretend_gpu, 128, 2) == launch_config("prefill", pretend_gpu, 96, 2) == ODD
    assert launch_config("prefill", pretend_gpu, 128, 4) == table_config("prefill", "sm_90", 128, 4)
    assert launch_config("prefill", pretend_gpu, 64, 2) == table_config("prefill", "sm_90", 64, 2)
    assert table != ODD
    assert launch.cache_file(pretend_gpu).name == "kernels-NVIDIA-H200.json"


@pytest.mark.parametrize("text", ["", "[]", '{"prefill-128-2": {"block_m": 1}}'])
def test_a_broken_file_of_tuned_settings_is_named(pretend_gpu, text):
    launch.cache_file(pretend_gpu).write_text(text)
    with pytest.raises(ValueError, match=r"kernels-NVIDIA-H200\.json isn't a file of tuned settings"):
        launch_config("prefill", pretend_gpu, 128, 2)
