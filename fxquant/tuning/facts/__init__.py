"""What is known of a configuration once it is compiled, for a GPU that need not be here. Imports Triton."""

from __future__ import annotations

from fxquant.target import Arch
from fxquant.tuning.facts.reading import facts_of, launch_facts
from fxquant.tuning.facts.record import Facts, HotLoop, LaunchFacts
from fxquant.tuning.occupancy import Occupancy, occupancy_of

__all__ = ["Facts", "HotLoop", "LaunchFacts", "facts_of", "launch_facts", "occupancy"]


def occupancy(facts: LaunchFacts, arch: Arch) -> Occupancy:
    """How many blocks of a compiled launch a processor holds at once."""
    return occupancy_of(
        arch,
        registers=facts.registers,
        shared=facts.shared,
        warps=facts.warps,
        tensor_memory=facts.tensor_memory,
    )
