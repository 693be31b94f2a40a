from __future__ import annotations

import inspect
import pickle

import pytest

from fxquant import errors
from fxquant.errors import (
    CalibrationOpen,
    CaptureFailed,
    DisassemblyFailed,
    ForgottenNoGradWarning,
    FxQuantError,
    GradientsNeedTraining,
    IncompleteModuleKind,
    InvalidCheckpoint,
    InvalidOption,
    InvalidSpec,
    KernelNotCompiled,
    KernelsUnavailableWarning,
    NonFiniteActivation,
    NonFiniteWeight,
    NotAModule,
    NothingRecorded,
    NothingToCompile,
    PackageMissing,
    PassFailed,
    PathRulesNeedModel,
    PatternMatchesNothing,
    SaveFailed,
    ShapeMismatch,
    UncalibratedModules,
    UnknownFormat,
    UnknownKernel,
    UnknownOption,
    UnknownPreset,
    UnloweredSite,
    UnsupportedActivation,
    VerificationFailed,
    nearest,
)

CASES = [
    (
        UnknownFormat("int9", ["int8", "int4"]),
        ValueError,
        "unknown number format 'int9'. Did you mean 'int8'? Known: int8, int4.",
    ),
    (
        UnknownPreset("zzz", ["int8wo", "int8dq"]),
        ValueError,
        "unknown preset 'zzz'. Known: int8wo, int8dq.",
    ),
    (
        UnknownOption("weigths", ["weights", "rules"]),
        ValueError,
        "unknown option 'weigths'. Did you mean 'weights'? Known: weights, rules.",
    ),
    (
        InvalidOption("fuse", 3, "it takes True or False"),
        ValueError,
        "option 'fuse' has the value 3: it takes True or False.",
    ),
    (InvalidSpec("int8", "it is short"), ValueError, "spec 'int8': it is short."),
    (
        PathRulesNeedModel(["lm_head"], "torch.compile(backend='fxquant')"),
        ValueError,
        "torch.compile(backend='fxquant'): the patterns 'lm_head' name module paths, which cannot be resolved here. "
        "Use fxquant.compile(model, config), which has the model in hand, or drop rules, include and exclude.",
    ),
    (
        PatternMatchesNothing(["lm_haed"], ["model.proj", "lm_head"]),
        ValueError,
        "no module matches 'lm_haed'. Did you mean 'lm_head'? The model has: model.proj, lm_head. "
        "A pattern is a glob over the whole module path or a parent of it, such as 'lm_head' or '*.mlp.*'.",
    ),
    (
        NotAModule(max),
        TypeError,
        "a model is needed, an nn.Module, but this is 'max', a builtin_function_or_method. "
        "For a function there is torch.compile(f, backend='fxquant', options={...}).",
    ),
    (
        GradientsNeedTraining("graph_000, input x"),
        RuntimeError,
        "graph_000, input x: a gradient was asked for, but this is inference only. Run it under torch.no_grad() or "
        "detach its input. To train with rounded weights, compile with training=True.",
    ),
    (
        NonFiniteWeight("a.weight", 1, (3, 4)),
        ValueError,
        "weight 'a.weight' holds 1 non-finite value, the first at [3, 4]. Check the checkpoint, or keep this layer "
        "float with rules={'a.weight': None}.",
    ),
    (
        UnsupportedActivation("linear 'a'", "torch.int64"),
        TypeError,
        "linear 'a': the activation has dtype torch.int64, but float32, bfloat16 or float16 is needed. Convert it "
        "first, or keep this layer float.",
    ),
    (
        ShapeMismatch("int8_linear", "K = 3", "K = 4"),
        ValueError,
        "int8_linear: met K = 3, but K = 4 is needed. Check that input and weight belong together.",
    ),
    (
        VerificationFailed("fold-weights", "linear_3", "it has no fake value"),
        RuntimeError,
        "after stage 'fold-weights', node 'linear_3' breaks the graph spec: it has no fake value. This is a defect of "
        "fxquant: please report it with the folder that options={'dump': ...} writes.",
    ),
    (
        PassFailed("lower", ["annotate", "share"], KeyError("w")),
        RuntimeError,
        "pass 'lower' failed, after annotate, share: KeyError: 'w' See the graphs so far with options={'dump': ...}.",
    ),
    (
        CaptureFailed("graph_000", "no node has a fake value", "Capture it by Dynamo or torch.export."),
        RuntimeError,
        "capture of graph_000: no node has a fake value. Capture it by Dynamo or torch.export.",
    ),
    (
        UnloweredSite([("a", "K = 3"), ("b", "K = 5")]),
        RuntimeError,
        "strict: 2 sites would not run on a quantized kernel.\n  a: K = 3\n  b: K = 5\n"
        "Exclude them by a rule that gives None, or set strict=False.",
    ),
    (
        NonFiniteActivation("a.b", "input", 2, 64),
        ValueError,
        "calibration: 2 of 64 values in the input of module 'a.b' are NaN or infinity, which have no range; the batch "
        "was not counted. Check the data and the float model, float16 overflow above all; or leave this module's "
        "activations float.",
    ),
    (
        CalibrationOpen(),
        RuntimeError,
        "this Calibration is open already: leave its block before it is entered again, or nest another one.",
    ),
    (
        NothingRecorded(),
        RuntimeError,
        "this Calibration has seen no value: run data through a model with quantized activations in its block.",
    ),
    (
        IncompleteModuleKind("QMine", "unmatrix", "gives a matrix [N, K] the weight's own shape"),
        NotImplementedError,
        "QMine has no method 'unmatrix', which gives a matrix [N, K] the weight's own shape. Define it in the class "
        "that register_module was given (see fxquant.nn.QModule), or let has_kernels() say False if it is "
        "kernel_product.",
    ),
    (
        UnknownKernel("scaled", ["scaled_mm", "coded_mm"]),
        ValueError,
        "unknown kernel 'scaled'. Did you mean 'scaled_mm'? Known: scaled_mm, coded_mm.",
    ),
    (
        NothingToCompile("sm90", "no kernel takes any of the problems"),
        ValueError,
        "nothing to compile for sm90: no kernel takes any of the problems. `fxquant kernels list` shows the kernels.",
    ),
    (
        DisassemblyFailed("/bin/cuobjdump", "exit code 1"),
        RuntimeError,
        "/bin/cuobjdump failed on a compiled kernel: exit code 1. It comes with Triton; reinstall triton.",
    ),
    (
        KernelNotCompiled("mm", "gfx942", "LLVM left out 2 pieces of inline assembly"),
        RuntimeError,
        "mm was not compiled for gfx942: LLVM left out 2 pieces of inline assembly. "
        "Don't run it; report it to fxquant.",
    ),
    (
        PackageMissing("matplotlib", "Calibration.plot"),
        ImportError,
        "Calibration.plot needs matplotlib, which is not installed: pip install matplotlib",
    ),
    (
        InvalidCheckpoint("q/model.safetensors", "it has 3 bytes, too few for a safetensors file"),
        ValueError,
        "'q/model.safetensors' cannot be loaded: it has 3 bytes, too few for a safetensors file. Nothing has been "
        "changed. Save or download the folder anew; only safetensors and JSON are read.",
    ),
    (
        SaveFailed("/full/q", "No space left on device"),
        OSError,
        "cannot save to '/full/q': No space left on device. What was there before is as it was. "
        "Give a folder of the model's own, on a disk with room for it.",
    ),
]


@pytest.mark.parametrize(("error", "builtin", "words"), CASES, ids=[type(case[0]).__name__ for case in CASES])
def test_says_what_was_met_and_what_to_do(error: FxQuantError, builtin: type[Exception], words: str) -> None:
    assert str(error) == words
    assert isinstance(error, builtin)
    assert isinstance(error, FxQuantError)


@pytest.mark.parametrize("error", [case[0] for case in CASES], ids=[type(case[0]).__name__ for case in CASES])
def test_survives_pickle(error: FxQuantError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert vars(again) == vars(error)


def test_each_error_is_documented_and_a_builtin_too() -> None:
    defined = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, FxQuantError)]
    defined.remove(FxQuantError)
    assert all(c.__doc__ for c in defined)
    assert all(
        issubclass(c, (ValueError, TypeError, RuntimeError, OSError, AttributeError, ImportError)) for c in defined
    )


def test_first_pass_failing_has_none_before_it() -> None:
    assert "failed, as the first pass: ValueError: bad" in str(PassFailed("annotate", [], ValueError("bad")))


def test_long_lists_of_paths_are_cut() -> None:
    words = str(PatternMatchesNothing(["x"], [f"layer{i}" for i in range(20)]))
    assert "layer7 and 12 more" in words
    assert "layer8" not in words


def test_a_model_without_linears_is_said_to_have_none() -> None:
    assert "The model has: no quantizable module." in str(PatternMatchesNothing(["x"], []))


def test_warnings_are_user_warnings_and_say_what_to_do() -> None:
    kernels = KernelsUnavailableWarning("no C++ compiler was found")
    assert isinstance(kernels, UserWarning)
    assert str(kernels) == (
        "fxquant's compiled kernels are not available: no C++ compiler was found. The reference ops are used: same "
        "numbers, slower."
    )
    forgotten = ForgottenNoGradWarning("graph_000")
    assert isinstance(forgotten, UserWarning)
    assert "The result carries no gradient. Call it under torch.no_grad()" in str(forgotten)
    missed = UncalibratedModules([f"layer{i}" for i in range(10)])
    assert isinstance(missed, UserWarning)
    assert str(missed).startswith("the calibration reached no value of 'layer0', ")
    assert "'layer7' and 2 more: no scale was set there, an earlier one stays. Run data" in str(missed)


@pytest.mark.parametrize(
    ("name", "found"), [("INT8", "int8"), ("int_8", "int8"), ("reduce_overhead", "reduce-overhead"), ("qqq", None)]
)
def test_nearest(name: str, found: str | None) -> None:
    assert nearest(name, ["int8", "int4", "reduce-overhead"]) == found
