"""Which implementation `impl="auto"` is."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Literal

import torch

from sepllm.ops import extension

Impl = Literal["auto", "native", "reference"]


@torch.compiler.assume_constant_result
def is_native(impl: Impl, device_type: str) -> bool:
    """Whether the compiled operator computes it; ``auto``: on a CPU for which it can be built, unless the environment says
    ``SEPLLM_OPS=reference``.

    Nowhere else, until a test on that kind of device has passed and is committed, unless the environment says ``SEPLLM_OPS=native``. A
    compiler asks once, and does not look inside.
    """
    if impl not in ("auto", "native", "reference"):
        raise ValueError(f"impl is {impl!r}: use auto, native or reference.")
    chosen = os.environ.get("SEPLLM_OPS") if impl == "auto" else impl
    if chosen in ("native", "reference"):
        return chosen == "native"
    return device_type == "cpu" and extension.why_unavailable() is None


@torch.compiler.assume_constant_result
def load(device_type: str) -> None:
    """Loads the compiled operators of a device; ValueError where there are none."""
    if device_type not in ("cpu", "cuda"):
        raise ValueError(f"The compiled operators run on cpu and cuda, not on {device_type}: use impl='reference'.")
    extension.load()
    if device_type == "cuda":
        extension.load_cuda()


def refuse_second_derivative(name: str) -> None:
    """ValueError where a backward pass is itself to be differentiated: its operator would be taken for a constant.

    Not where a compiler traces the backward pass.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise ValueError(f"{name} has no second derivative: leave create_graph out.")


def once_loaded(declare: Callable[[], None]) -> Callable[..., None]:
    """``register(device_type="cpu")``: loads the compiled operators of a device and, the first time, tells torch what ``declare`` says of some.

    A compiler has it done, and does not look inside.
    """
    declare_once = functools.cache(declare)

    @torch.compiler.assume_constant_result
    def register(device_type: str = "cpu") -> None:
        load(device_type)
        declare_once()

    return register
