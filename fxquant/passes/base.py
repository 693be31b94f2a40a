"""What a pass is: a small frozen object with a name and one method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch.fx import GraphModule

from fxquant.annotation import PassResult


class Pass(ABC):
    """One step of the pipeline; its options are its fields.

    A pass edits the graph in place and leaves a value on every node; `run_passes` lints the graph and makes it runnable
    again. A pass counts what it changed and gives each candidate that it left a reason.
    """

    name: ClassVar[str]

    @abstractmethod
    def run(self, gm: GraphModule) -> PassResult:
        """Edit `gm`; say what was changed and what was left, with the reason."""
