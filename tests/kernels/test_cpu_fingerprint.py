"""The fingerprint: what it notices of buffers that changed behind torch's back."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from fxquant.cpu_kernels import Library
from tests.kernels.cpu_helpers import loaded


@pytest.fixture(scope="module")
def library() -> Library:
    return loaded()


def fingerprint(library: Library, tensors: Sequence[Tensor]) -> tuple[int, list[int]]:
    n = len(tensors)
    pointers = (ctypes.c_void_p * n)(*[t.data_ptr() for t in tensors])
    nbytes = (ctypes.c_int64 * n)(*[t.nbytes for t in tensors])
    each = (ctypes.c_uint64 * n)()
    combined = library.fingerprint(pointers, nbytes, n, each)
    assert library.fingerprint(pointers, nbytes, n) == combined
    return combined, list(each)


def parameters() -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(64, 48), (3,), (1,), (257, 129), (1000,)]
    dtypes = [torch.float32, torch.float32, torch.float32, torch.bfloat16, torch.float16]
    return [torch.nn.Parameter(torch.randn(s).to(d) * 0.05) for s, d in zip(shapes, dtypes, strict=True)]


def test_same_bytes_same_fingerprint(library: Library) -> None:
    tensors = parameters()
    assert fingerprint(library, tensors) == fingerprint(library, [t.clone() for t in tensors])


@pytest.mark.parametrize("which", range(5))
def test_an_edit_through_data_is_noticed(library: Library, which: int) -> None:
    tensors = parameters()
    before, each_before = fingerprint(library, tensors)
    version = tensors[which]._version
    tensors[which].data += 1e-3
    after, each_after = fingerprint(library, tensors)
    assert tensors[which]._version == version  # torch did not count it
    assert after != before
    assert [i for i in range(5) if each_after[i] != each_before[i]] == [which]


def test_an_edit_through_numpy_is_noticed(library: Library) -> None:
    tensor = torch.randn(100, 100)
    before, _ = fingerprint(library, [tensor])
    np.multiply(tensor.numpy(), 1.01, out=tensor.numpy())
    assert fingerprint(library, [tensor])[0] != before


@pytest.mark.parametrize("nbytes", [1, 2, 7, 8, 9, 15, 16, 63, 64, 65, 1000])
@pytest.mark.parametrize("shift", [0, 1, 3])
def test_both_ends_of_any_length_at_any_address(library: Library, nbytes: int, shift: int) -> None:
    memory = torch.zeros(nbytes + shift + 1, dtype=torch.uint8)
    buffer = memory[shift : shift + nbytes]
    before, _ = fingerprint(library, [buffer])
    memory[shift + nbytes] = 1  # just past the end
    assert fingerprint(library, [buffer])[0] == before
    for position in (0, nbytes - 1):
        buffer[position] = 1
        assert fingerprint(library, [buffer])[0] != before
        buffer[position] = 0


def test_order_length_and_number_count(library: Library) -> None:
    a, b = torch.randn(40), torch.randn(40)
    zeros = torch.zeros(100)
    distinct = [[a, b], [b, a], [a], [], [zeros], [zeros[:50]], [zeros[:0]], [zeros[:0], zeros[:0]]]
    assert len({fingerprint(library, tensors)[0] for tensors in distinct}) == len(distinct)
