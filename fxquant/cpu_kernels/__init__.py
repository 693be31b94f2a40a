"""C++ kernels for the CPU: built on first use, chosen by instruction set at run time. Nothing happens at import."""

from __future__ import annotations

from fxquant.cpu_kernels.build import cache_dir, find_compiler
from fxquant.cpu_kernels.library import Library, best_isa, load

__all__ = ["Library", "best_isa", "cache_dir", "find_compiler", "load"]
