"""Executors: the lowered graph as a callable, run node by node or compiled by Inductor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from fxquant.graphs import value_of
from fxquant.lowering.shims import shim_declarations

Executable = Callable[..., Any]

# Sizes: Dynamo has checked the inputs'.
_IN_CPP = {"cpp_wrapper": True, "cpp_wrapper_build_separate": True, "size_asserts": False}
_SHIMS = "aot_inductor.custom_ops_to_c_shims"


def to_eager(gm: GraphModule) -> Executable:
    """The graph's own generated Python: every operation runs in eager torch."""
    return gm.forward


def to_inductor(gm: GraphModule, mode: str | None = None, wrapper: str = "python") -> Executable:
    """The graph compiled by Inductor for inference, with the settings of one of torch's modes.

    `wrapper`: 'cpp' has Inductor call the kernels from C++ instead of from Python. No number depends on it. The calling
    C++ is compiled by itself and hardly optimized: fully, that of a model of thirty layers takes twice as long.

    Inductor gets a fresh GraphModule: on one that Dynamo made, AOTAutograd insists on Dynamo's book-keeping of
    parameters. The example inputs are the fake values that the graph was captured with, so that symbolic sizes stay
    symbolic and packed weights stay static. Nothing outside this call is configured.
    """
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    held = {str(node.target): getattr(gm, str(node.target)) for node in gm.graph.find_nodes(op="get_attr")}
    fresh = GraphModule(held, gm.graph)
    examples = [value_of(node) for node in gm.graph.find_nodes(op="placeholder")]
    in_cpp = {**_IN_CPP, _SHIMS: shim_declarations()} if wrapper == "cpp" else {}
    patches = {**(list_mode_options(mode) if mode else {}), **in_cpp}
    with torch.no_grad():
        return compile_fx(fresh, examples, config_patches=patches)  # pyright: ignore[reportReturnType]


def to_training(
    gm: GraphModule, examples: Sequence[Any], mode: str | None = None, *, eager: bool = False
) -> Executable:
    """A graph of Dynamo's form, forward and backward: by Inductor with one of torch's modes, or `eager`, op by op.

    Both go through AOTAutograd, while Dynamo compiles: whatever requires grad among `examples` will get a gradient.
    """
    if eager:
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager(gm, list(examples))
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = list_mode_options(mode) if mode else None
    return compile_fx(gm, list(examples), config_patches=patches)  # pyright: ignore[reportReturnType]
