"""What torchao, diffusers and diffusers-torchao call the recipes of `PRESETS`.

Only names that mean one recipe. Not here: IntxWeightOnlyConfig and MXDynamicActivationMXWeightConfig, whose arguments
say what they are, and float8wo, e5m2 in diffusers where torchao's float8_weight_only is e4m3. Sources: docs/presets.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

TORCHAO = {
    "int8_weight_only": "int8wo",
    "Int8WeightOnlyConfig": "int8wo",
    "int8_dynamic_activation_int8_weight": "int8dq",
    "Int8DynamicActivationInt8WeightConfig": "int8dq",
    "int4_weight_only": "int4wo",
    "Int4WeightOnlyConfig": "int4wo",
    "int8_dynamic_activation_int4_weight": "int4dq",
    "Int8DynamicActivationInt4WeightConfig": "int4dq",
    "float8_weight_only": "fp8wo",
    "Float8WeightOnlyConfig": "fp8wo",
    "float8_dynamic_activation_float8_weight": "fp8dq",
    "Float8DynamicActivationFloat8WeightConfig": "fp8dq",
    "NVFP4DynamicActivationNVFP4WeightConfig": "nvfp4",
    "NVFP4WeightOnlyConfig": "nvfp4wo",
}
# diffusers' TorchAoConfig has these besides torchao's functions; its fp6_e3m2 and its kind are `small_float`s.
DIFFUSERS = {
    "float8wo_e4m3": "fp8wo",
    "float8wo_e5m2": "w=float8_e5m2/channel",
    "float8dq": "fp8dq",
    "float8dq_e4m3": "fp8dq",
    "float8dq_e4m3_tensor": "fp8dq",
    "float8dq_e4m3_row": "fp8dqrow",
}
SPELLINGS = TORCHAO | DIFFUSERS

_CALL = re.compile(r"(?:fpx_weight_only|FPXWeightOnlyConfig)\((?:ebits=)?([0-9]),(?:mbits=)?([0-9])\)")
_SHORT = re.compile(r"fp([3-7])_e([0-9])m([0-9])")
_UINT = re.compile(r"uint([2-7])wo")


def resolved(name: str) -> str:
    """Our text for a peer's name: a preset's name or 'w=...'; a name that is no peer's comes back as it is."""
    name = "".join(name.split())
    plain = name.removesuffix("()")
    if plain in SPELLINGS:
        return SPELLINGS[plain]
    if found := _CALL.fullmatch(name):
        exponent, mantissa = int(found[1]), int(found[2])
        return _small_float(1 + exponent + mantissa, exponent, mantissa)
    if found := _SHORT.fullmatch(name):
        return _small_float(*map(int, found.groups()))
    if found := _UINT.fullmatch(name):
        return f"w=int{found[1]}/group64/affine/bf16"
    return name


def known() -> Iterator[str]:
    """The spellings that a wrong name is compared with."""
    yield from SPELLINGS
    yield "fpx_weight_only(3, 2)"


def _small_float(bits: int, exponent: int, mantissa: int) -> str:
    return f"w=fp{bits}_e{exponent}m{mantissa}/channel"
