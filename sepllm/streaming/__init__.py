"""Perplexity of texts without end, token by token, from a cache that stays small: SepLLM's streaming evaluation (arXiv 2412.12094, 4.6).

``python -m sepllm.streaming`` is the command; docs/streaming.md says what it measures.
"""

from sepllm.streaming.method import METHODS, Method, MethodName, StreamCache
from sepllm.streaming.stream import Stream, Tally

__all__ = ["METHODS", "Method", "MethodName", "Stream", "StreamCache", "Tally"]
