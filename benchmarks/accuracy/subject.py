"""What each of the models gives to the measurement."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

Forward = Callable[..., Tensor]
Outputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Metric:
    """One figure of merit: its key in the results, its heading, and how many digits mean anything."""

    key: str
    heading: str
    digits: int
    is_less_better: bool = False


@dataclass(frozen=True)
class Subject:
    """A trained model with the data it is judged on.

    ``run`` does the whole task with the model or a compiled form of it; ``score`` compares two such outcomes, the
    quantized first, and gives a figure for each of ``metrics`` (plots show the first). ``timed`` are the inputs of one
    timed call. ``source`` says what the task's data is, ``timed_as`` what one timed call is. ``exclude`` is a glob of
    modules that stay float. ``is_frozen``: through the model door, as a model so deep takes half a minute to compile.
    """

    name: str
    title: str
    source: str
    timed_as: str
    metrics: tuple[Metric, ...]
    model: nn.Module
    run: Callable[[Forward], Outputs]
    score: Callable[[Outputs, Outputs], dict[str, float]]
    timed: tuple[Tensor, ...]
    exclude: str | None = None
    is_frozen: bool = False

    @property
    def has_embeddings(self) -> bool:
        return any(isinstance(module, nn.Embedding) for module in self.model.modules())


SQNR = Metric("sqnr", "output SQNR dB", 1)
