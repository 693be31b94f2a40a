"""Choosing configurations of kernels: candidates, facts from compiling, measuring, caches, shipped tables."""

from __future__ import annotations
