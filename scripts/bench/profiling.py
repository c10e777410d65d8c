"""Where a contestant's time goes: what a record explains its ratios with.

Taken after the rounds, which it would slow down: of models by torch's operation (:func:`operations`), of everything
else by the function of Python that took it (:func:`functions`).
"""

from __future__ import annotations

import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Set
from types import FrameType
from typing import Any

import torch

Profile = dict[str, float]
"""Shares of the time, the largest first; what is smaller than :data:`LEAST` is in ``other``."""
LEAST = 0.03
SECONDS, EVERY = 2.0, 0.001
"""For how long functions are looked at, and how often."""
WAITING = ("threading", "queue", "concurrent.futures.thread", "concurrent.futures._base")
"""Modules of threads that do nothing."""


def operations(call: Callable[[], Any], times: int = 1) -> Profile:
    """By torch's operation, of some calls: time of its own, without that of operations inside of it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(times):
            call()
    return shares({each.key.removeprefix("aten::"): each.self_cpu_time_total for each in profile.key_averages()})


def functions(call: Callable[[], Any], seconds: float = SECONDS) -> Profile:
    """By function, with all that is not Python's which it calls, and numpy, over some seconds of calls.

    The stacks of this thread and of those that the calls start are looked at by one more. It waits while C holds the
    interpreter's lock, so that what it sees counts for the time since it last saw something.
    """
    found: defaultdict[str, float] = defaultdict(float)
    others = sys._current_frames().keys() - {threading.get_ident()}
    stop = threading.Event()
    sampler = threading.Thread(target=_sample, args=(found, others, stop))
    interval = sys.getswitchinterval()
    sys.setswitchinterval(EVERY)
    sampler.start()
    try:
        begun = time.perf_counter()
        while time.perf_counter() - begun < seconds:
            call()
    finally:
        stop.set()
        sampler.join()
        sys.setswitchinterval(interval)
    return shares(found)


def _sample(found: defaultdict[str, float], others: Set[int], stop: threading.Event) -> None:
    """Add up the seconds in which each function was at the top of a thread's stack, but for some threads, until it is
    told to stop."""
    ignored, last = {*others, threading.get_ident()}, time.perf_counter()
    while not stop.wait(EVERY):
        now = time.perf_counter()
        for thread, frame in sys._current_frames().items():
            if thread not in ignored and _module(frame) not in WAITING:
                found[_named(frame)] += now - last
        last = now


def _named(frame: FrameType) -> str:
    """The function that is at the top of a stack, or that called numpy there."""
    while _module(frame).startswith("numpy.") and frame.f_back:
        frame = frame.f_back
    return f"{_module(frame)}.{frame.f_code.co_qualname}".replace(".<locals>", "")


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def shares(spent: Mapping[str, float]) -> Profile:
    """What was spent on each as shares of the whole."""
    whole = sum(spent.values()) or 1.0
    told = {name: each / whole for name, each in sorted(spent.items(), key=lambda item: -item[1])}
    large = {name: round(share, 3) for name, share in told.items() if share >= LEAST}
    return {**large, "other": round(1 - sum(large.values()), 3)}
