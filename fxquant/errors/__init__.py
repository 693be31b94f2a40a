"""Every exception and warning of fxquant, each with its message.

A message says what was met, where, and what to do. A constructor takes the facts and builds the words, so that no other
module writes an error text of its own. Each class is also the builtin that a user would expect to catch.
"""

from __future__ import annotations

from fxquant.errors.base import FxQuantError, PackageMissing
from fxquant.errors.calibration import (
    CalibrationOpen,
    NonFiniteActivation,
    NothingRecorded,
    UncalibratedModules,
    UncalibratedWarning,
)
from fxquant.errors.checkpoints import (
    BuffersOnMeta,
    InvalidCheckpoint,
    InvalidQuantizationMap,
    NotForQuanto,
    NotStorable,
    SaveFailed,
    StateDictMismatch,
)
from fxquant.errors.graphs import CaptureFailed, DumpFailed, PassFailed, UnloweredSite, VerificationFailed
from fxquant.errors.kernels import (
    DisassemblyFailed,
    KernelNotCompiled,
    KernelsUnavailableWarning,
    NoGpuKernelWarning,
    NothingToCompile,
    UnknownKernel,
)
from fxquant.errors.modules import (
    AlreadyFrozen,
    FrozenWeight,
    IncompleteModuleKind,
    MergeRefused,
    NotAModule,
    NotAQuantizedClass,
    NothingQuantized,
)
from fxquant.errors.options import (
    InvalidOption,
    InvalidSpec,
    PathRulesNeedModel,
    PatternMatchesNothing,
    UnknownFormat,
    UnknownOption,
    UnknownPreset,
)
from fxquant.errors.tensors import (
    ForgottenNoGradWarning,
    GradientsNeedTraining,
    NestedInput,
    NonFiniteWeight,
    ShapeMismatch,
    UnevenScales,
    UnsupportedActivation,
)
from fxquant.errors.tuning import NoRightAnswer, NotAPlanFile, NothingToTune, OtherDevice, TuningCacheWarning
from fxquant.errors.words import nearest

__all__ = [
    "AlreadyFrozen",
    "BuffersOnMeta",
    "CalibrationOpen",
    "CaptureFailed",
    "DisassemblyFailed",
    "DumpFailed",
    "ForgottenNoGradWarning",
    "FrozenWeight",
    "FxQuantError",
    "GradientsNeedTraining",
    "IncompleteModuleKind",
    "InvalidCheckpoint",
    "InvalidOption",
    "InvalidQuantizationMap",
    "InvalidSpec",
    "KernelNotCompiled",
    "KernelsUnavailableWarning",
    "MergeRefused",
    "NestedInput",
    "NoGpuKernelWarning",
    "NoRightAnswer",
    "NonFiniteActivation",
    "NonFiniteWeight",
    "NotAModule",
    "NotAPlanFile",
    "NotAQuantizedClass",
    "NotForQuanto",
    "NotStorable",
    "NothingQuantized",
    "NothingRecorded",
    "NothingToCompile",
    "NothingToTune",
    "OtherDevice",
    "PackageMissing",
    "PassFailed",
    "PathRulesNeedModel",
    "PatternMatchesNothing",
    "SaveFailed",
    "ShapeMismatch",
    "StateDictMismatch",
    "TuningCacheWarning",
    "UncalibratedModules",
    "UncalibratedWarning",
    "UnevenScales",
    "UnknownFormat",
    "UnknownKernel",
    "UnknownOption",
    "UnknownPreset",
    "UnloweredSite",
    "UnsupportedActivation",
    "VerificationFailed",
    "nearest",
]
