"""What a measurement ran on."""

from __future__ import annotations

import platform

import torch


def device_name(device: torch.device) -> str:
    """A GPU's name, or the processor's as Linux knows it, else as Python does."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
