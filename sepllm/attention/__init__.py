"""Attention over key ranges: `attend` is the door, the modules beside it are the cores behind it."""

from sepllm.attention.registry import AttentionSpec, PositionBias, attend, choose_core, core_names

__all__ = ["AttentionSpec", "PositionBias", "attend", "choose_core", "core_names"]
