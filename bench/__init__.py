"""Benchmarks, run from this repository's folder."""

import tools  # noqa: F401 - it lets the installed package come first
