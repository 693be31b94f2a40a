"""A model that was saved and loaded computes the same, bit for bit."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import fxquant
from fxquant.errors import (
    BuffersOnMeta,
    InvalidOption,
    NotAModule,
    NothingQuantized,
    NotStorable,
    StateDictMismatch,
)
from tests.checkpoint.folders import IDS, answer, contents, small, small_float
from tests.models import Decoder

PRESETS = ["int8wo", "int8dq", "int4wo", "int4wo-g32", "int4dq", "fp8wo", "fp8dq", "mxfp4", "nvfp4", "fp6_e3m2"]


@pytest.mark.parametrize("config", [c for c in PRESETS if c in fxquant.PRESETS])
@pytest.mark.parametrize("tables", [None, "int8"], ids=["float table", "int8 table"])
def test_every_preset_comes_back_bit_equal(config: str, tables: str | None, tmp_path: Path) -> None:
    model = small(config, embeddings=tables)
    fxquant.save(model, tmp_path / "q")
    loaded = fxquant.load(tmp_path / "q", factory=Decoder)
    assert torch.equal(answer(loaded), answer(model))
    assert fxquant.quantization_map(loaded) == fxquant.quantization_map(model)
    assert fxquant.memory_footprint(loaded) == fxquant.memory_footprint(model)
    assert not any(t.is_meta for t in (*loaded.parameters(), *loaded.buffers()))


@pytest.mark.parametrize("config", ["int8dq", "int4wo"])
def test_compiled_it_is_bit_equal_too(config: str, tmp_path: Path) -> None:
    model = small(config)
    fxquant.save(model, tmp_path / "q")
    loaded = fxquant.load(tmp_path / "q", factory=Decoder)
    before, after = (fxquant.compile(m, executor="eager") for m in (model, loaded))
    assert torch.equal(answer(after), answer(before))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")  # at the import of torch._inductor
@pytest.mark.parametrize("config", ["int8dq", "int4wo", "int8"])
def test_compiled_by_inductor_it_is_bit_equal(config: str, tmp_path: Path) -> None:
    model = small(config) if config != "int8" else calibrated()
    fxquant.save(model, tmp_path / "q")
    loaded = fxquant.load(tmp_path / "q", factory=Decoder)
    before, after = (fxquant.compile(m) for m in (model, loaded))
    assert torch.equal(answer(after), answer(before))


def calibrated() -> Decoder:
    torch.manual_seed(0)
    model = Decoder()
    fxquant.quantize(model, weights="int8", activations="int8")
    with fxquant.Calibration(), torch.no_grad():
        model(IDS)
    fxquant.freeze(model)
    return model.eval()


def test_calibrated_ranges_come_back(tmp_path: Path) -> None:
    model = calibrated()
    assert model.lm_head.input_scale is not None
    fxquant.save(model, tmp_path / "q")
    loaded = fxquant.load(tmp_path / "q", factory=Decoder)
    assert torch.equal(answer(loaded), answer(model))
    assert torch.equal(loaded.lm_head.input_scale, model.lm_head.input_scale)  # type: ignore[union-attr,arg-type]
    dynamic = fxquant.load(tmp_path / "q", factory=Decoder)
    dynamic.lm_head.input_scale = None  # type: ignore[union-attr]
    assert not torch.equal(answer(dynamic), answer(model))


def test_a_model_that_is_not_frozen_comes_back_as_it_was(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Decoder()
    fxquant.quantize(model, "int8dq")
    fxquant.save(model, tmp_path / "q")
    loaded = fxquant.load(tmp_path / "q", factory=Decoder)
    assert not loaded.lm_head.is_frozen  # type: ignore[union-attr]
    assert torch.equal(answer(loaded), answer(model))


def test_a_model_in_bfloat16_comes_back_so_into_a_float32_one(tmp_path: Path) -> None:
    model = small().to(torch.bfloat16)
    fxquant.save(model, tmp_path / "q")
    for loaded in (
        fxquant.load(tmp_path / "q", factory=Decoder),
        fxquant.load(tmp_path / "q", model=small_float()).eval(),
    ):
        assert answer(loaded).dtype is torch.bfloat16
        assert torch.equal(answer(loaded), answer(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_compute_dtype_is_that_of_the_model_cast(dtype: torch.dtype, tmp_path: Path) -> None:
    model = small("int4wo")
    fxquant.save(model, tmp_path / "q")
    loaded: Any = fxquant.load(tmp_path / "q", factory=Decoder, dtype=dtype)
    assert torch.equal(answer(loaded), answer(model.to(dtype)))
    assert loaded.norm.weight.dtype is dtype


def test_shards_and_index_are_those_of_hugging_face(tmp_path: Path) -> None:
    model = small("int4wo")
    fxquant.save(model, tmp_path / "q", max_shard_size="20KB")
    index = json.loads((tmp_path / "q/model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "q").glob("*.safetensors"))
    assert len(files) > 2
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    read: dict[str, Tensor] = {}
    for name in files:
        read |= (own := load_file(tmp_path / "q" / name))
        assert {index["weight_map"][key] for key in own} == {name}
    state = model.state_dict()
    assert read.keys() == state.keys() == index["weight_map"].keys()
    assert all(torch.equal(read[key], state[key]) and read[key].dtype == state[key].dtype for key in state)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in state.values())
    assert torch.equal(answer(fxquant.load(tmp_path / "q", factory=Decoder)), answer(model))


def test_fewer_shards_leave_none_of_the_old_and_other_files_stay(tmp_path: Path) -> None:
    folder = tmp_path / "q"
    fxquant.save(small(), folder, max_shard_size="20KB")
    (folder / "config.json").write_text("{}")
    (folder / "sub").mkdir()
    (folder / "sub/tokens.txt").write_text("a")
    fxquant.save(small("int4wo"), folder)
    assert set(contents(folder)) == {"config.json", "sub/tokens.txt", "fxquant.json", "model.safetensors"}
    assert (folder / "sub/tokens.txt").read_text() == "a"
    assert [path.name for path in tmp_path.iterdir()] == ["q"]


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in "ab":
        fxquant.save(small(), tmp_path / name)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_saving_what_was_loaded_gives_the_same_bytes(tmp_path: Path) -> None:
    fxquant.save(small("int4wo"), tmp_path / "a")
    fxquant.save(fxquant.load(tmp_path / "a", factory=Decoder), tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(96, 64)
        self.head = nn.Linear(64, 96, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.LayerNorm(64)
        self.again = self.norm
        self.twice = nn.Linear(64, 64)
        self.same = self.twice

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.same(self.again(self.twice(self.norm(self.embed(ids))))))


@pytest.mark.parametrize("exclude", [None, "head"], ids=["tied codes", "tied floats"])
def test_tied_and_shared_tensors_are_stored_once_and_stay_so(exclude: str | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Tied()
    fxquant.quantize(model, "int8dq", exclude=exclude)
    fxquant.freeze(model)
    fxquant.save(model, tmp_path / "q")
    stored = load_file(tmp_path / "q/model.safetensors")
    assert not any(key.startswith(("again", "same")) for key in stored)
    assert sum(tensor.numel() == 96 * 64 for tensor in stored.values()) == 1
    loaded = fxquant.load(tmp_path / "q", factory=Tied)
    ids = IDS % 96
    assert torch.equal(loaded(ids), model(ids))
    assert fxquant.memory_footprint(loaded) == fxquant.memory_footprint(model)


class Rotary(nn.Module):
    """Buffers that no state dict holds, made by the constructor."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 64)
        self.register_buffer("angles", 1.0 / torch.arange(1, 65, device=None).float(), persistent=False)
        self.register_buffer("mean", torch.full((64,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x) * self.angles + self.mean


def test_buffers_that_no_file_holds_are_made_by_the_factory(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = Rotary()
    model.mean += 1
    fxquant.quantize(model, "int8wo")
    fxquant.freeze(model)
    model.to(torch.bfloat16)  # which rounds the angles too
    fxquant.save(model, tmp_path / "q")
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    loaded = fxquant.load(tmp_path / "q", factory=Rotary)
    assert loaded.angles.dtype is torch.bfloat16
    assert torch.equal(loaded(x), model(x))
    with torch.device("meta"):
        empty = Rotary()
    with pytest.raises(BuffersOnMeta, match="angles"):
        fxquant.load(tmp_path / "q", model=empty)
    with pytest.raises(BuffersOnMeta):  # and nothing has been changed
        fxquant.load(tmp_path / "q", model=empty)
    assert empty.up.weight.dtype is torch.float32


def test_what_torch_compile_wraps_is_saved_as_it_is(tmp_path: Path) -> None:
    model = small()
    fxquant.save(torch.compile(model, backend="eager"), tmp_path / "q")  # type: ignore[arg-type]
    assert torch.equal(answer(fxquant.load(tmp_path / "q", factory=Decoder)), answer(model))


def test_every_missing_and_unexpected_key_is_in_the_error_and_the_model_unchanged(tmp_path: Path) -> None:
    fxquant.save(small(), tmp_path / "q")
    other = Decoder(layers=2)
    other.extra = nn.Linear(3, 3)
    del other.norm
    before = {key: (tensor.clone(), tensor.dtype) for key, tensor in other.state_dict().items()}
    with pytest.raises(StateDictMismatch) as caught:
        fxquant.load(tmp_path / "q", model=other, dtype=torch.bfloat16)
    assert set(caught.value.missing) == {"extra.weight", "extra.bias"}
    assert set(caught.value.unexpected) == {"norm.weight"}
    after = other.state_dict()
    assert all(torch.equal(after[key], tensor) and after[key].dtype is dtype for key, (tensor, dtype) in before.items())
    assert not any(isinstance(module, fxquant.QModule) for module in other.modules())


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(NothingQuantized, match="quantize"):
        fxquant.save(Decoder(), tmp_path / "q")
    with pytest.raises(NotAModule):
        fxquant.save(torch.sin, tmp_path / "q")  # type: ignore[arg-type]
    with pytest.raises(InvalidOption, match="5GB"):
        fxquant.save(small(), tmp_path / "q", max_shard_size="5 parsecs")
    assert not list(tmp_path.iterdir())
    fxquant.save(small(), tmp_path / "q")
    for arguments in ({}, {"model": Decoder(), "factory": Decoder}):
        with pytest.raises(InvalidOption, match="one of"):
            fxquant.load(tmp_path / "q", **arguments)
    with pytest.raises(InvalidOption, match="float32"):
        fxquant.load(tmp_path / "q", factory=Decoder, dtype=torch.int8)
    with pytest.raises(NotAModule):
        fxquant.load(tmp_path / "q", factory=lambda: 3)  # type: ignore[arg-type,return-value]


def test_what_safetensors_cannot_hold_is_named(tmp_path: Path) -> None:
    model = small()
    model.register_buffer("odd", torch.ones(2, dtype=torch.complex128))
    with pytest.raises(NotStorable, match=r"odd.*complex128"):
        fxquant.save(model, tmp_path / "q")
    model.odd = torch.ones(3).to_sparse()
    with warnings.catch_warnings(), pytest.raises(NotStorable, match=r"odd.*sparse"):
        fxquant.save(model, tmp_path / "q")
    assert not list(tmp_path.iterdir())


def test_an_extra_state_is_named(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"a": 1}

        def set_extra_state(self, state: object) -> None: ...

    model = small()
    model.extra = Extra(2, 2)
    with pytest.raises(NotStorable, match="_extra_state"):
        fxquant.save(model, tmp_path / "q")


def test_a_state_dict_of_a_modules_own_way_is_saved(tmp_path: Path) -> None:
    def rename(module: nn.Module, state: dict[str, Tensor], prefix: str, _: object) -> None:
        state[f"{prefix}scale"] = state.pop(f"{prefix}weight")

    model = small()
    model.norm._register_state_dict_hook(rename)
    fxquant.save(model, tmp_path / "q")
    assert torch.equal(load_file(tmp_path / "q/model.safetensors")["norm.scale"], model.norm.weight)
