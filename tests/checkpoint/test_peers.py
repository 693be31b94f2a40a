"""Folders that optimum-quanto and torchao wrote, read: the same weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fxquant
from fxquant.errors import InvalidCheckpoint, InvalidQuantizationMap
from tests.checkpoint import torchao_peer
from tests.model.quanto_models import CASES, build

QUANTO_PEER = Path(__file__).parents[1] / "model" / "quanto_peer.py"
FROZEN = [name for name, case in CASES.items() if case.frozen]
TORCHAO = ["int8wo", "int8wo-bf16", "int8wo-group", "int8wo-tensor", "int8dq", "intx4", "intx4-asym", "intx3", "fp8wo"]
TORCHAO += ["fp8wo-tensor", "int4", "fp8dq", "sharded"]


def run(*command: object) -> None:
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def quanto(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("quanto") / "made.pt"
    run(QUANTO_PEER, "make", out)
    return torch.load(out, weights_only=True)


@pytest.fixture(scope="module")
def torchao(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("torchao")
    run("-W", "ignore", torchao_peer.__file__, out)
    return out


def folder_of(made: dict[str, Any], folder: Path) -> Path:
    """As Quanto's save_pretrained lays it out."""
    folder.mkdir()
    save_file({key: tensor.clone().contiguous() for key, tensor in made["state"].items()}, folder / "model.safetensors")
    (folder / "quanto_qmap.json").write_text(json.dumps(made["map"], indent=4))
    return folder


@pytest.mark.parametrize("name", FROZEN)
def test_a_folder_of_quanto_gives_its_weights(name: str, quanto: dict[str, Any], tmp_path: Path) -> None:
    made = quanto[name]
    loaded = fxquant.load(folder_of(made, tmp_path / "q"), factory=lambda: build(CASES[name]))
    found = 0
    for path, weight in made["weights"].items():
        if weight is None:
            continue
        module: Any = loaded.get_submodule(path)
        assert module.compute_dtype is weight.dtype
        reference = module.float_weight(torch.float32).to(weight.dtype)
        # Quanto computes code * scale - shift in the weight's dtype: two roundings of up to the largest values.
        bound = 2 * torch.finfo(weight.dtype).eps
        torch.testing.assert_close(reference, weight, rtol=bound, atol=bound * float(weight.abs().max()))
        found += 1
    assert found


def test_a_map_of_quanto_that_lies_is_named(quanto: dict[str, Any], tmp_path: Path) -> None:
    folder = folder_of(quanto[FROZEN[0]], tmp_path / "q")
    path = next(iter(quanto[FROZEN[0]]["map"]))
    for edit, error, words in (
        ({path: 3}, InvalidCheckpoint, "no object of texts"),
        ({path: {"weights": 3}}, InvalidCheckpoint, "no object of texts"),
        (
            {path: {"weights": "qint3", "activations": "none"}, "x": {"weights": "qint8"}},
            InvalidQuantizationMap,
            "qint3",
        ),
    ):
        (folder / "quanto_qmap.json").write_text(json.dumps(edit))
        with pytest.raises(error, match=words):
            fxquant.load(folder, factory=lambda: build(CASES[FROZEN[0]]))


@pytest.mark.parametrize("name", TORCHAO)
def test_a_folder_of_torchao_gives_its_weights(name: str, torchao: Path) -> None:
    expected = torch.load(torchao / f"{name}.pt", weights_only=True)
    x, y, weights = expected["x"], expected["y"], expected["weights"]
    loaded = fxquant.load(torchao / name, factory=lambda: torchao_peer.build(torch.float32))
    for path, weight in weights.items():
        module: Any = loaded.get_submodule(path)
        assert module.is_frozen
        assert module.compute_dtype is x.dtype
        own = module.float_weight(torch.float32)
        # int4 has its zero moved from code 0 to code -8: two roundings to float32.
        torch.testing.assert_close(own.to(weight.dtype), weight, rtol=0 if name != "int4" else 1e-6, atol=1e-7)
    assert len(weights) == 2
    if y is not None:
        bound = 2e-2 if x.dtype is torch.bfloat16 or name == "int8dq" else 1e-5
        assert (loaded(x) - y).norm() <= bound * y.norm()


@pytest.mark.parametrize(("name", "activations"), [("int8dq", "int8/token"), ("fp8dq", "float8_e4m3fn/token")])
def test_its_dynamic_activations_are_quantized_so(name: str, activations: str, torchao: Path) -> None:
    loaded = fxquant.load(torchao / name, factory=lambda: torchao_peer.build(torch.float32))
    assert {fields["activations"] for fields in fxquant.quantization_map(loaded).values()} == {activations}


def test_what_was_read_of_torchao_is_saved_as_ours(torchao: Path, tmp_path: Path) -> None:
    read = fxquant.load(torchao / "intx4", factory=lambda: torchao_peer.build(torch.float32))
    fxquant.save(read, tmp_path / "q")
    again = fxquant.load(tmp_path / "q", factory=lambda: torchao_peer.build(torch.float32))
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    assert torch.equal(again(x), read(x))


def _edited(told: dict[str, Any], **fields: Any) -> str:
    return json.dumps({**told, "_data": {**told["_data"], **fields}})


def test_what_is_not_read_of_torchao_is_named(torchao: Path, tmp_path: Path) -> None:
    from safetensors import safe_open

    path = torchao / "int8wo" / "model.safetensors"
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    told = json.loads(metadata["0.weight"])
    attack = {"_type": "posix.system", "_data": "true"}
    edits = {
        "'os.system' is not read": json.dumps({**told, "_type": "os.system"}),
        "NVFP4Tensor' is not read": json.dumps({**told, "_type": "NVFP4Tensor"}),
        "no JSON": "[" * 100_000,
        "no object": "[]",
        "no _data": json.dumps({**told, "_data": 3}),
        "block_size": _edited(told, block_size="x"),
        "do not fit blocks": _edited(told, block_size=[1, 7]),
        "Int8Tensor: ": _edited(told, dtype=attack),
        "activations by": _edited(told, act_quant_kwargs={"_data": {"granularity": {"_type": "PerBlock"}}}),
        "activations with a zero point": _edited(
            told, act_quant_kwargs={"_data": {"mapping_type": {"_data": "ASYMMETRIC"}}}
        ),
    }
    (tmp_path / "q").mkdir()
    for words, text in edits.items():
        save_file(tensors, tmp_path / "q/model.safetensors", metadata={**metadata, "0.weight": text})
        with pytest.raises(InvalidCheckpoint, match=words):
            fxquant.load(tmp_path / "q", factory=lambda: torchao_peer.build(torch.float32))
    for names in ("{", "[1]", "3"):
        save_file(tensors, tmp_path / "q/model.safetensors", metadata={**metadata, "tensor_names": names})
        with pytest.raises(InvalidCheckpoint, match="tensor_names"):
            fxquant.load(tmp_path / "q", factory=lambda: torchao_peer.build(torch.float32))


def test_a_model_on_meta_takes_them_too(torchao: Path) -> None:
    with torch.device("meta"):
        model: nn.Module = torchao_peer.build(torch.float32)
    fxquant.load(torchao / "int8wo", model=model)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
