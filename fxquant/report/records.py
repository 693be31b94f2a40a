"""The rows that reports are made of: plain frozen data."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any, Literal, NamedTuple

from torch.nn import Module

from fxquant.annotation import joined_path
from fxquant.nn.base import QModule

Status = Literal["lowered", "reference", "training", "fallback", "skipped", "declined", "float"]
STATUSES: tuple[Status, ...] = ("lowered", "reference", "training", "fallback", "skipped", "declined", "float")
QUANTIZED: tuple[Status, ...] = ("lowered", "reference", "training", "fallback")
KINDS = ("linear", "conv", "embedding")


@dataclass(frozen=True)
class Site:
    """One product with a weight, and what became of it.

    ``status``: "lowered" runs on a quantized kernel; "reference" on dequantize and the float op; "training" on the
    float op, with rounded operands and a gradient; "fallback" on the quantized ops in eager, outside any graph;
    "skipped" stays float by the configuration; "declined" could not be quantized; "float" stays float because quantized
    would be slower, or because it has no weight. ``reason`` says why it is not "lowered", who made its kernel if not
    this door, or what of the configuration a product of its kind cannot have. ``members`` counts the products of the
    model in it, more than one after siblings were joined. ``parameter_names`` are the model's names of the float
    parameters, or of a frozen weight's parts; ``bytes_after`` counts what the site reads in their place.
    ``op`` is one of `KINDS`, or the op that was never made one ("lstm", "matmul"); ``node`` its name in the graph;
    ``spec_text`` says format and granularity of weights and activations, ``algorithm`` how the codes of the weight were
    chosen. ``sqnr`` of the output and ``weight_sqnr`` in dB, None if not measured.
    """

    paths: tuple[str, ...]
    status: Status
    spec_text: str = ""
    kernel: str = ""
    reason: str = ""
    source: str = ""
    parameter_names: tuple[str, ...] = ()
    bytes_before: int = 0
    bytes_after: int = 0
    op: str = "linear"
    members: int = 1
    node: str = ""
    algorithm: str = ""
    sqnr: float | None = None
    weight_sqnr: float | None = None

    @property
    def path(self) -> str:
        """One word for the site: its paths folded, else its source line, else its node."""
        return joined_path(self.paths) or self.source or self.node

    @property
    def is_quantized(self) -> bool:
        return self.status in QUANTIZED

    @property
    def reason_with_op(self) -> str:
        """The reason; of an op that is not one of `KINDS`, with its name."""
        return self.reason if self.op in KINDS else f"{self.op}: {self.reason}"


class SiteSqnr(NamedTuple):
    """Signal to quantization noise in dB on one batch: of a site's output, and of its weight; None if not known."""

    output: float | None = None
    weight: float | None = None


@dataclass(frozen=True)
class Uncovered:
    """A float parameter that is not quantized: its name, its bytes, and why."""

    name: str
    bytes: int
    reason: str


@dataclass(frozen=True)
class ParameterFacts:
    """What coverage has to know of a parameter; tied names have the same ``identity``."""

    identity: int
    bytes: int
    ndim: int
    is_float: bool = True

    @property
    def is_matrix(self) -> bool:
        """True for what quantization is about: floats with two or more dimensions."""
        return self.is_float and self.ndim >= 2


def parameter_facts(model: Module) -> dict[str, ParameterFacts]:
    """The facts of every parameter of the model, under every name it has; of a frozen weight those that it had."""
    named = model.named_parameters(remove_duplicate=False)
    facts = {name: ParameterFacts(id(p), p.nbytes, p.dim(), p.is_floating_point()) for name, p in named}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QModule) and module._forms:
            names = zip(quantized_weights(module, path).items(), module._forms, strict=True)
            facts.update({name: ParameterFacts(id(module.parts(own)[0]), size, 2) for (name, size), own in names})
    return facts


def quantized_weights(module: QModule, path: str) -> dict[str, int]:
    """The quantized weights of the module at `path` by the model's names, with their bytes as floats.

    A frozen weight goes by the name of its codes. One that another module holds (tied weights) is not among them.
    """
    if module._forms:
        item = module.compute_dtype.itemsize
        sizes = {f"{name}_codes": form.rows * form.columns * item for name, form in module._forms.items()}
    else:
        known = {name: module._parameters.get(name) for name in module.weight_names if module._weight_spec}
        sizes = {name: p.nbytes for name, p in known.items() if p is not None}
    return {f"{path}.{name}" if path else name: size for name, size in sizes.items()}


def stable_text(text: str) -> str:
    """The text without what differs between runs or machines: addresses, and the folders of absolute paths."""
    text = re.sub(r"0x[0-9a-f]{6,}", "0x…", text)
    return re.sub(r"(?<![\w./])/(?:[^\s/:\"',()]+/)+([^\s/:\"',()]+)", r"\1", text)


def plain(value: Any) -> Any:
    """Dataclasses, tuples and mappings as what JSON has; numbers that JSON lacks (inf, nan) as text."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def unique(names: Iterable[str]) -> tuple[str, ...]:
    """Each name once, in the order of first sight."""
    return tuple(dict.fromkeys(names))
