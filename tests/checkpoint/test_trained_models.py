"""Trained models come back from their folders bit for bit, in eager and compiled."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fxquant
from benchmarks.peers.smollm2 import FOLDER
from tests.integrations.conftest import quiet as quiet

Made = tuple[nn.Module, tuple[Tensor, ...]]


def language_model() -> Made:
    if not (FOLDER / "model.safetensors").exists():
        pytest.skip("SmolLM2 is not there; `make demo-llm` gets it")
    from benchmarks.peers import smollm2
    from benchmarks.peers.subjects import Logits

    return Logits(smollm2.load()).eval(), (torch.tensor([smollm2.text_ids(32)]),)


def sentence_encoder() -> Made:
    from demo import minilm

    tokens = minilm.load_tokenizer(16)(["What does a compiler do?", "Rain is expected."])
    return minilm.load_encoder(), (tokens.input_ids, tokens.attention_mask)


def diffusion_transformer() -> Made:
    from benchmarks.accuracy import dit

    noise, label = dit.start(4)
    return dit.load_model(), (noise, torch.tensor([900, 500, 100, 10]), label)


@torch.no_grad()
def compiled(model: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    torch._dynamo.reset()
    return torch.compile(model, backend="fxquant", dynamic=False, fullgraph=True)(*inputs)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")  # at the import of torch._inductor
@pytest.mark.usefixtures("quiet", "fresh_dynamo")
@pytest.mark.parametrize("preset", ["int8dq", "int4wo"])
@pytest.mark.parametrize("make", [language_model, sentence_encoder, diffusion_transformer])
def test_a_trained_model_comes_back_bit_for_bit(make: Callable[[], Made], preset: str, tmp_path: Path) -> None:
    model, inputs = make()
    blank = copy.deepcopy(model)
    for parameter in blank.parameters():
        parameter.data.zero_()
    with torch.no_grad():
        exact = model(*inputs)
    fxquant.quantize(model, preset)
    fxquant.freeze(model)
    fxquant.save(model, tmp_path / "saved")
    again = fxquant.load(tmp_path / "saved", model=blank)
    with torch.no_grad():
        before, after = model(*inputs), again(*inputs)
    assert torch.equal(before, after)
    assert not torch.equal(before, exact)
    assert torch.equal(compiled(model, inputs), compiled(again, inputs))
