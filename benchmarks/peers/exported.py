"""Peers that take an exported model: OpenVINO with NNCF, ONNX Runtime."""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.absent import Absent, need
from benchmarks.peers.subjects import Inputs, Subject

os.environ.setdefault("OPENVINO_TELEMETRY_OPT_OUT", "1")  # there is no network to send to


def _openvino_model(subject: Subject) -> Any:
    openvino = need("openvino")
    _only_tensors(subject)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return openvino.convert_model(torch.export.export(subject.model, subject.inputs, strict=False))


def calibrated(model: Any, calibration: Sequence[Inputs]) -> Any:
    """NNCF's 8-bit weights and activations, in its setting for transformers.

    Without SmoothQuant: on the few rows of calibration here it makes the error of one linear 0.17 instead of 0.01.
    """
    nncf = need("nncf")
    data = nncf.Dataset([_arrays(one) for one in calibration])
    plain = nncf.AdvancedQuantizationParameters(
        smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(matmul=-1, convolution=-1)
    )
    count = len(calibration)
    return nncf.quantize(
        model, data, model_type=nncf.ModelType.TRANSFORMER, subset_size=count, advanced_parameters=plain
    )


def weights(mode: str, model: Any, calibration: Sequence[Inputs]) -> Any:
    """NNCF's weight compression in `mode`; 4 bits in groups of 64, which divides the K of every model here."""
    nncf = need("nncf")
    grouped = {"group_size": 64, "ratio": 1.0} if mode.startswith("INT4") else {}
    return nncf.compress_weights(model, mode=nncf.CompressWeightsMode[mode], **grouped)


class Exported:
    """A tool that is prepared once a model, which takes long, and started for a number of threads."""

    def __init__(self, prepare: Callable[[Subject], Any], start: Callable[[Any, Subject, int], Callable[[], Tensor]]):
        self._prepare, self._start = prepare, start
        self._prepared: tuple[Subject, Any] | None = None

    def __call__(self, subject: Subject, threads: int) -> Callable[[], Tensor]:
        if self._prepared is None or self._prepared[0] is not subject:
            self._prepared = subject, self._prepare(subject)
        return self._start(self._prepared[1], subject, threads)


def openvino(change: Callable[[Any, Sequence[Inputs]], Any], subject: Subject) -> Any:
    """OpenVINO's model, quantized by NNCF."""
    logging.getLogger("nncf").setLevel(logging.ERROR)
    return change(_openvino_model(subject), subject.calibration)


def openvino_request(model: Any, subject: Subject, threads: int) -> Callable[[], Tensor]:
    """OpenVINO's CPU plugin, one stream, otherwise as it is out of the box: in bfloat16 where the CPU has it."""
    options = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": threads}
    request = need("openvino").Core().compile_model(model, "CPU", options).create_infer_request()
    arrays = _arrays(subject.inputs)
    return lambda: torch.from_numpy(request.infer(arrays, share_inputs=True, share_outputs=True)[0])


def onnx_int8(subject: Subject) -> bytes:
    """The ONNX file with ONNX Runtime's dynamic quantization, one scale a channel of the weight."""
    need("onnxscript")
    _only_tensors(subject)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    quantization = need("onnxruntime.quantization", "onnx")
    with tempfile.TemporaryDirectory(prefix="fxquant-onnx-") as folder:
        path, changed = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(subject.model, subject.inputs, path, dynamo=True, verbose=False, external_data=False)
        _forget_inner_shapes(path)
        logging.getLogger().setLevel(logging.ERROR)  # it advises on the root logger
        quantization.quantize_dynamic(path, changed, per_channel=True, weight_type=quantization.QuantType.QInt8)
        return changed.read_bytes()


def onnxruntime(model: bytes, subject: Subject, threads: int) -> Callable[[], Tensor]:
    """ONNX Runtime's CPU provider."""
    runtime = need("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # candidates take turns
    session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [argument.name for argument in session.get_inputs()]
    arrays = dict(zip(names, _arrays(subject.inputs), strict=True))
    return lambda: torch.from_numpy(session.run(None, arrays)[0])


def _forget_inner_shapes(path: Path) -> None:
    """The exporter's notes of inner shapes contradict what the quantizer makes of products with a bias."""
    onnx = need("onnx")
    model = onnx.load(path)
    del model.graph.value_info[:]
    onnx.save(model, path)


def _only_tensors(subject: Subject) -> None:
    if not subject.exportable:
        raise Absent("this model keeps a cache of its own, which it cannot export")


def _arrays(inputs: Inputs) -> list[Any]:
    return [x.numpy() for x in inputs]


TOOLS: dict[str, Callable[[Subject, int], Callable[[], Tensor]]] = {
    "OpenVINO w8a8": Exported(partial(openvino, calibrated), openvino_request),
    "OpenVINO 8-bit weights": Exported(partial(openvino, partial(weights, "INT8_ASYM")), openvino_request),
    "OpenVINO 4-bit weights": Exported(partial(openvino, partial(weights, "INT4_ASYM")), openvino_request),
    "ONNX Runtime int8": Exported(onnx_int8, onnxruntime),
}
