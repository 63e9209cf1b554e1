"""Which GPU this machine has, asked of its driver, without torch."""

from __future__ import annotations

import ctypes
from typing import Final

NO_GPU: Final = "none"
_MAJOR: Final = 75
_MINOR: Final = 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR (cuda.h)."""


def gpu_architecture(*, driver: str = "libcuda.so.1") -> str:
    """Return the first GPU's architecture, such as "sm_90", or "none".

    Args:
        driver: the CUDA driver's library.
    """
    try:
        cuda = ctypes.CDLL(driver)
    except OSError:
        return NO_GPU
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    calls = (
        lambda: cuda.cuInit(0),
        lambda: cuda.cuDeviceGet(ctypes.byref(device), 0),
        lambda: cuda.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device),
        lambda: cuda.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device),
    )
    if any(call() != 0 for call in calls):
        return NO_GPU
    return f"sm_{major.value}{minor.value}"
