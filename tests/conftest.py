"""What all tests share: golden files."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the golden files anew; review them as a diff")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """``golden(name, text)`` compares `text` with tests/golden/`name`, or writes it with --update-golden."""

    def check(name: str, text: str) -> None:
        path = GOLDEN / name
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            return
        if not path.exists():
            pytest.fail(f"there is no golden file {path}: make it with --update-golden and review it", pytrace=False)
        wanted = path.read_text(encoding="utf-8")
        if text != wanted:
            lines = difflib.unified_diff(wanted.splitlines(), text.splitlines(), f"golden/{name}", "now", lineterm="")
            pytest.fail("\n".join([*lines, "if the change is meant: --update-golden"]), pytrace=False)

    return check


@pytest.fixture(scope="session", autouse=True)
def no_plans(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No tuned plans: what the user has tuned on this machine would change graphs, reports and goldens."""
    folder = tmp_path_factory.mktemp("no_plans")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fxquant.tuning.plans.cache.cache_dir", lambda: folder)
        yield


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Dynamo without a memory of earlier tests, and none of this one for later ones."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
