"""The public face: which names there are, how the backend is found, and that importing does nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import fxquant

NAMES = [
    "PRESETS",
    "Calibration",
    "CompiledModel",
    "LinearSpec",
    "ModelReport",
    "QModule",
    "QuantConfig",
    "QuantizeReport",
    "QuantizedTensor",
    "QuantizingBackend",
    "TensorSpec",
    "backend",
    "compile",
    "explain",
    "freeze",
    "load",
    "memory_footprint",
    "peft_config",
    "qfloat8",
    "qfloat8_e4m3fn",
    "qfloat8_e4m3fnuz",
    "qfloat8_e5m2",
    "qint2",
    "qint4",
    "qint8",
    "quantization_map",
    "quantize",
    "refresh",
    "register_module",
    "requantize",
    "save",
    "tune",
]

IMPORT = """
import json, logging, sys, warnings
import torch
import torch._dynamo
import torch._inductor.config
import torch._functorch.config
import torch.utils.cpp_extension
warnings.simplefilter("error")
def state():
    return {
        "inductor": repr(torch._inductor.config.get_config_copy()),
        "functorch": repr(torch._functorch.config.get_config_copy()),
        "dynamo": repr(torch._dynamo.config.get_config_copy()),
        "threads": torch.get_num_threads(),
        "grad": torch.is_grad_enabled(),
        "dtype": str(torch.get_default_dtype()),
        "loggers": repr(logging.getLogger().handlers),
        "filters": repr(warnings.filters),
        "cuda": torch.cuda.is_initialized(),
    }
before = state()
import fxquant
after = state()
print(json.dumps({"changed": [key for key in before if before[key] != after[key]], "modules": sorted(sys.modules)}))
"""


def test_the_public_names_are_these() -> None:
    assert sorted(fxquant.__all__) == sorted(NAMES)
    assert [name for name in NAMES if not hasattr(fxquant, name)] == []


def test_the_backend_is_found_by_its_name() -> None:
    (found,) = entry_points(group="torch_dynamo_backends", name="fxquant")
    assert found.load() is fxquant.backend


def test_importing_changes_nothing_and_builds_nothing(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    environment = os.environ | {"FXQUANT_CACHE_DIR": str(cache), "CXX": "/no/such/compiler"}
    done = subprocess.run([sys.executable, "-c", IMPORT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["changed"] == []
    assert not cache.exists()
    # neither the libraries of our extras, nor what only a compile needs
    assert {"transformers", "diffusers", "rich", "torch._inductor.compile_fx"}.isdisjoint(found["modules"])
