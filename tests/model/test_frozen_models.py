"""A frozen model is an ordinary module."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fxquant

RECIPES = ("int8wo", "int8dq", "int4wo", "fp8dq", "fp6_e3m2", "mxfp4", "nvfp4")


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 10)).eval()


def frozen(recipe: str) -> nn.Sequential:
    model = build()
    fxquant.quantize(model, recipe)
    fxquant.freeze(model)
    return model


X = torch.randn(6, 40, generator=torch.Generator().manual_seed(1))


def out(model: nn.Module, x: Tensor = X) -> Tensor:
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize("recipe", RECIPES)
def test_state_dicts_through_files(recipe: str, tmp_path: Path) -> None:
    model = frozen(recipe)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    for state in (torch.load(buffer, weights_only=True), load_file(tmp_path / "model.safetensors")):
        other = build()
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        fxquant.quantize(other, recipe)
        other.load_state_dict(state, strict=True)
        assert torch.equal(out(other), out(model))


@pytest.mark.parametrize("recipe", RECIPES)
def test_shared_memory_and_another_process(recipe: str) -> None:
    model = frozen(recipe)
    want = out(model)
    model.share_memory()
    assert all(t.is_shared() for t in (*model.parameters(), *model.buffers()) if t.numel())
    assert torch.equal(out(model), want)


def _answer(data: bytes, queue: Any) -> None:
    torch.set_num_threads(1)
    queue.put(out(pickle.loads(data)).numpy())


@pytest.mark.slow
def test_a_spawned_process_gives_the_same() -> None:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    model = frozen("int8dq")
    child = context.Process(target=_answer, args=(pickle.dumps(model), queue))
    child.start()
    got = torch.from_numpy(queue.get(timeout=120))
    child.join(timeout=60)
    assert child.exitcode == 0
    assert torch.equal(got, out(model))


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")  # torch.export's own
@pytest.mark.parametrize("recipe", RECIPES)
def test_functional_call_and_export(recipe: str) -> None:
    model = frozen(recipe)
    want = out(model)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        assert torch.equal(torch.func.functional_call(model, tensors, (X,)), want)
    exported = torch.export.export(model, (X,))
    with torch.no_grad():
        assert torch.equal(exported.module()(X), want)
    names = {str(node.target) for node in exported.graph.nodes if "fxquant" in str(node.target)}
    assert names


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")
@pytest.mark.parametrize("recipe", ["int8wo", "int4wo"])
def test_an_exported_program_can_be_decomposed(recipe: str) -> None:
    exported = torch.export.export(frozen(recipe), (X,)).run_decompositions()
    with torch.no_grad():
        torch.testing.assert_close(exported.module()(X), out(frozen(recipe)))


def test_moves_and_casts() -> None:
    model = frozen("int8wo")
    assert out(model.half(), X.half()).dtype is torch.float16
    assert out(model.to(torch.bfloat16), X.bfloat16()).dtype is torch.bfloat16
    torch.testing.assert_close(out(model.float()), out(frozen("int8wo")), rtol=0.02, atol=0.02)  # biases were rounded
    assert out(model.to("cpu")).dtype is torch.float32


def test_hooks_run() -> None:
    model = frozen("int8dq")
    seen: list[tuple[int, ...]] = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output.shape))
    model[3].register_forward_pre_hook(lambda module, args: (args[0] * 0,))
    got = out(model)
    assert seen == [(6, 64)]
    assert torch.equal(got, model.get_parameter("3.bias").expand(6, 10))


def test_to_empty_and_meta() -> None:
    model = copy.deepcopy(frozen("int4wo")).to("meta")
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"meta"}
    assert model(X.to("meta")).shape == (6, 10)


def _ddp(rank: int, folder: str, recipe: str, queue: Any) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = frozen(recipe)  # biases and the norm can be trained
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    x = torch.randn(4, 40, generator=torch.Generator().manual_seed(rank))
    for _ in range(2):
        optimizer.zero_grad()
        wrapped(x).square().mean().backward()
        optimizer.step()
    queue.put((rank, model.get_parameter("3.bias").detach().numpy().copy()))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["int8dq", "nvfp4"])
def test_data_parallel_with_gloo(recipe: str, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    children = [context.Process(target=_ddp, args=(rank, str(tmp_path), recipe, queue)) for rank in (0, 1)]
    for child in children:
        child.start()
    found = dict(queue.get(timeout=180) for _ in children)
    for child in children:
        child.join(timeout=60)
        assert child.exitcode == 0
    assert (found[0] == found[1]).all()
    assert (found[0] != build().get_parameter("3.bias").detach().numpy()).any()


def test_only_what_stayed_float_is_trained() -> None:
    model = frozen("int8wo").train()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"0.bias", "2.weight", "2.bias", "3.bias"}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    codes = model.state_dict()["0.weight_codes"].clone()
    before = float(out(model).square().mean())
    for _ in range(5):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    assert float(out(model).square().mean()) < before
    assert torch.equal(model.state_dict()["0.weight_codes"], codes)
