"""What the documents say about names is true: options, presets, layers, the tree, links."""

from __future__ import annotations

import dataclasses
import re
import subprocess
from pathlib import Path

import pytest

from fxquant.spec import PRESETS, QuantConfig

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def rows(text: str, heading: str) -> list[list[str]]:
    """The cells of the table whose heading row starts with `heading`."""
    _, _, after = text.partition(f"\n| {heading} |")
    body = after.split("\n\n")[0].splitlines()[2:]
    assert body, f"no table headed {heading!r}"
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in body]


def words(cells: list[str]) -> list[str]:
    """The names in backticks of a table's first column."""
    return [word for cell in cells for word in re.findall(r"`([^`]+)`", cell)]


def layers() -> list[str]:
    """The rows of the import contract, top first, planned rooms in parentheses."""
    found = re.search(r"^layers = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None
    return re.findall(r'"([^"]+)"', found[1])


def test_the_readme_lists_every_option_and_no_other() -> None:
    table = rows((ROOT / "README.md").read_text(), "option")
    assert sorted(words([row[0] for row in table])) == sorted(f.name for f in dataclasses.fields(QuantConfig))


def test_the_readme_gives_the_defaults_that_the_code_has() -> None:
    config = QuantConfig()
    for names, default, _ in rows((ROOT / "README.md").read_text(), "option"):
        for name in words([names]):
            if name == "preset":
                assert default == '`"int8dq"`'
                assert config.default_spec == PRESETS["int8dq"]
            elif default:
                text = f'"{value}"' if isinstance(value := getattr(config, name), str) else str(value)
                assert default == f"`{text}`", name
            elif name not in ("training", "autotune"):
                assert not getattr(config, name), name


def test_the_readme_lists_every_preset() -> None:
    table = rows((ROOT / "README.md").read_text(), "preset")
    assert sorted(words([row[0] for row in table])) == sorted(PRESETS)


def test_the_architecture_names_every_layer_that_exists_in_the_order_of_the_contract() -> None:
    table = words([row[0] for row in rows((ROOT / "docs" / "architecture.md").read_text(), "layer")])
    built = [name.strip() for row in layers() for name in row.split("|") if "(" not in name]
    assert table == built


def test_the_tree_in_the_architecture_is_the_tree() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    drawn = re.findall(r"^  (\w+(?:\.py|/))", text, re.MULTILINE)
    found = [p.name if p.is_file() else f"{p.name}/" for p in (ROOT / "fxquant").iterdir()]
    assert sorted(drawn) == sorted(name for name in found if name != "__pycache__/")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_documents_lead_somewhere(document: Path) -> None:
    text = document.read_text()
    headings = {re.sub(r"[^\w -]", "", line.lstrip("# ")).lower().replace(" ", "-") for line in text.splitlines()}
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in headings, target
        elif not target.startswith("http"):
            assert (document.parent / target).exists(), target


def test_each_make_target_that_the_documents_name_exists() -> None:
    named = {
        word
        for path in DOCUMENTS
        for word in re.findall(r"`?make ([a-z-]+)`?$|`make ([a-z-]+)", path.read_text(), re.M)
    }
    targets = {name for pair in named for name in pair if name}
    assert {"demo", "test", "bench"} <= targets
    for name in targets:
        done = subprocess.run(["make", "-n", name], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
