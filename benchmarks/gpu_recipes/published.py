"""The published rows, and what their recipes are called here."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from fxquant.spec import LinearSpec, linear_spec

TABLES = Path(__file__).parent.parent / "reference_tables"
FLOAT_DTYPES = {"None": "bfloat16", "bf16": "bfloat16", "fp16": "float16"}
# Names that their tables have besides those which fxquant knows.
RENAMED = {"fp8": "fp8dq", "fp6": "fp6_e3m2"}
WITHOUT = {
    "autoquant": "fxquant does not choose formats by timing",
    "sparsify": "fxquant does not prune weights",
}
_COGVIDEOX = {"2B": "THUDM/CogVideoX-2b", "5B": "THUDM/CogVideoX-5b"}


@dataclass(frozen=True)
class Cell:
    """One row of a table: what is run."""

    model: str
    batch: int = 1
    fuse: bool = False
    compile: bool = False
    compile_vae: bool = False
    recipe: str = "None"

    @property
    def why_not(self) -> str:
        """Why fxquant has nothing for the recipe; empty if it has."""
        return WITHOUT.get(self.recipe, "")

    @property
    def spec(self) -> LinearSpec | None:
        """What linears get; None if they stay float. Raises `UnknownPreset` for a name that nobody knows."""
        if self.recipe in FLOAT_DTYPES:
            return None
        return linear_spec(RENAMED.get(self.recipe, self.recipe))

    @property
    def dtype(self) -> str:
        """Of what is not quantized."""
        return FLOAT_DTYPES.get(self.recipe, "bfloat16")


@dataclass(frozen=True)
class Published:
    """A row: GiB and seconds, None where the table has no figure."""

    cell: Cell
    gpu: str
    model_memory: float | None
    inference_memory: float | None
    seconds: float


def published(folder: Path = TABLES) -> tuple[Published, ...]:
    """All rows of all tables."""
    return tuple(_row(fields) for path in sorted(folder.glob("*.csv")) for fields in _lines(path))


def _lines(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _row(fields: dict[str, str]) -> Published:
    recipe = fields.get("quantization", "None")
    cell = Cell(
        _COGVIDEOX.get(fields["model"], fields["model"]),
        int(fields.get("batch_size", "1")),
        "True" in (fields.get("fuse"), fields.get("fuse_qkv")),
        fields["compile"] == "True",
        "True" in (fields.get("compile_vae"), fields.get("quantize_vae")),
        "sparsify" if fields.get("sparsify") == "True" else recipe,
    )
    memory = [fields.get(name) for name in ("model_memory_gb", "inference_memory_gb")]
    model_memory, inference_memory = (float(text) if text else None for text in memory)
    return Published(cell, fields["gpu"], model_memory, inference_memory, float(fields["time_s"]))


def cells_of(rows: tuple[Published, ...], model: str, gpu: str) -> tuple[Cell, ...]:
    """What the tables have of a model on that GPU, each once; of any GPU if they have none of that."""
    here = [row for row in rows if row.cell.model == model]
    on_gpu = [row.cell for row in here if row.gpu == gpu]
    return tuple(dict.fromkeys(on_gpu or [row.cell for row in here]))
