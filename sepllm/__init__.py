"""SepLLM: a query reads the initial tokens, the separators, and its neighbours.

The idea alone, on plain tensors: `AttentionPattern` says which keys a query may read, `TokenLayout` what that means for one
batch of token ids, `attend` computes it. Needs torch; `sepllm.hf` also needs transformers. Attributes load on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOMES = {
    "AttentionPattern": "sepllm.pattern",
    "KeyRanges": "sepllm.layout",
    "TokenLayout": "sepllm.layout",
    "attend": "sepllm.attention",
}
__all__ = ["AttentionPattern", "KeyRanges", "TokenLayout", "attend"]

if TYPE_CHECKING:
    from sepllm.attention import attend
    from sepllm.layout import KeyRanges, TokenLayout
    from sepllm.pattern import AttentionPattern


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'sepllm' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
