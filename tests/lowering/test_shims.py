"""The ops as C functions that Inductor's C++ calls: the bits of the ops, and the words of their errors."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

import fxquant
from fxquant import cpu_kernels
from fxquant.lowering.shims import shim_declarations

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated"),  # at the import of torch._inductor
]

SOURCES = Path(cpu_kernels.__file__).parent / "csrc"


class Attending(nn.Module):
    """Every kind of argument: an embedding, norms and residuals around products, attention with a mask and a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 64)
        self.norm = nn.RMSNorm(64)
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64, bias=False)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embedding(ids)
        q, k, v = (part.unflatten(-1, (4, 16)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3)
        return x + self.out(y.transpose(1, 2).flatten(2))


RECIPES = {
    "int8_linear_dynamic": {"preset": "int8dq", "embeddings": "int8"},
    "int8_linear_weight_only": {"preset": "int8wo", "embeddings": "int4/group32"},
    "linear_dynamic": {"preset": "int4dq"},
    "linear_weight_only": {"preset": "int4wo"},
}


@pytest.mark.parametrize("op", RECIPES)
@torch.no_grad()
def test_the_bits_of_the_ops(op: str) -> None:
    torch.manual_seed(0)
    model, ids = Attending().eval(), torch.randint(0, 50, (2, 9))
    mask = torch.rand(2, 1, 9, 9) > 0.3
    mask[..., 0] = True
    fast = fxquant.compile(model, RECIPES[op], wrapper="cpp")
    got, (code, *_) = run_and_get_code(fast, ids, mask)
    for called in (op, "attention"):
        assert f"aoti_torch_cpu_{called}(" in code
    assert "callBoxed" not in code
    torch._dynamo.reset()
    assert torch.equal(got, fxquant.compile(model, RECIPES[op])(ids, mask))


@torch.no_grad()
def test_the_words_of_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph says that the codes are of 64 features; the tensor that it is given has fewer."""
    model = nn.Sequential(nn.Linear(64, 32, bias=False)).eval()
    fast = fxquant.compile(model, "int8dq", wrapper="cpp")
    fast(torch.randn(2, 64))
    bound = next(iter(fast._backend._runners[0]._sets.values()))
    monkeypatch.setattr(bound, "_packed", tuple(t[:-64] if t.dtype == torch.int8 else t for t in bound._packed))
    with pytest.raises(RuntimeError, match="fxquant::int8_linear_dynamic: "):
        fast(torch.randn(2, 64))


def test_every_declaration_has_its_definition() -> None:
    sources = "".join(path.read_text() for path in SOURCES.glob("*.cpp"))
    for overload, (declaration,) in shim_declarations().items():
        name = overload._schema.name.removeprefix("fxquant::")
        assert f"FXQUANT_SHIM({name})" in sources
        assert f"aoti_torch_cpu_{name})" in declaration
        assert declaration.count(",") == len(overload._schema.arguments)
    assert sources.count("FXQUANT_SHIM(") == len(shim_declarations())


def test_inductor_may_copy_and_hash_them() -> None:
    shims = shim_declarations()
    assert copy.deepcopy(shims) == shims
    assert pickle.dumps(shims) == pickle.dumps(copy.copy(shims))
    assert pickle.loads(pickle.dumps(shims)) == shims
