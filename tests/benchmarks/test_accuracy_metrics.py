"""The accuracy tables' metrics, controls and tasks: known answers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from benchmarks.accuracy import control, dit, efficientnet, minilm
from benchmarks.accuracy.metrics import agreement, psnr, sqnr


def test_sqnr_of_a_known_pair() -> None:
    want = torch.tensor([3.0, 4.0])
    assert sqnr(torch.tensor([3.0, 3.0]), want) == pytest.approx(10 * math.log10(25))
    assert sqnr(want, want) == math.inf
    assert math.isnan(sqnr(torch.tensor([3.0, math.nan]), want))


def test_agreement_counts_rows_with_the_same_best_class_and_none_that_is_not_finite() -> None:
    want = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    got = torch.tensor([[0.2, 0.3], [0.4, 0.5], [math.nan, 0.0], [0.0, math.inf]])
    assert agreement(got, want) == 0.25


def test_psnr_is_the_mean_of_the_images_figures() -> None:
    want = torch.zeros(2, 1, 2, 2)
    got = want.clone()
    got[0] += 0.2  # mean error .04 of a peak 2: 20 dB
    got[1] += 0.02  # 40 dB
    assert psnr(got, want, 2.0) == pytest.approx(30, abs=1e-4)


@pytest.mark.parametrize(
    ("quantize", "want"),
    [
        (control.symmetric(4), [[7.0, -7.0, 3.0, 0.0, 2.0]]),
        # Groups of two: 6.8 and -7, then 3.2 and 0.4, then a lone 2.
        (control.symmetric(4, 2), [[7.0, -7.0, 3.2, 3.2 / 7, 2.0]]),
        (control.float8, [[7.0, -7.0, 3.25, 0.40625, 2.0]]),
    ],
)
def test_plain_rounding_of_a_known_row(quantize: control.Quantizer, want: list[list[float]]) -> None:
    row = torch.tensor([[6.8, -7.0, 3.2, 0.4, 2.0]])
    assert torch.allclose(quantize(row), torch.tensor(want), rtol=1e-6)


def test_plain_affine_rounding_keeps_zero_and_both_ends_of_the_range() -> None:
    row = torch.tensor([[-1.0, 0.0, 14.0, 6.4], [2.0, 4.0, 15.0, 0.6]])
    assert control.affine(4, 4)(row).tolist() == [[-1.0, 0.0, 14.0, 6.0], [2.0, 4.0, 15.0, 1.0]]


def test_a_row_of_zeros_stays_zeros() -> None:
    zeros = torch.zeros(2, 5)
    for quantize in (control.symmetric(8), control.symmetric(4, 2), control.affine(4, 2), control.float8):
        assert torch.equal(quantize(zeros), zeros)


def test_the_rounded_copy_has_rounded_weights_and_the_model_is_as_it_was() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 2), torch.nn.Linear(4, 3)).requires_grad_(False)
    before = [parameter.clone() for parameter in model.parameters()]
    twin = control.rounded(model, lambda weight: weight.round())
    assert all(map(torch.equal, model.parameters(), before))
    assert torch.equal(twin[0].weight, before[0].round())  # pyright: ignore[reportIndexIssue]
    assert torch.equal(twin[0].bias, before[1])  # pyright: ignore[reportIndexIssue]


def test_sentences_come_back_in_their_order_whatever_their_length() -> None:
    """The stand-in tells each sentence's first id, its length, and the shape that it came in."""
    lengths = torch.tensor([3, 1, 4, 2, 2])
    mask = (torch.arange(4) < lengths[:, None]).long()
    ids = torch.arange(10, 15)[:, None] * mask
    shapes = set()

    def model(ids: Tensor, mask: Tensor) -> Tensor:
        shapes.add(tuple(ids.shape))
        return torch.stack([ids[:, 0], mask.sum(1)], 1)

    vectors = minilm.embed(model, ids, mask, lengths=(2, 4), rows=2)
    assert vectors.tolist() == [[10, 3], [11, 1], [12, 4], [13, 2], [14, 2]]
    assert shapes == {(2, 2), (2, 4)}


def test_crops_are_twenty_different_squares_within_the_photo() -> None:
    photo = torch.arange(3 * 427 * 640).remainder(251).reshape(3, 427, 640).float()
    found = efficientnet.crops(photo)
    assert found.shape == (20, 3, 224, 224)
    assert torch.equal(found[0], photo[:, :224, :224])
    assert torch.equal(found[3], photo[:, -224:, -224:])
    assert len({one.numpy().tobytes() for one in found}) == 20
    assert efficientnet.prepared(torch.tensor([127.0, 255.0])).tolist() == [0.0, 1.0]


def test_the_sampler_follows_a_straight_flow_exactly() -> None:
    """Towards one point per class the velocity is (x - point) / s: Euler's method arrives, guidance goes beyond."""

    def model(x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        point = torch.where(label == dit.NO_CLASS, 0.0, label.float())[:, None, None, None]
        return (x - point) * 1000 / (timestep[0] + 1)

    noise, label = dit.start(20)
    samples, calls = dit.trajectory(model, noise, label)
    assert len(calls) == dit.STEPS
    assert [int(call[1][0]) for call in calls[:3]] == [999, 949, 899]
    # The timestep is s in thousandths, rounded down: what it loses stays well below one step.
    want = dit.GUIDANCE * label.float()
    assert torch.allclose(samples, want[:, None, None, None].expand_as(samples), atol=0.1)


def test_the_probe_has_every_class_at_every_step() -> None:
    labels = torch.arange(400) % 10
    calls = [(torch.full((400,), step), labels) for step in range(20)]
    steps, found = dit.spread(calls)
    assert {(int(s), int(c)) for s, c in zip(steps, found, strict=True)} == {
        (s, c) for s in range(20) for c in range(10)
    }
