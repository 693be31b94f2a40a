"""Chat with a language model, quantized while it loads; the answer appears token by token.

python -m examples.chat "What is a compiler?"      (without a question: asks, until an empty line)
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

from fxquant import FxQuantConfig
from fxquant.integrations.transformers import compile_config


def load(folder: str, preset: str):
    """The quantized model, and its tokenizer."""
    config = FxQuantConfig(preset)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def answer(model, tokenizer, messages: list[dict[str, str]], tokens: int) -> str:
    """Print the answer as it is made, and return it. Decoding is compiled at the first call."""
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    found = model.generate(
        **prompt,
        max_new_tokens=tokens,
        do_sample=False,
        repetition_penalty=1.1,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        cache_implementation="static",
        max_cache_len=1024,  # one size, so one graph
        compile_config=compile_config(),
    )
    return tokenizer.decode(found[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", nargs="?")
    parser.add_argument("--model", help="a folder of transformers; by default SmolLM2-135M-Instruct")
    parser.add_argument("--preset", default="int8dq")
    parser.add_argument("--tokens", type=int, default=200, help="of an answer, at most")
    chosen = parser.parse_args(arguments)
    if chosen.model is None:
        from examples.weights import chat_model

        chosen.model = str(chat_model())
    model, tokenizer = load(chosen.model, chosen.preset)
    messages: list[dict[str, str]] = []
    while question := chosen.question or input("you: "):
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer(model, tokenizer, messages, chosen.tokens)})
        if chosen.question:
            return


if __name__ == "__main__":
    main()
