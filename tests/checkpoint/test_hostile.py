"""Damaged and hostile folders: a named error, and no crash, no allocation, no code that runs."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fxquant
from fxquant.checkpoint.tensor_files import read_file
from fxquant.errors import FxQuantError, InvalidCheckpoint, InvalidQuantizationMap, StateDictMismatch
from tests.checkpoint.folders import answer, small
from tests.models import Decoder

Header = dict[str, Any]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "q"
    fxquant.save(small("int4wo", layers=1), folder, max_shard_size="20KB")
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "q"))


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """A folder of one file."""
    fxquant.save(small("int4wo", layers=1), tmp_path / "one")
    return tmp_path / "one"


def loaded(folder: Path) -> torch.nn.Module:
    return fxquant.load(folder, factory=lambda: Decoder(layers=1))


def refused(folder: Path, words: str) -> None:
    with pytest.raises(InvalidCheckpoint, match=words):
        loaded(folder)


def rewritten(path: Path, edit: Callable[[Header], object]) -> None:
    """Edit the header of a safetensors file; its tensors' bytes stay."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    text = edit(header)
    text = text if isinstance(text, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def some(header: Header) -> Any:
    return header["lm_head.weight_codes"]


def swap(header: Header) -> None:
    some(header)["data_offsets"], header["embed.weight"]["data_offsets"] = [0, 4], [0, 4]


EDITS: dict[str, tuple[Callable[[Header], object], str]] = {
    "offset beyond the file": (lambda h: some(h).update(data_offsets=[0, 1 << 40]), "is given"),
    "shape too large": (lambda h: some(h).update(shape=[1 << 40, 1 << 7]), "is given 4096 bytes"),
    "shape that overflows": (lambda h: some(h).update(shape=[1 << 47, 1 << 47, 1 << 47]), "no list of sizes"),
    "shape of zeros and giants": (lambda h: some(h).update(shape=[0, 1 << 48, 1 << 48]), "no list of sizes"),
    "shape and offsets too large": (
        lambda h: some(h).update(shape=[1 << 40], data_offsets=[0, 1 << 40]),
        r"begins at|cut off",
    ),
    "negative size": (lambda h: some(h).update(shape=[-1, 4]), "no list of sizes"),
    "size that is a float": (lambda h: some(h).update(shape=[1.0]), "no list of sizes"),
    "size that is true": (lambda h: some(h).update(shape=[True]), "no list of sizes"),
    "many dimensions": (lambda h: some(h).update(shape=[1] * 1000), "no list of sizes"),
    "shape that is text": (lambda h: some(h).update(shape="16"), "no list of sizes"),
    "offsets backwards": (lambda h: some(h).update(data_offsets=[8, 4]), "no range"),
    "one offset": (lambda h: some(h).update(data_offsets=[8]), "no range"),
    "overlapping": (lambda h: some(h).update(shape=[0], data_offsets=[5, 5]), "is due|cut off"),
    "unknown dtype": (lambda h: some(h).update(dtype="PICKLE"), "not known"),
    "dtype that is no text": (lambda h: some(h).update(dtype=[]), "not known"),
    "another dtype": (lambda h: some(h).update(dtype="F64"), "is given"),
    "an entry too many": (lambda h: some(h).update(code="os.system"), "not just"),
    "entry that is text": (lambda h: h.update({"lm_head.weight_codes": "x"}), "not just"),
    "metadata of numbers": (lambda h: h.update(__metadata__={"a": 1}), "no object of texts"),
    "a list": (lambda _: b"[1, 2]", "no object"),
    "deep nesting": (lambda _: b"[" * 200_000, "cannot be read"),
    "twice the same key": (lambda _: b'{"a": {}, "a": {}}', "twice"),
    "no UTF-8": (lambda _: b"\xff\xfe{}", "cannot be read"),
    "a giant number": (lambda _: b'{"a": ' + b"9" * 10_000 + b"}", "cannot be read|not just"),
    "NaN": (lambda _: b'{"a": NaN}', "no JSON"),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_header_that_lies_is_named(name: str, single: Path) -> None:
    edit, words = EDITS[name]
    rewritten(single / "model.safetensors", edit)
    refused(single, words)


def test_shapes_that_do_not_fit_the_model_are_named(single: Path) -> None:
    rewritten(single / "model.safetensors", lambda h: h["norm.weight"].update(shape=[4, 16]))
    with pytest.raises(StateDictMismatch, match=r"norm\.weight"):
        loaded(single)
    rewritten(single / "model.safetensors", lambda h: h["norm.weight"].update(shape=[64]))
    rewritten(single / "model.safetensors", lambda h: some(h).update(shape=some(h)["shape"][::-1]))
    with pytest.raises(StateDictMismatch, match="lm_head"):
        loaded(single)


@pytest.mark.parametrize("length", [0, 1, 1 << 20, 1 << 33, (1 << 64) - 1])
def test_a_header_length_that_lies_is_named(length: int, single: Path) -> None:
    path = single / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    refused(single, "cut off|cannot be read")


def test_a_huge_header_is_not_read(single: Path) -> None:
    path = single / "model.safetensors"
    with path.open("wb") as file:  # sparse: it takes no room
        file.write((1 << 32).to_bytes(8, "little"))
        file.truncate(1 << 33)
    refused(single, "4294967296 bytes; the most is")


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 200, -1, -64])
def test_a_truncated_file_is_named(size: int, single: Path) -> None:
    path = single / "model.safetensors"
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)
    refused(single, "too few|cut off|cannot be read|takes")


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("exploded",)


def test_a_pickle_in_disguise_is_refused_and_does_not_run(
    single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("model.safetensors", "fxquant.json"):
        kept = (single / name).read_bytes()
        (single / name).write_bytes(pickle.dumps(Bomb()))
        refused(single, "cut off|cannot be read|the most is")
        torch.save({"a": Bomb()}, single / name)
        refused(single, "cut off|cannot be read|the most is")
        (single / name).write_bytes(kept)
    (single / "model.safetensors").rename(single / "pytorch_model.bin")
    (single / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    refused(single, r"pytorch_model.bin', a pickle")
    assert not (tmp_path / "exploded").exists()


ELSEWHERE = ["../q2/a.safetensors", "/etc/passwd", "sub/a.safetensors", "..\\a.safetensors", "C:a.safetensors", "a.bin"]
ELSEWHERE += ["..", ".safetensors", "a\0.safetensors"]


@pytest.mark.parametrize("name", [*ELSEWHERE, 3, None, ["a"]], ids=str)
def test_an_index_that_points_elsewhere_is_named(name: object, folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    told = json.loads(index.read_text())
    told["weight_map"]["norm.weight"] = name
    index.write_text(json.dumps(told))
    refused(folder, "no safetensors file of this folder")


def test_an_index_that_lies_is_named(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    told = json.loads(index.read_text())
    for edit, words in (
        ({**told["weight_map"], "more": told["weight_map"]["norm.weight"]}, "does not hold it"),
        ({key: name for key, name in told["weight_map"].items() if key != "norm.weight"}, "holds 'norm.weight'"),
        ({**told["weight_map"], "more": "lost.safetensors"}, "No such file"),
        ([], "no weight_map"),
    ):
        index.write_text(json.dumps({"weight_map": edit}))
        refused(folder, words)


def test_pipes_and_devices_are_not_opened(single: Path) -> None:
    path = single / "model.safetensors"
    path.unlink()
    os.mkfifo(path)
    refused(single, "no ordinary file")  # and does not wait for a writer
    path.unlink()
    path.symlink_to("/dev/zero")
    refused(single, "no ordinary file")
    path.unlink()
    path.mkdir()
    refused(single, "no ordinary file")


DESCRIPTIONS: dict[str, tuple[Callable[[Any], object], type[FxQuantError], str]] = {
    "newer": (lambda d: d.update(format=2), InvalidCheckpoint, "format '2'.*reads format 1"),
    "no format": (lambda d: d.pop("format"), InvalidCheckpoint, "reads format 1"),
    "true format": (lambda d: d.update(format=True), InvalidCheckpoint, "reads format 1"),
    "modules a list": (lambda d: d.update(modules=[]), InvalidCheckpoint, "'modules' is no object"),
    "module a text": (lambda d: d["modules"].update(lm_head="x"), InvalidCheckpoint, "no object"),
    "number for a text": (lambda d: d["modules"]["lm_head"].update(weights=4), InvalidCheckpoint, "texts alone"),
    "unknown dtype": (lambda d: d["modules"]["lm_head"].update(dtype="int3"), InvalidCheckpoint, "no dtype"),
    "shared with what is not": (lambda d: d.update(shared={"a": "b"}), InvalidCheckpoint, "stored as 'b'"),
    "no weights": (lambda d: d.pop("weights"), InvalidCheckpoint, "'weights' is no object"),
    "group size": (lambda d: d["weights"]["lm_head.weight"].update(group_size=3), InvalidCheckpoint, "group_size"),
    "spec": (lambda d: d["weights"]["lm_head.weight"].update(spec="int9/x"), InvalidCheckpoint, "int9"),
    "weight of none": (lambda d: d["weights"].update(x=d["weights"]["lm_head.weight"]), InvalidCheckpoint, "lost"),
    "no module": (lambda d: d["modules"].update(nowhere=d["modules"]["lm_head"]), InvalidQuantizationMap, "nowhere"),
    "another format": (lambda d: d["modules"]["lm_head"].update(weights="int8/channel"), StateDictMismatch, "lm_head"),
    "no such format": (lambda d: d["modules"]["lm_head"].update(weights="os"), InvalidQuantizationMap, "os"),
    "a field too many": (lambda d: d["modules"]["lm_head"].update(more="x"), InvalidQuantizationMap, "more"),
    "a module less": (lambda d: d["modules"].pop("lm_head"), StateDictMismatch, "lm_head"),
    "nothing": (lambda d: d.update(modules={}), InvalidQuantizationMap, "empty"),
}


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_a_description_that_lies_is_named(name: str, single: Path) -> None:
    edit, error, words = DESCRIPTIONS[name]
    told = json.loads((single / "fxquant.json").read_text())
    edit(told)
    (single / "fxquant.json").write_text(json.dumps(told))
    with pytest.raises(error, match=words):
        loaded(single)


def test_a_giant_description_is_not_read(single: Path) -> None:
    with (single / "fxquant.json").open("wb") as file:
        file.truncate(1 << 34)
    refused(single, "is not read")


def test_a_folder_of_nobody_is_named(tmp_path: Path, single: Path) -> None:
    refused(tmp_path / "nowhere", "no such folder")
    refused(tmp_path, "it is not there")
    (single / "fxquant.json").unlink()
    refused(single, "nor is a map of Quanto's")


def test_tensors_at_any_address_are_read(single: Path) -> None:
    """Mapped at an odd address, where a kernel's aligned loads would crash."""
    model = small("int4wo", layers=1)
    for shift in range(1, 9):
        rewritten(single / "model.safetensors", lambda h, shift=shift: json.dumps(h).encode() + b" " * shift)
        assert torch.equal(answer(loaded(single)), answer(model))
    addresses = {t.data_ptr() % 64 for t in read_file(single / "model.safetensors").tensors.values()}
    assert addresses != {0}
    codes = [b for module in loaded(single).modules() for b in module._buffers.values() if b is not None and b.numel()]
    assert codes
    assert {buffer.data_ptr() % 64 for buffer in codes} == {0}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_bytes_load_or_are_named(data: st.DataObject, folder: Path, saved: Path) -> None:
    name = data.draw(st.sampled_from(sorted(path.name for path in saved.iterdir())))
    raw = bytearray((saved / name).read_bytes())
    header = 8 + int.from_bytes(raw[:8], "little") if name.endswith(".safetensors") else len(raw)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, header - 1) | st.integers(0, len(raw) - 1))
        raw[place] = data.draw(st.integers(0, 255))
    (folder / name).write_bytes(raw)
    try:
        answer(loaded(folder))
    except FxQuantError:
        pass
    finally:
        shutil.copy(saved / name, folder / name)
