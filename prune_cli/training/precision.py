"""Whether bfloat16 is worth asking for: a CPU without instructions for it computes it many times slower than float32."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch


def has_bf16(device: torch.device) -> bool:
    """Whether a device has instructions for bfloat16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type != "cpu" or cpu_has_bf16()


def lowered(precision: str, device: torch.device) -> bool:
    """Whether a precision of `fit.Options` means bfloat16 on a device."""
    return precision == "bf16!" or (precision == "bf16" and has_bf16(device))


def cpu_has_bf16() -> bool:
    """From the capabilities that the CPU reports: AVX-512 BF16 or AMX on x86, FEAT_BF16 on Arm."""
    if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        return True
    if sys.platform == "darwin":
        asked = ["sysctl", "-n", "hw.optional.arm.FEAT_BF16"]
        return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip() == "1"
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    return any("bf16" in line.split() for line in lines if line.startswith("Features"))  # as Arm CPUs list them
