"""Metadata and tools are declared in pyproject.toml; this file stands for installers that ask for it."""

from setuptools import setup

setup()
