"""Tuned plans that cannot be made or used."""

from __future__ import annotations

from fxquant.errors.base import FxQuantError
from fxquant.errors.words import sentence


class NothingToTune(FxQuantError, ValueError):
    """A request to tune that no kernel of the target answers to."""

    def __init__(self, target: object, reason: str) -> None:
        super().__init__(f"nothing can be tuned for {target}: {sentence(reason)}")


class NoRightAnswer(FxQuantError, RuntimeError):
    """A problem for which every configuration computes something else than the reference."""

    def __init__(self, problem: object, reasons: str) -> None:
        super().__init__(
            f"{problem}: no configuration gives the reference's answer: {sentence(reasons)} "
            "This is a defect of the kernel; please report it with this text."
        )


class NotAPlanFile(FxQuantError, ValueError):
    """A file that should hold tuned plans, or a list of problems, and does not."""

    def __init__(self, file: object, what: str, reason: str) -> None:
        super().__init__(f"{file} holds no {what}: {sentence(reason)} Nothing has been changed.")


class OtherDevice(FxQuantError, ValueError):
    """Tuned plans of one kind of machine, to be used on another."""

    def __init__(self, file: object, theirs: object, ours: object, difference: str) -> None:
        super().__init__(
            f"{file}: its plans were tuned on {theirs}; this device is {ours}: {difference}. "
            "Nothing has been imported. Plans hold for one kind of device and one set of versions; run `fxquant tune`."
        )


class TuningCacheWarning(UserWarning):
    """A file of tuned plans that cannot be used: the heuristic's configurations run instead, with the same results."""

    def __init__(self, file: object, reason: str) -> None:
        super().__init__(
            f"the tuned plans in {file} are not used: {reason}. Kernels run as their heuristics say: same numbers, "
            "perhaps slower. Tuning again writes the file anew; deleting it ends this warning."
        )
