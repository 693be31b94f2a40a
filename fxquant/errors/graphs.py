"""What goes wrong between a captured graph and a lowered one, and in dumps of them."""

from __future__ import annotations

from collections.abc import Sequence

from fxquant.errors.base import FxQuantError


class CaptureFailed(FxQuantError, RuntimeError):
    """A graph that could not be brought to the canonical form."""

    def __init__(self, where: str, what: str, remedy: str) -> None:
        super().__init__(f"capture of {where}: {what}. {remedy}")


class PassFailed(FxQuantError, RuntimeError):
    """A pass that raised; names it and the passes that had run before it. Raise it `from` the cause."""

    def __init__(self, name: str, before: Sequence[str], cause: BaseException) -> None:
        self.name = name
        after = f"after {', '.join(before)}" if before else "as the first pass"
        super().__init__(
            f"pass {name!r} failed, {after}: {type(cause).__name__}: {cause} "
            "See the graphs so far with options={'dump': ...}."
        )


class VerificationFailed(FxQuantError, RuntimeError):
    """A graph that breaks the spec of its stage: a defect of fxquant, not of the user's model."""

    def __init__(self, stage: str, node: object, claim: str) -> None:
        self.stage = stage
        self.node = str(node)
        super().__init__(
            f"after stage {stage!r}, node {str(node)!r} breaks the graph spec: {claim}. This is a defect of fxquant: "
            "please report it with the folder that options={'dump': ...} writes."
        )


class UnloweredSite(FxQuantError, RuntimeError):
    """With strict=True: sites that were to run quantized and do not. `sites` holds (path, reason) pairs."""

    def __init__(self, sites: Sequence[tuple[str, str]]) -> None:
        lines = "".join(f"\n  {path}: {reason}" for path, reason in sites)
        super().__init__(
            f"strict: {len(sites)} site{'' if len(sites) == 1 else 's'} would not run on a quantized kernel.{lines}\n"
            "Exclude them by a rule that gives None, or set strict=False."
        )


class DumpFailed(FxQuantError, OSError):
    """A dump that could not be written; `path` is the folder or file."""

    def __init__(self, path: object, cause: OSError) -> None:
        self.path = str(path)
        super().__init__(
            f"cannot write the dump to {str(path)!r}: {cause.strerror or cause}. "
            "Give options={'dump': ...} a directory that can be made and written."
        )
