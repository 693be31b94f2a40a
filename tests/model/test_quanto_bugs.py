"""What fails in optimum-quanto 0.2.7, by the numbers of this project's list of it, and why it cannot here."""

from __future__ import annotations

import copy
import pickle
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fxquant
from fxquant.errors import AlreadyFrozen, FxQuantError, InvalidQuantizationMap, StateDictMismatch

ALL_FORMATS = ["int8", "int4", "int2", "qfloat8", "qfloat8_e5m2"]


def linear(columns: int, rows: int, weights: str = "int8", dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """A frozen nn.Linear(columns, rows) that had random weights."""
    torch.manual_seed(0)
    module = nn.Linear(columns, rows).to(dtype)
    fxquant.quantize(module, weights=weights, **config)
    fxquant.freeze(module)
    return module


def tiny_llama(**options: Any) -> Any:
    transformers: Any = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 50}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, **options)).eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(12).reshape(1, 12)).logits


@pytest.mark.parametrize("weights", ALL_FORMATS)
@pytest.mark.parametrize("offset", [0, 1, 4, 8])
def test_b1_weights_from_an_unaligned_file_are_used_without_a_crash(weights: str, offset: int) -> None:
    # Codes are copied into the kernels' own layout when they are loaded; no kernel reads the file's bytes.
    module = linear(64, 32, weights=weights, dtype=torch.bfloat16)
    state = {key: _placed(tensor, offset) for key, tensor in module.state_dict().items()}
    assert state["weight_codes"].data_ptr() % 64 == offset
    again = nn.Linear(64, 32).bfloat16()
    fxquant.requantize(again, state, fxquant.quantization_map(module))
    x = torch.randn(8, 64, dtype=torch.bfloat16)
    assert torch.equal(again(x), module(x))


def _placed(tensor: Tensor, offset: int) -> Tensor:
    """A copy whose bytes start `offset` behind a multiple of 64, or at the next multiple of its element size."""
    offset += -offset % tensor.element_size()
    raw = torch.zeros(tensor.nbytes + offset + 64, dtype=torch.uint8)
    start = -raw.data_ptr() % 64 + offset
    place = raw[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    return place.copy_(tensor)


@pytest.mark.parametrize("weights", ALL_FORMATS)
def test_b2_a_frozen_model_moves_to_shared_memory(weights: str) -> None:
    # Codes are ordinary uint8 and int8 buffers, which torch knows how to share.
    model = nn.Sequential(linear(64, 32, weights=weights))
    x = torch.randn(3, 64)
    before = model(x)
    model.share_memory()
    assert all(tensor.is_shared() for tensor in (*model.parameters(), *model.buffers()))
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("weights", ALL_FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_b3_the_bias_is_added_in_every_format(weights: str, dtype: torch.dtype) -> None:
    # Every product op takes the bias as an argument and is compared with a reference that has one.
    module = linear(128, 64, weights=weights, dtype=dtype)
    x = torch.randn(4, 128, dtype=dtype)
    with torch.no_grad():
        module.bias.zero_()
        without = module(x)
        module.bias.fill_(16.0)
        torch.testing.assert_close(module(x), without + 16, rtol=2e-2, atol=2e-2)
        wanted = x.double() @ module.quantized_weight().dequantize().double().t() + 16
    torch.testing.assert_close(module(x).double(), wanted, rtol=1e-2, atol=1e-2)


def test_b4_a_model_built_on_meta_gets_its_non_persistent_buffers() -> None:
    # They are computed by the model's own _init_weights, or requantize raises BuffersOnMeta.
    model = tiny_llama()
    fxquant.quantize(model, weights="int8")
    fxquant.freeze(model)
    with torch.device("meta"):
        again = tiny_llama()
    fxquant.requantize(again, model.state_dict(), fxquant.quantization_map(model))
    assert torch.equal(again.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    assert torch.equal(logits(again), logits(model))


def test_b5_the_state_dict_of_a_tied_model_is_saved_as_safetensors(tmp_path: Path) -> None:
    # A tied weight is held by one module, so that no two entries of the state dict share memory.
    model = tiny_llama(tie_word_embeddings=True)
    fxquant.quantize(model, weights="int8")
    fxquant.freeze(model)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    again = tiny_llama(tie_word_embeddings=True)
    fxquant.requantize(again, load_file(tmp_path / "model.safetensors"), fxquant.quantization_map(model))
    assert torch.equal(logits(again), logits(model))


def test_b6_requantize_names_missing_and_unexpected_keys_and_empty_maps() -> None:
    # All keys are compared before the model is touched.
    module = linear(8, 4)
    found = fxquant.quantization_map(module)
    state = module.state_dict()
    with pytest.raises(StateDictMismatch, match="missing: 'weight_scale'"):
        fxquant.requantize(nn.Linear(8, 4), {k: v for k, v in state.items() if k != "weight_scale"}, found)
    with pytest.raises(StateDictMismatch, match="unexpected: 'extra'"):
        fxquant.requantize(nn.Linear(8, 4), {**state, "extra": torch.ones(1)}, found)
    with pytest.raises(InvalidQuantizationMap, match="it is empty"):
        fxquant.requantize(nn.Linear(8, 4), state, {})


@pytest.mark.parametrize("weights", ALL_FORMATS)
def test_b7_frozen_models_are_copied_and_pickled(weights: str) -> None:
    # There is no tensor subclass in a module: buffers are copied and pickled as torch does it.
    model = nn.Sequential(linear(64, 32, weights=weights))
    x = torch.randn(3, 64)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))


def test_b8_shared_and_root_modules_are_quantized() -> None:
    # A module becomes quantized by a change of its class: whoever holds it holds the quantized one.
    shared = nn.Linear(16, 16)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    fxquant.quantize(model, weights="int8")
    fxquant.freeze(model)
    assert model[0] is model[2]
    assert model(torch.randn(2, 16)).shape == (2, 16)
    root = linear(16, 4)
    assert root(torch.randn(2, 16)).shape == (2, 4)
    assert "" not in dict(root.named_children())


def test_b9_activations_without_weights_are_refused_before_any_change() -> None:
    # A spec with activations and no weights cannot be made for a linear.
    module = nn.Linear(8, 4)
    with pytest.raises(FxQuantError, match="quantized activations need quantized weights"):
        fxquant.quantize(module, activations="int8")
    assert type(module) is nn.Linear
    fxquant.quantize(module)  # neither side said: the default preset, both
    assert fxquant.quantization_map(module)[""]["weights"] == "int8/channel"
    assert module(torch.randn(1, 8)).shape == (1, 4)


def test_b10_quantizing_a_frozen_model_anew_is_refused_and_its_map_stays_true() -> None:
    # Codes know their own format, and quantize compares before it changes any module.
    module = linear(64, 8, weights="int4")
    before = fxquant.quantization_map(module)
    with pytest.raises(AlreadyFrozen):
        fxquant.quantize(module, weights="int8")
    assert fxquant.quantization_map(module) == before
    again = nn.Linear(64, 8)
    fxquant.requantize(again, module.state_dict(), before)
    assert torch.equal(again(torch.eye(64)), module(torch.eye(64)))


@pytest.mark.parametrize(("momentum", "wanted"), [(0.0, 4.0), (0.5, 3.0), (0.9, 2.2)])
def test_b11_calibration_takes_the_momentum_and_survives_a_reload(momentum: float, wanted: float) -> None:
    # Ranges are recorded by the modules themselves; nothing is decided by the type of a tensor, and scales are saved.
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    fxquant.quantize(model, weights="int8", activations="int8")
    fxquant.freeze(model)
    with fxquant.Calibration(momentum=momentum) as calibration, torch.no_grad():
        model(torch.full((1, 4), 2.0))
        model(torch.full((1, 4), 4.0))
    assert calibration is not None
    first: Any = model[0]
    torch.testing.assert_close(first.input_scale, torch.tensor(wanted / 127))
    assert all(module.input_scale is not None for module in (model[0], model[2]))
    again = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    fxquant.requantize(again, model.state_dict(), fxquant.quantization_map(model))
    x = torch.randn(5, 4)
    assert torch.equal(again(x), model(x))


def test_b11_a_range_of_one_is_an_ordinary_value_and_zeros_give_a_scale() -> None:
    # An absent scale is None, not a number that data may have.
    module = linear(4, 4, activations="int8")
    with fxquant.Calibration(momentum=0.5), torch.no_grad():
        module(torch.full((1, 4), 127.0))
        module(torch.full((1, 4), 381.0))
    torch.testing.assert_close(module.input_scale, torch.tensor(2.0))
    with fxquant.Calibration(), torch.no_grad():
        module(torch.zeros(1, 4))
    assert module.input_scale > 0
    assert torch.isfinite(module(torch.randn(2, 4))).all()


def test_b12_outputs_are_plain_tensors_that_every_op_takes() -> None:
    # Between modules only float tensors travel.
    module = linear(8, 6, activations="int8")
    with fxquant.Calibration(), torch.no_grad():
        module(torch.randn(4, 8))
    y = module(torch.randn(4, 8))
    assert type(y) is Tensor
    assert [part.shape[-1] for part in y.split([1, 2, 3], -1)] == [1, 2, 3]
    assert torch.stack([y, y * 2]).shape == (2, 4, 6)
    assert torch.where(y > 0, y, -y).min() >= 0
    lowest = torch.tensor([[-127.0]])
    scale = torch.ones(())
    assert torch.ops.fxquant.fake_quantize_static(lowest * 2, scale, "int8/tensor").item() == -127  # never -128


def test_b13_a_state_dict_is_cut_into_files_by_whoever_saves_it(tmp_path: Path) -> None:
    # State dict and map are ordinary dicts: shards are joined before requantize, in any order.
    model = tiny_llama()
    fxquant.quantize(model, weights="int4")
    fxquant.freeze(model)
    state = model.state_dict()
    keys = list(state)
    for number in range(3):
        save_file({key: state[key] for key in keys[number::3]}, tmp_path / f"{number}.safetensors")
    shards = [load_file(tmp_path / f"{number}.safetensors") for number in (2, 0, 1)]
    assert all(shards)
    again = tiny_llama()
    fxquant.requantize(again, {k: v for shard in shards for k, v in shard.items()}, fxquant.quantization_map(model))
    assert torch.equal(logits(again), logits(model))


def test_b14_codes_never_load_as_random_weights(tmp_path: Path) -> None:
    # A frozen weight has no key that a float module has, so torch's own loading reports each as missing.
    module = linear(8, 4)
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "weight"'):
        nn.Linear(8, 4).load_state_dict(module.state_dict())
    with pytest.raises(RuntimeError, match="float, but the module is frozen"):
        module.load_state_dict(nn.Linear(8, 4).state_dict())


@pytest.mark.parametrize("weights", ALL_FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", ["zero", "tiny", "huge"])
def test_b15_zero_rows_and_half_precision_extremes_stay_finite_and_right(
    weights: str, dtype: torch.dtype, size: str
) -> None:
    # Scales are computed and kept in float32 (bfloat16 for groups), and a scale of 0 is never divided by.
    magnitude = {"zero": 0.0, "tiny": 1e-6, "huge": 4e4}[size]
    torch.manual_seed(0)
    module: Any = nn.Linear(128, 4, bias=False).to(dtype)
    with torch.no_grad():
        module.weight.copy_((torch.rand(4, 128) * 2 - 1) * magnitude)
        module.weight[2] = 0
    before = module.weight.detach().double()
    fxquant.quantize(module, weights=weights)
    fxquant.freeze(module)
    got = module.quantized_weight().dequantize().double()
    assert torch.isfinite(got).all()
    assert torch.equal(got[2], torch.zeros(128, dtype=torch.float64))
    assert (got - before).norm() <= {"int2": 0.7}.get(weights, 0.2) * before.norm()
    assert torch.isfinite(module(torch.randn(3, 128, dtype=dtype) * 1e-3)).all()


def test_b15_small_scales_of_both_sides_do_not_meet_in_half_precision() -> None:
    # Both scales are multiplied into the float32 sum; their product is never rounded to the model's dtype.
    torch.manual_seed(0)
    module: Any = nn.Linear(256, 64, bias=False)
    x = torch.randn(32, 256) * 0.05
    with torch.no_grad():
        module.weight.normal_(0, 0.001)
    wanted = x.double() @ module.weight.detach().double().t()
    module.half()
    fxquant.quantize(module, weights="int8", activations="int8/tensor")
    fxquant.freeze(module)
    with fxquant.Calibration(), torch.no_grad():
        module(x.half())
    got = module(x.half()).double()
    assert (got - wanted).norm() < 0.03 * wanted.norm()  # Quanto: 0.288


@pytest.mark.parametrize("weights", ["int4", "int2"])
def test_b16_saving_decoding_and_backward_take_no_longer_than_a_product(weights: str) -> None:
    # Layouts are permuted in O(n) and decoded by the row; nothing is multiplied by an identity matrix.
    module = linear(1024, 1024, weights=weights, dtype=torch.bfloat16)
    x = torch.randn(64, 1024, dtype=torch.bfloat16, requires_grad=True)
    module(x).sum().backward()

    def backward() -> None:
        module(x).sum().backward()

    with torch.no_grad():
        identity = torch.eye(1024)
        product = _seconds(lambda: identity @ identity)
    for work in (module.state_dict, module.quantized_weight().dequantize, backward):
        assert _seconds(work) < 10 * product + 0.05


def _seconds(work: Any) -> float:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


@pytest.mark.parametrize("weights", ALL_FORMATS)
def test_b17_frozen_weights_take_no_gradient_and_are_counted_as_they_are(weights: str) -> None:
    # Codes are buffers, not parameters, and memory_footprint counts the bytes of what is held.
    model = nn.Sequential(nn.Linear(512, 1024, bias=False))
    before = fxquant.memory_footprint(model)
    fxquant.quantize(model, weights=weights)
    fxquant.freeze(model)
    assert before == 4 * 512 * 1024
    assert list(model.parameters()) == []
    assert not any(buffer.requires_grad for buffer in model.buffers())
    bits = {"int4": 4, "int2": 2}.get(weights, 8)
    assert bits / 32 <= fxquant.memory_footprint(model) / before < (bits + 0.5) / 32
    x = torch.randn(2, 512, requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None
    assert all(buffer.grad is None for buffer in model.buffers())
