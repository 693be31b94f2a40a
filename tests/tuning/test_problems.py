"""Files of problems: what is read, and what is said of a bad one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fxquant.errors import NotAPlanFile
from fxquant.target import Problem
from fxquant.tuning.problems import read_problems

LINEAR = {"n": 64, "k": 128, "weights": "int8/channel", "dtype": "bfloat16"}


def written(tmp_path: Path, content: Any) -> Path:
    file = tmp_path / "shapes.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def test_a_list_and_an_object_with_one(tmp_path: Path) -> None:
    problem = Problem("linear", 0, 64, 128, "int8/channel", "", "bfloat16")
    assert read_problems(written(tmp_path, [LINEAR])) == [problem]
    assert read_problems(written(tmp_path, {"problems": [LINEAR, {**LINEAR, "m": 3}]})) == [problem, problem.with_m(3)]


def test_what_a_problem_writes_of_itself_is_read(tmp_path: Path) -> None:
    problem = Problem("quantize", 7, 0, 128, "", "int8/token", "float16", "rmsnorm")
    assert read_problems(written(tmp_path, [problem.to_json()])) == [problem]


def test_formats_are_spelled_as_lookups_do(tmp_path: Path) -> None:
    short = {"n": 64, "k": 128, "weights": "mxfp4", "activations": "int8/token/symmetric", "dtype": "bfloat16"}
    [problem] = read_problems(written(tmp_path, [short]))
    assert (problem.weights, problem.activations) == ("fp4_e2m1/group32/e8m0", "int8/token")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[", "Expecting value"),
        ([], "at least one entry"),
        ({"shapes": []}, "at least one entry"),
        ([3], "entry 0 is no object"),
        ([LINEAR, {**LINEAR, "rows": 3}], "entry 1 has the field 'rows'"),
        ([{"n": 3, "dtype": "float16"}], "entry 0 has no field 'k'"),
        ([{**LINEAR, "m": -1}], "m is -1, no size"),
        ([{**LINEAR, "k": "64"}], "k is '64', no size"),
        ([{**LINEAR, "op": "attention"}], "op is 'attention'"),
        ([{**LINEAR, "dtype": "float64"}], "dtype is 'float64'"),
        ([{**LINEAR, "weights": "int9/channel"}], "int9"),
    ],
)
def test_a_bad_file_is_named_with_the_entry(content: Any, words: str, tmp_path: Path) -> None:
    file = written(tmp_path, content)
    with pytest.raises(NotAPlanFile, match=r"shapes\.json holds no list of problems") as caught:
        read_problems(file)
    assert words in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NotAPlanFile, match="No such file"):
        read_problems(tmp_path / "none.json")
