"""generate on quantized models: every cache, padding on the left, batches and pipelines give the same tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fxquant
from fxquant.errors import InvalidOption
from tests.integrations.small_models import TOKENS, WORDS, model_class, saved

transformers: Any = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("quiet")

PAD = 0
NEW = 6


@pytest.fixture(scope="module", params=["int8dq", "int4wo"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved quantized decoder, its embedding tied to its head."""
    from fxquant import FxQuantConfig

    work = tmp_path_factory.mktemp(request.param)
    saved("tied", work / "float", pad_token_id=PAD, eos_token_id=None, bos_token_id=None, initializer_range=0.2)
    config = FxQuantConfig(request.param)
    model_class("tied").from_pretrained(work / "float", quantization_config=config).save_pretrained(work / "quantized")
    return work / "quantized"


@pytest.fixture
def model(folder: Path) -> Any:
    return model_class("tied").from_pretrained(folder)


def greedy(model: Any, tokens: Tensor) -> Tensor:
    """`NEW` tokens behind `tokens` [B, T], each from a whole pass without any cache."""
    with torch.no_grad():
        for _ in range(NEW):
            tokens = torch.cat([tokens, model(tokens, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return tokens


def generated(model: Any, tokens: Tensor, **options: Any) -> Tensor:
    return model.generate(tokens, max_new_tokens=NEW, do_sample=False, pad_token_id=PAD, **options)


def padded_left(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows of several lengths as a batch, and its mask."""
    longest = max(len(row) for row in rows)
    batch = torch.stack([torch.cat([row.new_full([longest - len(row)], PAD), row]) for row in rows])
    mask = torch.stack([torch.cat([row.new_zeros(longest - len(row)), torch.ones_like(row)]) for row in rows])
    return batch, mask


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_cache_gives_the_tokens_of_passes_without_one(model: Any, cache: str) -> None:
    tokens = TOKENS + 1
    wanted = greedy(model, tokens)
    found = generated(model, tokens, attention_mask=torch.ones_like(tokens), cache_implementation=cache)
    assert torch.equal(found, wanted)
    assert len({tuple(row) for row in found[:, -NEW:].tolist()}) > 1  # the model does not say the same of everything


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_batch_that_is_padded_on_the_left_gives_each_row_its_own_tokens(model: Any, cache: str) -> None:
    rows = [TOKENS[0] + 1, TOKENS[1, :3] + 1, TOKENS[0, 2:4] + 1]
    batch, mask = padded_left(rows)
    found = generated(model, batch, attention_mask=mask, cache_implementation=cache)
    for row, tokens in zip(rows, found, strict=True):
        assert torch.equal(tokens[-NEW:], greedy(model, row[None])[0, -NEW:])


def test_beams_and_samples_run(model: Any) -> None:
    tokens = TOKENS + 1
    mask = torch.ones_like(tokens)
    beams = model.generate(tokens, attention_mask=mask, max_new_tokens=NEW, num_beams=3, num_return_sequences=2)
    assert beams.shape == (4, tokens.shape[1] + NEW)
    transformers.set_seed(0)
    samples = model.generate(tokens, attention_mask=mask, max_new_tokens=NEW, do_sample=True)
    assert samples.shape == (2, tokens.shape[1] + NEW)


def test_a_pipeline_takes_the_model_and_the_folder(folder: Path, model: Any) -> None:
    tokenizer = small_tokenizer()
    tokenizer.save_pretrained(folder)
    texts = ["w1 w2 w3 w4", "w9 w8"]
    options = {"max_new_tokens": NEW, "do_sample": False, "batch_size": 2, "return_full_text": False}
    one = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    two = transformers.pipeline("text-generation", model=str(folder))
    wanted = [greedy(model, tokenizer(text, return_tensors="pt").input_ids)[0, -NEW:] for text in texts]
    for pipe in (one, two):
        found = [answers[0]["generated_text"] for answers in pipe(texts, **options)]
        assert [text.split() for text in found] == [tokenizer.decode(row).split() for row in wanted]


def small_tokenizer() -> Any:
    """One word for each token."""
    import tokenizers

    model = tokenizers.models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0")
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="w0", padding_side="left")


# ---- compiled


def unique_graphs() -> int:
    from torch._dynamo.utils import counters

    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


@pytest.fixture
def counted(fresh_dynamo: None) -> Iterator[None]:
    from torch._dynamo.utils import counters

    counters.clear()
    yield
    counters.clear()


def answers(model: Any, **options: Any) -> list[Tensor]:
    """Tokens for prompts of three lengths, the first twice, in caches of one size."""
    prompts = [TOKENS + 1, TOKENS[:, :4] + 1, TOKENS[:, 1:] + 1, TOKENS + 1]
    options |= {"cache_implementation": "static", "max_cache_len": 32}
    return [generated(model, prompt, attention_mask=torch.ones_like(prompt), **options) for prompt in prompts]


@pytest.mark.usefixtures("counted")
def test_generate_compiles_decoding_once(model: Any) -> None:
    from fxquant.integrations.transformers import compile_config

    wanted = answers(model)
    found = answers(model, compile_config=compile_config(executor="eager"))
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert unique_graphs() == 1
    assert fxquant.refresh(model) == 0  # nothing is packed beside the codes of the modules


@pytest.mark.usefixtures("counted")
def test_prompt_and_decoding_are_compiled_once_each(model: Any) -> None:
    wanted = answers(model)
    model.forward = torch.compile(
        model.forward, backend="fxquant", dynamic=True, fullgraph=True, options={"executor": "eager"}
    )
    found = answers(model)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert unique_graphs() == 2
    assert fxquant.refresh(model) == 0


# ---- a cache of codes


def cache_of(model: Any, **options: Any) -> Any:
    from fxquant.integrations.transformers_cache import FxQuantCache

    return FxQuantCache(model.config, **options)


def rounded_cache(model: Any) -> Any:
    """A float cache of the values that int8 codes stand for."""

    class Rounded(transformers.cache_utils.DynamicLayer):
        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            is_prompt, states = not self.is_initialized, (key_states, value_states)
            found = super().update(*map(rounded, states))
            return states if is_prompt else found

    return transformers.Cache(layers=[Rounded() for _ in range(model.config.num_hidden_layers)])


def rounded(states: Tensor) -> Tensor:
    scale = states.abs().amax(-1, keepdim=True) / 127
    return (states / scale).round() * scale


@pytest.mark.parametrize("beams", [1, 3])
def test_an_int8_cache_gives_the_tokens_of_rounded_keys_and_values(beams: int, model: Any) -> None:
    tokens, cache, floats = TOKENS + 1, cache_of(model), rounded_cache(model)
    options: dict[str, Any] = {"attention_mask": torch.ones_like(tokens), "num_beams": beams}
    wanted = generated(model, tokens, past_key_values=floats, **options)
    assert torch.equal(generated(model, tokens, past_key_values=cache, **options), wanted)
    assert cache.get_seq_length() == floats.get_seq_length() == wanted.shape[1] - 1
    # heads of 16 numbers: 16 bytes and a float32 scale, where there were 64
    assert cache.nbytes == sum(layer.keys.nbytes + layer.values.nbytes for layer in floats.layers) * 20 // 64


@pytest.mark.parametrize("nbits", [2, 4, 6, 8])
def test_a_cache_of_codes_is_within_half_a_step(nbits: int, model: Any) -> None:
    torch.manual_seed(0)
    keys, values = torch.randn(2, 2, 5, 16), torch.randn(2, 2, 5, 16)
    layer = cache_of(model, nbits=nbits).layers[0]
    assert layer.update(keys[..., :3, :], values[..., :3, :])[0] is not None
    found = layer.update(keys[..., 3:, :], values[..., 3:, :])
    for whole, read in zip((keys, values), found, strict=True):
        low, high = whole.amin(-1, keepdim=True).clamp(max=0), whole.amax(-1, keepdim=True).clamp(min=0)
        step = whole.abs().amax(-1, keepdim=True) / 127 if nbits == 8 else (high - low) / (2**nbits - 1)
        # a zero point that is a code moves the ends by up to half a step
        assert ((read - whole).abs() <= (0.5 if nbits == 8 else 1.0) * step * 1.0001).all()
    again = layer.update(keys[..., :1, :], values[..., :1, :])
    assert torch.equal(again[0][..., :5, :], found[0])  # what was quantized once stays as it is


def test_a_cache_takes_tokens_back(model: Any) -> None:
    torch.manual_seed(0)
    layer = cache_of(model).layers[0]
    rows = torch.randn(2, 2, 5, 16)
    layer.update(rows, rows)
    layer.crop(-2)
    assert layer.get_seq_length() == 3
    found, _ = layer.update(rows[..., 3:, :], rows[..., 3:, :])
    assert found.shape == rows.shape
    layer.reset()
    assert layer.get_seq_length() == 0
    assert layer.update(rows, rows)[0] is rows


def test_caches_that_cannot_be_are_named(model: Any) -> None:
    with pytest.raises(InvalidOption, match="2 to 8"):
        cache_of(model, nbits=1)
    sliding = transformers.Gemma3TextConfig(num_hidden_layers=6)
    with pytest.raises(InvalidOption, match="sliding_attention"):
        type(cache_of(model))(sliding)


# ---- through Inductor


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")  # at the import of torch._inductor
@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize("both", [False, True], ids=["decoding", "prompt and decoding"])
def test_inductor_gives_the_tokens_of_eager_and_compiles_each_phase_once(both: bool, model: Any) -> None:
    from fxquant.integrations.transformers import compile_config

    wanted = answers(model)
    if both:
        model.forward = torch.compile(model.forward, backend="fxquant", dynamic=True, fullgraph=True)
        found = answers(model)
    else:
        found = answers(model, compile_config=compile_config())
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert unique_graphs() == 1 + both
    assert fxquant.refresh(model) == 0  # both phases read the modules' own codes
