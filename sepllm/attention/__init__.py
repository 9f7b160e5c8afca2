"""Attention over key ranges: `attend` is the door, the modules beside it are the cores behind it."""

from sepllm.attention.registry import attend, choose_core, core_names, prepare, spec_of
from sepllm.attention.spec import AttentionSpec, PositionBias

__all__ = ["AttentionSpec", "PositionBias", "attend", "choose_core", "core_names", "prepare", "spec_of"]
