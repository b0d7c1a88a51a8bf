"""Declares what pyproject.toml cannot: the CMake build, and `kernels/` as the package `parl_core.kernels`."""

from setuptools import find_packages, setup

setup(
    cmake_source_dir=".",
    packages=[*find_packages(include=["parl_core", "parl_core.*"]), "parl_core.kernels"],
    package_dir={"parl_core.kernels": "kernels"},
    package_data={"parl_core": ["py.typed"], "parl_core.ops": ["choice.json"]},
)
