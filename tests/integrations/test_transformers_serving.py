"""fxquant serve: transformers' server answers over HTTP as the quantized model does, compiled once."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from fxquant.errors import InvalidCheckpoint, InvalidOption
from tests.integrations.small_models import model_class, saved
from tests.integrations.test_transformers_generate import small_tokenizer, unique_graphs

transformers: Any = pytest.importorskip("transformers")
openai: Any = pytest.importorskip("openai")
pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")
pytestmark = pytest.mark.usefixtures("quiet")

ROOT = Path(__file__).parents[2]
TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
MESSAGES = [{"role": "user", "content": "w1 w2 w3 w4"}]
OTHERS = [{"role": "user", "content": "w9 w8"}, {"role": "assistant", "content": "w7"}, *MESSAGES]
NEW = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float decoder with a tokenizer and a chat template; it says no end."""
    path = saved("tied", tmp_path_factory.mktemp("served"), pad_token_id=0, eos_token_id=None, initializer_range=0.2)
    tokenizer = small_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    return path


def expected(folder: Path, messages: list[dict[str, str]], preset: str = "int8dq") -> str:
    """What the quantized model says in eager, by itself."""
    from fxquant import FxQuantConfig

    model = model_class("tied").from_pretrained(folder, quantization_config=FxQuantConfig(preset))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
    found = model.generate(**tokens, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    return tokenizer.decode(found[0, tokens["input_ids"].shape[1] :])


def asked(client: Any, model: str, messages: list[dict[str, str]], *, stream: bool) -> str:
    options = {"model": model, "messages": messages, "max_tokens": NEW, "temperature": 0.0, "stream": stream}
    answer = client.chat.completions.create(**options)
    if not stream:
        assert answer.usage.completion_tokens == NEW
        return answer.choices[0].message.content
    return "".join(chunk.choices[0].delta.content or "" for chunk in answer if chunk.choices)


def client_of(address: str) -> Any:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


@contextmanager
def running(server: Any) -> Iterator[str]:
    """The server in a thread, on a free port; its address."""
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture
def counted(fresh_dynamo: None) -> Iterator[None]:
    from torch._dynamo.utils import counters

    counters.clear()
    yield
    counters.clear()


@pytest.mark.usefixtures("counted")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_server_answers_as_the_quantized_model_and_compiles_once(folder: Path) -> None:
    from fxquant.integrations import transformers_serving as serving

    model = serving.load_served(folder, "int8dq", device="cpu")
    made, processor = serving.make_server(folder, model, host="127.0.0.1", port=0)
    serving.prepare_generation(model, processor, 64, executor="eager")
    assert unique_graphs() == 1
    with running(made.server) as address, client_of(address) as client:
        for messages in (MESSAGES, OTHERS):
            wanted = expected(folder, messages)
            for stream in (False, True):
                assert asked(client, str(folder), messages, stream=stream).split() == wanted.split()
        with pytest.raises(openai.BadRequestError) as caught:
            asked(client, "another", MESSAGES, stream=False)
    assert "pinned" in caught.value.response.text
    assert unique_graphs() == 1


def test_what_cannot_be_served_is_named(folder: Path, tmp_path: Path) -> None:
    from fxquant import FxQuantConfig
    from fxquant.integrations.transformers_serving import load_served

    model = model_class("tied").from_pretrained(folder, quantization_config=FxQuantConfig("int4wo"))
    model.save_pretrained(tmp_path)
    again = load_served(tmp_path, device="cpu")
    assert torch.equal(again.lm_head.weight_codes, model.lm_head.weight_codes)
    with pytest.raises(InvalidOption, match="quantized already"):
        load_served(tmp_path, "int8dq", device="cpu")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(InvalidCheckpoint, match="'awq'"):
        load_served(tmp_path, device="cpu")


@pytest.mark.slow
def test_the_command_serves_until_it_is_interrupted(folder: Path) -> None:
    command = [sys.executable, "-m", "fxquant.cli", "serve", str(folder), "--preset", "int8dq"]
    command += ["--rule", "*lm_head=int8wo", "--host", "127.0.0.1", "--port", "0", "--max-cache-len", "64"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ)
    assert process.stderr is not None
    said = []
    try:
        for line in process.stderr:
            said.append(line)
            if found := re.search(r"Uvicorn running on (http://\S+)", line):
                break
        else:
            pytest.fail("".join(said))
        with client_of(found[1]) as client:
            one, other = (asked(client, str(folder), MESSAGES, stream=stream) for stream in (False, True))
        assert one.split() == other.split()
        assert len(one.split()) == NEW
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert any("quantized" in line for line in said)
