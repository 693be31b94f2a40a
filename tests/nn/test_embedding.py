"""Embeddings of the model door: rows of the rounded table, bit for bit, and torch's gradients to the table."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.nn import QEmbedding, QModule
from fxquant.ops import reference
from tests.kernels.cpu_helpers import assert_equal
from tests.nn.kinds import DTYPES, EMBEDDINGS, FORMATS, quantized, with_rounded_weight

BY_TABLE = ("int8/tensor", "fp4_e2m1/group16/e4m3", "float8_e4m3fn/block16x32", "int8/channel-1")
ALGORITHMS = ("mse", "hqq")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", [*FORMATS, *BY_TABLE])
def test_rows_of_the_rounded_table(spec: str, dtype: torch.dtype) -> None:
    kind = EMBEDDINGS["embedding"]
    module, indices = kind.module(dtype), kind.input()
    want = with_rounded_weight(module, spec, dtype)(indices)
    q = quantized(module, f"w={spec}")
    for _ in range(2):
        assert_equal(q(indices), want)
        assert_equal(q(input=indices.int()), want)
        assert q(indices[:0]).shape == (0, 6, 70)
        assert not q(torch.tensor(2)).any()  # the padding row stays 0
        q.freeze()
    assert q.is_frozen
    assert "weight" not in dict(q.named_parameters())


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("spec", ["int8/channel", "int4/group16/affine/bf16", "fp4_e2m1/group32/e8m0"])
def test_searched_codes_of_a_row_do_not_depend_on_others(spec: str, algorithm: str) -> None:
    kind = EMBEDDINGS["embedding"]
    q = quantized(kind.module(), f"w={spec} algorithm={algorithm}", algorithm=algorithm)
    assert q.quantization.algorithm == algorithm
    some = torch.tensor([3, 29, 3])
    unfrozen = q(some)
    q.freeze()
    assert_equal(q(some), unfrozen)


def test_only_looked_up_rows_are_rounded() -> None:
    kind = EMBEDDINGS["embedding"]
    q = quantized(kind.module(), "w=int4/group32")
    with torch.profiler.profile(record_shapes=True) as profile:
        q(torch.tensor([[1, 7]]))
    rounded = [event for event in profile.events() or () if event.name == "fxquant::fake_quantize_weight"]
    assert [event.input_shapes[0] for event in rounded] == [[2, 70]]


@pytest.mark.parametrize("spec", ["int8/channel", "int8/tensor"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding_idx": 3},
        {"padding_idx": -1},
        {"sparse": True},
        {"scale_grad_by_freq": True},
        {"padding_idx": 0, "sparse": True},
    ],
    ids=str,
)
def test_the_gradient_goes_straight_to_the_table(spec: str, options: dict[str, object]) -> None:
    torch.manual_seed(0)
    module = nn.Embedding(9, 16, **options)  # pyright: ignore[reportArgumentType]
    plain, indices = copy.deepcopy(module), torch.tensor([[3, 0, 3], [8, 1, 3]])
    grad = torch.randn(2, 3, 16)
    plain(indices).backward(grad)
    q = quantized(module, f"w={spec}")
    q(indices).backward(grad)
    got, want = q.weight.grad, plain.weight.grad
    assert want is not None
    assert got.is_sparse == want.is_sparse
    assert_equal(got.to_dense(), want.to_dense())


def test_an_optimizer_of_sparse_gradients_trains_it() -> None:
    kind = EMBEDDINGS["embedding-sparse"]
    q = quantized(kind.module(), "w=int4/group8")
    before = q.weight.detach().clone()
    optimizer = torch.optim.SparseAdam(list(q.parameters()), lr=0.1)
    q(torch.tensor([1, 4])).sum().backward()
    optimizer.step()
    changed = (q.weight != before).any(1).nonzero().flatten().tolist()
    assert changed == [1, 4]


def test_max_norm_keeps_it_float() -> None:
    model = nn.ModuleDict({"e": nn.Embedding(9, 16, max_norm=1.0)})
    report = fxquant.quantize(model, "int8wo", embeddings="int8")
    assert type(model["e"]) is nn.Embedding
    assert "rescaled in place as they are read (max_norm=1.0)" in report.rows[0].reason


def test_an_embedding_bag_stays_float_and_is_named() -> None:
    model = nn.ModuleDict({"bag": nn.EmbeddingBag(9, 16), "fc": nn.Linear(16, 4)})
    report = fxquant.quantize(model, "int8wo", embeddings="int8")
    assert type(model["bag"]) is nn.EmbeddingBag
    (row,) = report.skipped
    assert row.paths == ("bag",)
    assert row.reason


def test_embeddings_stay_float_unless_asked_for() -> None:
    model = nn.ModuleDict({"e": nn.Embedding(9, 16), "fc": nn.Linear(16, 4)})
    report = fxquant.quantize(model, "int8dq")
    assert type(model["e"]) is nn.Embedding
    assert report.skipped[0].reason.startswith("embeddings stay float by default")
    fxquant.quantize(model, "int8dq", rules={"e": "int4wo"})
    assert isinstance(model["e"], QEmbedding)
    assert str(model["e"].quantization) == "w=int4/group128/affine/bf16"


def test_a_frozen_table_takes_the_bytes_of_its_format() -> None:
    module = nn.Embedding(1000, 64)
    q = quantized(module, "w=int4/group64")
    fxquant.freeze(q)
    codes, scales = 1000 * 32, 1000 * 4
    assert fxquant.memory_footprint(q) == codes + scales


@pytest.mark.parametrize("index", [-1, 30])
def test_an_index_outside_of_the_table_is_an_index_error(index: int) -> None:
    q = quantized(EMBEDDINGS["embedding"].module(), "w=int8/channel")
    for _ in range(2):
        with pytest.raises(IndexError):
            q(torch.tensor([index]))
        q.freeze()


class Tied(nn.Module):
    """An embedding and a linear that share one weight [V, D]."""

    def __init__(self, vocabulary: int = 67, width: int = 70) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.table.weight

    def forward(self, indices: Tensor) -> Tensor:
        return self.head(self.table(indices))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", [*FORMATS, *BY_TABLE])
def test_a_tied_table_is_read_from_the_linears_codes(spec: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Tied().to(dtype)
    codes, scale, zero_point, whole = reference.quantize_weight(model.table.weight.detach(), spec)
    tensors = (zero_point if zero_point.numel() else None, spec, dtype, whole if whole.numel() else None)
    want = reference.dequantize(codes, scale, *tensors)
    fxquant.quantize(model, f"w={spec}")
    table = model.table
    assert isinstance(table, QModule)
    indices = torch.tensor([[0, 66], [5, 5]])
    unfrozen = model.table(indices)
    assert_equal(unfrozen, want[indices])
    fxquant.freeze(model)
    assert_equal(model.table(indices), want[indices])
    assert table._owner == (model.head,)
    assert not table._forms
    assert not [t for name, t in table.named_buffers() if name != "compute_like"]
    assert_equal(model.table.weight, want)
