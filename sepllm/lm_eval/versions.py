"""What a score was computed with: the same lines for this package's results files and eval.py's."""

from __future__ import annotations

from importlib.metadata import version

from sepllm import __version__

PACKAGES = ("lm_eval", "torch", "transformers", "datasets")


def package_versions() -> dict[str, str]:
    """Of this package and of those that a score depends on."""
    return {"sepllm": __version__} | {package: version(package) for package in PACKAGES}
