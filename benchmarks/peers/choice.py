"""Which tools are measured on which model: every one where it says something, within the time there is.

Preparing a tool costs more than timing it: torchao's max-autotune some 20 s for a model of four layers, minutes for
SmolLM2's thirty.
"""

from __future__ import annotations

from benchmarks.peers.ours import FLOAT

INT8, INT4, INT4_WEIGHTS, INT8_WEIGHTS = (f"fxquant {name}" for name in ("int8dq", "int4dq", "int4wo", "int8wo"))
INT8_GROUPS, INT8_BFLOAT16 = (f"fxquant int8dq, {how}" for how in ("groups", "bfloat16"))
INT8_FINE = "fxquant int8wo, groups"
WEIGHTS_BFLOAT16 = f"{INT8_WEIGHTS}, bfloat16"
_NEAR = (FLOAT, INT8, INT8_WEIGHTS, "OpenVINO w8a8", "OpenVINO 8-bit weights", "ONNX Runtime int8", "torchao int8dq")
_ACTIVATIONS = (FLOAT, INT8, "OpenVINO w8a8", "ONNX Runtime int8")
_EAGER = ("Quanto int8, eager", "torch quantize_dynamic, eager")
_MANY = (*(name for name in _NEAR if name != INT8_WEIGHTS), INT8_BFLOAT16, INT8_GROUPS, WEIGHTS_BFLOAT16)
_LLAMA = ("llama.cpp Q8_0", "llama.cpp Q4_0")

TOOLS: dict[str, tuple[str, ...]] = {
    "decoder-1": (*_NEAR, INT4, INT4_WEIGHTS, "OpenVINO 4-bit weights", *_EAGER),
    "decoder-128": (*_NEAR, INT8_BFLOAT16, INT8_GROUPS, WEIGHTS_BFLOAT16, INT4, _EAGER[1]),
    "decoder-1024": (*_NEAR, INT8_BFLOAT16, INT8_GROUPS, WEIGHTS_BFLOAT16, INT4),
    "minilm": (*_ACTIVATIONS, INT4, *_EAGER),
    "vit": (*_ACTIVATIONS, _EAGER[1]),
    "dit": (*_ACTIVATIONS, _EAGER[1]),
    "smollm2-step": (FLOAT, INT8, INT8_FINE, INT4, *_EAGER, *_LLAMA),
    "smollm2-prefill": (FLOAT, INT8, INT8_FINE, _EAGER[1], *_LLAMA),
}
# On two threads: what the demands name.
TWO_THREADS: dict[str, tuple[str, ...]] = {
    "decoder-1": (*_NEAR, INT4),
    "decoder-128": _MANY,
    "decoder-1024": _MANY,
    "minilm": (FLOAT, INT8),
    "smollm2-step": (FLOAT, INT8, INT8_FINE, INT4, *_LLAMA),
    "smollm2-prefill": (FLOAT, INT8, INT8_FINE, *_LLAMA),
}


def tools(subject: str, threads: int) -> tuple[str, ...]:
    """The tools for a model on that many threads; none if it is not measured so."""
    return TOOLS[subject] if threads == 1 else TWO_THREADS.get(subject, ())


NOTES = (
    "fxquant where one token is decoded: fxquant.compile(…, wrapper='cpp', freezing=True)",
    "not run on SmolLM2: torchao, OpenVINO, ONNX Runtime: each takes a minute and more to prepare its thirty layers,"
    " and the latter two cannot export the static cache of a step",
    "not run on MiniLM, ViT and DiT: torchao, 20 to 32 s to prepare and slower there than fxquant in the same recipe;"
    " weight-only recipes of fxquant and OpenVINO, slower than quantized activations at that many rows",
    "torchao's int8wo is run on no model: on the decoder at one token it took twice float's time",
    "not run on two threads: ViT, DiT, and the tools that no demand names",
)
