"""llama.cpp on SmolLM2: the package's file, requantized by llama.cpp itself to Q8_0 and Q4_0."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.peers import smollm2
from benchmarks.peers.absent import Absent, need
from benchmarks.peers.subjects import Subject


def _requantized(kind: str) -> Path:
    """The GGUF file in that format, made once; its head and embedding are llama.cpp's choice."""
    library = need("llama_cpp", "llama-cpp-python")
    target = smollm2.FOLDER / f"{kind}.gguf"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        options = library.llama_model_quantize_default_params()
        options.ftype, options.nthread, options.allow_requantize = _FILE_TYPES[kind], 1, True
        source, part = smollm2.gguf_file(), target.with_suffix(".part")
        failed = library.llama_model_quantize(bytes(source), bytes(part), ctypes.byref(options))
        if failed:
            raise Absent(f"llama.cpp could not requantize {source.name} to {kind}: status {failed}")
        part.replace(target)
    return target


def llama_cpp(kind: str, subject: Subject, threads: int) -> Callable[[], Tensor]:
    """Decodes the subject's tokens behind its prefix; logits of the last one, as the model here gives."""
    library = need("llama_cpp", "llama-cpp-python")
    if subject.tokens is None:
        raise Absent("llama.cpp reads GGUF files of language models")
    prefix, tokens = subject.tokens
    context = max(128, len(prefix) + len(tokens))
    llama = library.Llama(
        str(_requantized(kind)),
        n_ctx=context,
        n_batch=max(len(prefix), len(tokens)),
        n_ubatch=max(len(prefix), len(tokens)),
        n_threads=threads,
        n_threads_batch=threads,
        verbose=False,
    )
    if prefix:
        llama.eval(list(prefix))
    size = llama.n_vocab()

    def run() -> Tensor:
        llama.n_tokens = len(prefix)  # eval drops what the cache holds behind it
        llama.eval(list(tokens))
        logits = library.llama_get_logits_ith(llama.ctx, -1)
        buffer = (ctypes.c_float * size).from_address(ctypes.addressof(logits.contents))
        return torch.frombuffer(buffer, dtype=torch.float32).clone()  # the next call writes over it

    return run


_FILE_TYPES = {"Q4_0": 2, "Q8_0": 7}

TOOLS: dict[str, Callable[[Subject, int], Callable[[], Tensor]]] = {
    "llama.cpp Q8_0": partial(llama_cpp, "Q8_0"),
    "llama.cpp Q4_0": partial(llama_cpp, "Q4_0"),
}
