"""What is kept of a tensor that comes again and again: extremes, a moving average, a histogram."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fxquant.calibration.histogram import Histogram


class Seen:
    """The batches of one tensor, the input of a module, say: everything that any observer chooses a range from.

    minimum, maximum  of all values
    average           the exponential moving average of the batches' largest absolute values:
                      new + momentum * (old - new), the first batch as it is. 0.0 and 1.0 are values like others.
    histogram         of all values
    batches           how many tensors came that had values
    device            where the last one was
    """

    def __init__(self, momentum: float) -> None:
        self._momentum = momentum
        self.batches = 0
        self.minimum = math.inf
        self.maximum = -math.inf
        self.average = 0.0
        self.histogram = Histogram()
        self.device = torch.device("cpu")

    @property
    def absmax(self) -> float:
        """The largest absolute value of all batches; 0 before the first."""
        return max(-self.minimum, self.maximum) if self.batches else 0.0

    def add(self, x: Tensor) -> bool:
        """Take one batch in, of any shape and floating dtype. False, and nothing is taken, if it is not finite.

        A batch without values, empty or on the meta device, is passed over. float64 counts as the float32 nearest to
        it, which is what is quantized.
        """
        # A model may run under inference_mode once and without it next time: what is kept here belongs to neither.
        with torch.inference_mode(False), torch.no_grad():
            x = x.detach()
            if x.numel() == 0 or x.is_meta:
                return True
            if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                x = x.float()
            low, high = torch.stack(torch.aminmax(x)).tolist()
            if not (math.isfinite(low) and math.isfinite(high)):
                return False
            largest = max(-low, high)
            self.average = largest + self._momentum * (self.average - largest) if self.batches else largest
            self.minimum, self.maximum = min(self.minimum, low), max(self.maximum, high)
            self.histogram.add(x, largest)
            self.batches += 1
            self.device = x.device
        return True
