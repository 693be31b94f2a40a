"""Every exception and warning of fxquant, each with its message.

A message says what was met, where, and what to do. A constructor takes the facts and builds the words, so that no other
module writes an error text of its own. Each class is also the builtin that a user would expect to catch.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that looks most like `name`, or None when none is close."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    found = difflib.get_close_matches(name.lower(), list(by_lower), n=1, cutoff=0.6)
    return by_lower[found[0]] if found else None


def _unknown(what: str, name: object, known: Sequence[str]) -> str:
    near = nearest(str(name), known)
    hint = f" Did you mean {near!r}?" if near else ""
    return f"unknown {what} {name!r}.{hint} Known: {', '.join(known)}."


def _sentence(words: str) -> str:
    return words if words.endswith("?") else f"{words}."


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)


def _listed(paths: Sequence[str]) -> str:
    return _quoted(paths[:8]) + (f" and {len(paths) - 8} more" if len(paths) > 8 else "")


def _rebuild(cls: type[FxQuantError], args: tuple[Any, ...], state: dict[str, Any]) -> FxQuantError:
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class FxQuantError(Exception):
    """Base of all errors that fxquant raises on purpose."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Constructors take facts, not the message, so the default way through pickle would call them wrongly.
        return _rebuild, (type(self), self.args, self.__dict__)


class UnknownFormat(FxQuantError, ValueError):
    """A number format that does not exist."""

    def __init__(self, name: object, known: Sequence[str]) -> None:
        super().__init__(_unknown("number format", name, known))


class UnknownPreset(FxQuantError, ValueError):
    """A preset that does not exist; `hint`, if there is one, says what else the name may have meant."""

    def __init__(self, name: object, known: Sequence[str], hint: str = "") -> None:
        super().__init__(f"{_unknown('preset', name, known)} {hint}".rstrip())


class UnknownOption(FxQuantError, ValueError):
    """An option, or a field of `QuantConfig`, that does not exist."""

    def __init__(self, name: object, known: Sequence[str]) -> None:
        super().__init__(_unknown("option", name, known))


class InvalidOption(FxQuantError, ValueError):
    """A known option with a value that it cannot have; `reason` says what it takes."""

    def __init__(self, option: str, value: object, reason: str) -> None:
        self.option = option
        super().__init__(f"option {option!r} has the value {value!r}: {_sentence(reason)}")


class InvalidSpec(FxQuantError, ValueError):
    """A spec that cannot be read, or that asks for what cannot be; `reason` says what it takes."""

    def __init__(self, text: object, reason: str) -> None:
        super().__init__(f"spec {str(text)!r}: {_sentence(reason)}")


class PathRulesNeedModel(FxQuantError, ValueError):
    """Rules by module path where the module paths are not known."""

    def __init__(self, patterns: Sequence[str], where: str) -> None:
        super().__init__(
            f"{where}: the patterns {_quoted(patterns)} name module paths, which cannot be resolved here. "
            "Use fxquant.compile(model, config), which has the model in hand, or drop rules, include and exclude."
        )


class PatternMatchesNothing(FxQuantError, ValueError):
    """A pattern of rules, include or exclude that no module path of the model matches."""

    def __init__(self, patterns: Sequence[str], paths: Sequence[str]) -> None:
        near = [found for p in patterns if (found := nearest(p, paths))]
        hint = f" Did you mean {_quoted(dict.fromkeys(near))}?" if near else ""
        shown = ", ".join(paths[:8]) + (f" and {len(paths) - 8} more" if len(paths) > 8 else "")
        super().__init__(
            f"no module matches {_quoted(patterns)}.{hint} The model has: {shown or 'no quantizable module'}. "
            "A pattern is a glob over the whole module path or a parent of it, such as 'lm_head' or '*.mlp.*'."
        )


class NotAModule(FxQuantError, TypeError):
    """Something other than an nn.Module where a model is needed."""

    def __init__(self, met: object) -> None:
        super().__init__(
            f"a model is needed, an nn.Module, but this is {getattr(met, '__name__', met)!r}, a {type(met).__name__}. "
            "For a function there is torch.compile(f, backend='fxquant', options={...})."
        )


class GradientsNeedTraining(FxQuantError, RuntimeError):
    """A gradient was asked for where only inference is served."""

    def __init__(self, where: str) -> None:
        super().__init__(
            f"{where}: a gradient was asked for, but this is inference only. "
            "Run it under torch.no_grad() or detach its input. "
            "To train with rounded weights, compile with training=True."
        )


class NonFiniteWeight(FxQuantError, ValueError):
    """A weight that holds NaN or infinity."""

    def __init__(self, path: str, count: int, first: Sequence[int]) -> None:
        super().__init__(
            f"weight {path!r} holds {count} non-finite value{'' if count == 1 else 's'}, the first at {list(first)}. "
            f"Check the checkpoint, or keep this layer float with rules={{{path!r}: None}}."
        )


class UnsupportedActivation(FxQuantError, TypeError):
    """An activation of a dtype that cannot be quantized, such as integer or complex."""

    def __init__(self, where: str, dtype: object) -> None:
        super().__init__(
            f"{where}: the activation has dtype {dtype}, but float32, bfloat16 or float16 is needed. "
            "Convert it first, or keep this layer float."
        )


class ShapeMismatch(FxQuantError, ValueError):
    """Tensors whose shapes, dtypes or devices do not fit together; `met` and `wanted` are short phrases."""

    def __init__(self, where: str, met: str, wanted: str) -> None:
        super().__init__(f"{where}: met {met}, but {wanted} is needed. Check that input and weight belong together.")


class VerificationFailed(FxQuantError, RuntimeError):
    """A graph that breaks the spec of its stage: a defect of fxquant, not of the user's model."""

    def __init__(self, stage: str, node: object, claim: str) -> None:
        self.stage = stage
        self.node = str(node)
        super().__init__(
            f"after stage {stage!r}, node {str(node)!r} breaks the graph spec: {claim}. This is a defect of fxquant: "
            "please report it with the folder that options={'dump': ...} writes."
        )


class PassFailed(FxQuantError, RuntimeError):
    """A pass that raised; names it and the passes that had run before it. Raise it `from` the cause."""

    def __init__(self, name: str, before: Sequence[str], cause: BaseException) -> None:
        self.name = name
        after = f"after {', '.join(before)}" if before else "as the first pass"
        super().__init__(
            f"pass {name!r} failed, {after}: {type(cause).__name__}: {cause} "
            "See the graphs so far with options={'dump': ...}."
        )


class CaptureFailed(FxQuantError, RuntimeError):
    """A graph that could not be brought to the canonical form."""

    def __init__(self, where: str, what: str, remedy: str) -> None:
        super().__init__(f"capture of {where}: {what}. {remedy}")


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


class FrozenWeight(FxQuantError, AttributeError):
    """A frozen weight that somebody would replace or train."""

    def __init__(self, module: str, name: str) -> None:
        super().__init__(
            f"{module}.{name} is frozen: it is a dequantized copy of codes, and what is written to it would be lost. "
            "Change the float model before freeze, or load codes with load_state_dict."
        )


class AlreadyFrozen(FxQuantError, RuntimeError):
    """Modules whose weights are codes already, asked to become other codes; `paths` names them."""

    def __init__(self, paths: Sequence[str], met: object, wanted: object) -> None:
        self.paths = tuple(paths)
        shown = ", ".join(map(repr, paths[:8])) + (f" and {len(paths) - 8} more" if len(paths) > 8 else "")
        super().__init__(
            f"{shown}: frozen as {met}, asked to become {wanted}. Their float weights are gone: "
            "quantize the float model anew, or leave these modules out with exclude=."
        )


class NestedInput(FxQuantError, TypeError):
    """A nested tensor given to a module that takes padded ones."""

    def __init__(self, where: str) -> None:
        super().__init__(
            f"{where}: met a nested tensor, which the kernels do not take. Give it padded, as x.to_padded_tensor(0.0) "
            "with a key_padding_mask. An nn.TransformerEncoder makes none if its use_nested_tensor is False, "
            "as it is where fxquant.quantize has quantized the whole encoder."
        )


class NotAQuantizedClass(FxQuantError, TypeError):
    """A class given to `register_module` that cannot stand in for the class it was registered for."""

    def __init__(self, kind: object, base: type) -> None:
        super().__init__(
            f"{getattr(kind, '__name__', kind)!r} cannot be the quantized class of {base.__name__}: "
            f"write it as class Q{base.__name__}(fxquant.QModule, {base.__name__})."
        )


class NonFiniteActivation(FxQuantError, ValueError):
    """NaN or infinity among the values from which a calibration takes a range; `path` names the module."""

    def __init__(self, path: str, side: str, count: int, total: int) -> None:
        self.path = path
        super().__init__(
            f"calibration: {count} of {total} values in the {side} of module {path!r} are NaN or infinity, which have "
            "no range; the batch was not counted. Check the data and the float model, float16 overflow above all; or "
            "leave this module's activations float."
        )


class CalibrationOpen(FxQuantError, RuntimeError):
    """One `Calibration` entered twice at a time."""

    def __init__(self) -> None:
        super().__init__(
            "this Calibration is open already: leave its block before it is entered again, or nest another one."
        )


class NothingRecorded(FxQuantError, RuntimeError):
    """A picture asked of a `Calibration` that has seen no value."""

    def __init__(self) -> None:
        super().__init__(
            "this Calibration has seen no value: run data through a model with quantized activations in its block."
        )


class PackageMissing(FxQuantError, ImportError):
    """A package that only this feature needs, and that is not installed."""

    def __init__(self, package: str, what: str) -> None:
        super().__init__(f"{what} needs {package}, which is not installed: pip install {package}")


class InvalidQuantizationMap(FxQuantError, ValueError):
    """A quantization map that does not fit the model, or that cannot be read; `problems` are short phrases."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        shown = "".join(f"\n  {problem}" for problem in self.problems[:16])
        rest = f"\n  and {len(self.problems) - 16} more" if len(self.problems) > 16 else ""
        super().__init__(
            f"the quantization map does not fit; nothing has been changed:{shown}{rest}\n"
            "Take the map that quantization_map(model) gave of the model whose state dict this is."
        )


class StateDictMismatch(FxQuantError, ValueError):
    """A state dict that is not the model's; `missing`, `unexpected` and `wrong` are keys, or say what is wrong."""

    def __init__(self, missing: Sequence[str], unexpected: Sequence[str], wrong: Sequence[str] = ()) -> None:
        self.missing, self.unexpected, self.wrong = tuple(missing), tuple(unexpected), tuple(wrong)
        parts = {"missing": self.missing, "unexpected": self.unexpected, "wrong": self.wrong}
        lines = "".join(f"\n  {what}: {_listed(keys)}" for what, keys in parts.items() if keys)
        super().__init__(
            f"the state dict does not fit the model; nothing has been changed:{lines}\n"
            "Check that model, state dict and quantization map belong together."
        )


class BuffersOnMeta(FxQuantError, RuntimeError):
    """Tensors on the meta device whose values no state dict holds and nothing can compute anew; `names` are paths."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        super().__init__(
            f"{_listed(self.names)}: on the meta device, not part of the state dict, and the model has no "
            "_init_weights that computes them; nothing has been changed. Build the model with its buffers: without "
            "torch.device('meta'), or under accelerate's init_empty_weights(), which keeps buffers real."
        )


class NotForQuanto(FxQuantError, ValueError):
    """A module as optimum-quanto cannot hold it; `path` is the module's."""

    def __init__(self, path: str, reason: str) -> None:
        self.path = path
        super().__init__(
            f"{path or '(root)'}: optimum-quanto cannot hold it: {_sentence(reason)} "
            "Quantize it anew as Quanto does, or keep it in fxquant's own state dict and quantization_map."
        )


class MergeRefused(FxQuantError, RuntimeError):
    """An adapter that cannot be merged into a quantized weight."""

    def __init__(self, module: str, reason: str) -> None:
        super().__init__(f"{module}: {_sentence(reason)} Nothing has been merged; the adapter works unmerged.")


class IncompleteModuleKind(FxQuantError, NotImplementedError):
    """A quantized class that lacks a method which its kind needs."""

    def __init__(self, cls: str, method: str, purpose: str) -> None:
        super().__init__(
            f"{cls} has no method {method!r}, which {purpose}. Define it in the class that register_module was given "
            f"(see fxquant.nn.QModule), or let has_kernels() say False if it is kernel_product."
        )


class DisassemblyFailed(FxQuantError, RuntimeError):
    """The tool that shows a kernel's machine code could not be run, or did not understand it."""

    def __init__(self, tool: str, reason: str) -> None:
        super().__init__(
            f"{tool} failed on a compiled kernel: {_sentence(reason)} It comes with Triton; reinstall triton."
        )


class KernelNotCompiled(FxQuantError, RuntimeError):
    """A kernel that the compiler has given up, though it wrote a file: it would compute anything."""

    def __init__(self, kernel: str, arch: str, reason: str) -> None:
        super().__init__(
            f"{kernel} was not compiled for {arch}: {_sentence(reason)} Don't run it; report it to fxquant."
        )


class KernelsUnavailableWarning(UserWarning):
    """The compiled kernels cannot be used: the reference ops compute the same numbers, slower."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"fxquant's compiled kernels are not available: {reason}. The reference ops are used: same numbers, slower."
        )


class UncalibratedWarning(UserWarning):
    """Modules whose activations are to be static, used before a `Calibration` has seen them; `paths` names them."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = tuple(paths)
        shown = ", ".join(map(repr, paths[:8])) + (f" and {len(paths) - 8} more" if len(paths) > 8 else "")
        super().__init__(
            f"activations of {shown} are to be quantized with a calibrated range, but no calibration has seen them: "
            "each call takes the range of its own input. Run sample data under `with fxquant.Calibration():` first."
        )


class UncalibratedModules(UserWarning):
    """Modules with quantized activations that no value of a `Calibration` reached; `paths` names them, () all."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = tuple(paths)
        met = (
            f"the calibration reached no value of {_listed(self.paths)}: no scale was set there, an earlier one stays"
            if paths
            else "the calibration reached no module whose activations it could calibrate: no scale was set"
        )
        super().__init__(
            f"{met}. Run data that uses these modules inside the block; "
            "quantize(model, activations='int8') says which activations are quantized."
        )


class ForgottenNoGradWarning(UserWarning):
    """Inference in grad mode: served without gradients."""

    def __init__(self, where: str) -> None:
        super().__init__(
            f"{where}: called in grad mode, and a value requires grad only because a parameter does. "
            "The result carries no gradient. Call it under torch.no_grad() or torch.inference_mode()."
        )


class OtherDevice(FxQuantError, ValueError):
    """Tuned plans of one kind of machine, to be used on another."""

    def __init__(self, file: object, theirs: object, ours: object, difference: str) -> None:
        super().__init__(
            f"{file}: its plans were tuned on {theirs}; this device is {ours}: {difference}. "
            "Nothing has been imported. Plans hold for one kind of device and one set of versions; run `fxquant tune`."
        )


class NotAPlanFile(FxQuantError, ValueError):
    """A file that should hold tuned plans, or a list of problems, and does not."""

    def __init__(self, file: object, what: str, reason: str) -> None:
        super().__init__(f"{file} holds no {what}: {_sentence(reason)} Nothing has been changed.")


class NothingToTune(FxQuantError, ValueError):
    """A request to tune that no kernel of the target answers to."""

    def __init__(self, target: object, reason: str) -> None:
        super().__init__(f"nothing can be tuned for {target}: {_sentence(reason)}")


class NoRightAnswer(FxQuantError, RuntimeError):
    """A problem for which every configuration computes something else than the reference."""

    def __init__(self, problem: object, reasons: str) -> None:
        super().__init__(
            f"{problem}: no configuration gives the reference's answer: {_sentence(reasons)} "
            "This is a defect of the kernel; please report it with this text."
        )


class TuningCacheWarning(UserWarning):
    """A file of tuned plans that cannot be used: the heuristic's configurations run instead, with the same results."""

    def __init__(self, file: object, reason: str) -> None:
        super().__init__(
            f"the tuned plans in {file} are not used: {reason}. Kernels run as their heuristics say: same numbers, "
            "perhaps slower. Tuning again writes the file anew; deleting it ends this warning."
        )


class NoGpuKernelWarning(UserWarning):
    """An operation on a GPU that no kernel takes there: its reference computes the same numbers, slower."""

    def __init__(self, op: str, weights: str, activations: str, arch: str) -> None:
        formats = " with ".join(text for text in (activations, weights) if text)
        where = f"on {arch}" if arch else "on this GPU (they are for sm80 and later, and gfx942)"
        super().__init__(
            f"no Triton kernel takes a {op} of {formats} {where}. The reference runs it: same numbers, slower. "
            "`fxquant kernels list` says which formats have kernels where."
        )


class UnknownKernel(FxQuantError, ValueError):
    """A kernel's name that there is not."""

    def __init__(self, name: str, known: Sequence[str]) -> None:
        super().__init__(_unknown("kernel", name, known))


class NothingToCompile(FxQuantError, ValueError):
    """A request to compile kernels that comes to none."""

    def __init__(self, target: str, reason: str) -> None:
        super().__init__(
            f"nothing to compile for {target}: {_sentence(reason)} `fxquant kernels list` shows the kernels."
        )


class SaveFailed(FxQuantError, OSError):
    """A folder that could not be written or replaced; `folder` is its path."""

    def __init__(self, folder: object, reason: str) -> None:
        self.folder = str(folder)
        super().__init__(
            f"cannot save to {str(folder)!r}: {_sentence(reason)} What was there before is as it was. "
            "Give a folder of the model's own, on a disk with room for it."
        )


class NotStorable(FxQuantError, ValueError):
    """Something in a model's state dict that safetensors cannot hold; `key` names it."""

    def __init__(self, key: str, reason: str) -> None:
        self.key = key
        super().__init__(f"{key!r} cannot be saved: {_sentence(reason)} Nothing has been written.")


class NothingQuantized(FxQuantError, ValueError):
    """A float model where a quantized one is needed."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what}: no module of this model is quantized. Call fxquant.quantize(model, ...) first, and freeze; "
            "what fxquant.compile quantizes is in the compiled graph, not in the model."
        )


class InvalidCheckpoint(FxQuantError, ValueError):
    """A file of a checkpoint that is damaged, hostile, or something else; `path` is the file's."""

    def __init__(self, path: object, problem: str) -> None:
        self.path = str(path)
        super().__init__(
            f"{str(path)!r} cannot be loaded: {_sentence(problem)} Nothing has been changed. "
            "Save or download the folder anew; only safetensors and JSON are read."
        )
