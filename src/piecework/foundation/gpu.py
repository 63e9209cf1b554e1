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
    codes = (
        cuda.cuInit(0),
        cuda.cuDeviceGet(ctypes.byref(device), 0),
        cuda.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device),
        cuda.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device),
    )
    return f"sm_{major.value}{minor.value}" if codes == (0, 0, 0, 0) else NO_GPU
