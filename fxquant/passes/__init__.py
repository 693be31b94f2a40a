"""The passes, and the one order in which they run."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch.fx import GraphModule

from fxquant.annotation import PassResult
from fxquant.errors import FxQuantError, PassFailed
from fxquant.passes.annotate import Annotate
from fxquant.passes.base import Pass
from fxquant.passes.fold_weights import FoldWeights
from fxquant.passes.fuse_attention import FuseAttention
from fxquant.passes.fuse_epilogues import FuseEpilogues
from fxquant.passes.fuse_gates import FuseGates
from fxquant.passes.fuse_norms import FuseNorms
from fxquant.passes.fuse_prologues import FusePrologues
from fxquant.passes.fuse_rotary import FuseRotary
from fxquant.passes.fuse_siblings import FuseSiblings
from fxquant.passes.insert_fake_quantize import InsertFakeQuantize
from fxquant.passes.insert_qdq import InsertQdq
from fxquant.passes.share_operands import ShareOperands
from fxquant.passes.share_quantize import ShareQuantize

__all__ = [
    "Annotate",
    "FoldWeights",
    "FuseAttention",
    "FuseEpilogues",
    "FuseGates",
    "FuseNorms",
    "FusePrologues",
    "FuseRotary",
    "FuseSiblings",
    "InsertFakeQuantize",
    "InsertQdq",
    "Observer",
    "Pass",
    "ShareOperands",
    "ShareQuantize",
    "ignore",
    "run_passes",
]

Observer = Callable[[str, GraphModule, PassResult | None], None]


def ignore(stage: str, gm: GraphModule, result: PassResult | None) -> None:
    """The observer that does nothing."""


def run_passes(
    gm: GraphModule, passes: Iterable[Pass], *, observe: Observer = ignore, runnable: bool = True
) -> dict[str, PassResult]:
    """Run the passes in order; the graph is linted after each and shown to `observe`.

    `runnable`: the observer may run the graph. Without it the code is generated once, at the end: it takes longer than
    most passes.

    Raises:
        PassFailed: a pass raised; names it and those that had run before it.
    """
    results: dict[str, PassResult] = {}
    for step in passes:
        try:
            results[step.name] = step.run(gm)
            gm.graph.lint()
            if runnable:
                gm.recompile()
        except FxQuantError:
            raise
        except Exception as error:
            raise PassFailed(step.name, tuple(results), error) from error
        observe(step.name, gm, results[step.name])
    gm.recompile()
    return results
