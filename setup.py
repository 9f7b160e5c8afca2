"""Adds the sources of the operators to the package, which builds them where it runs; everything else stands in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["sepllm*", "megatron*"]), "sepllm.csrc"],
    package_dir={"sepllm.csrc": "csrc"},
    package_data={"sepllm.csrc": ["*.cpp", "*.h", "*.cu"]},
)
