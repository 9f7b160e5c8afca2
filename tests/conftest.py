"""Without a GPU, Triton kernels run in Triton's interpreter, on CPU tensors: in this process, not in those that tests start."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch

HAS_INTERPRETER = importlib.util.find_spec("triton") is not None and not torch.cuda.is_available()

if HAS_INTERPRETER:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TRITON_INTERPRET", "1")  # triton's own functions ask when they are imported
        import triton
    triton.knobs.runtime.interpret = True


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter() -> Iterator[None]:
    """The interpreter prepares its language anew for every function that a kernel calls; once is enough, and twice as fast.

    Triton 3.6 takes an array of one element for an index, which numpy 2.4 refuses; later ones do as here.
    """
    if not HAS_INTERPRETER:
        yield
        return
    from triton.language import core
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpretedFunction

    call, prepare_tensor = InterpretedFunction.__call__, interpreter._patch_lang_tensor

    def quick_call(function: InterpretedFunction, *args: object, **kwargs: object) -> object:
        is_prepared = not core.is_builtin(core.full)
        return function.rewrite()(*args, **kwargs) if is_prepared else call(function, *args, **kwargs)

    def prepare_tensor_with_index(tensor: type, scope: Any) -> None:
        prepare_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda scalar: scalar.handle.data.item())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpretedFunction, "__call__", quick_call)
        patch.setattr(interpreter, "_patch_lang_tensor", prepare_tensor_with_index)
        yield
