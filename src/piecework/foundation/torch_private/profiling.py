"""A profiler that sees every thread. torch 2.11-2.13.

torch/profiler/profiler.py (`experimental_config`), torch/csrc/profiler/orchestration/observer.h
(`ExperimentalConfig.profile_all_threads`). Otherwise torch's profiler records the thread that started it and no other,
and ends the process where another thread stops it.
"""

from __future__ import annotations

from typing import Any

import torch


def thread_wide_profiler() -> Any:
    """Return a `torch.profiler.profile` of all threads, which any thread may start, stop and export."""
    from torch._C._profiler import _ExperimentalConfig
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    return profile(activities=activities, experimental_config=_ExperimentalConfig(profile_all_threads=True))
