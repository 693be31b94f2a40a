"""The dump folder: one folder a graph, files that sort in pipeline order, a difference between neighbours."""

from __future__ import annotations

import difflib
import itertools
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import NamedTemporaryFile

from torch.fx import GraphModule

from fxquant.annotation import PassResult
from fxquant.dump.drawing import dot
from fxquant.dump.printer import text
from fxquant.errors import DumpFailed
from fxquant.report import GraphReport
from fxquant.report.records import SiteSqnr, stable_text


class Dumper:
    """The observer that writes a graph's folder: call it after each stage, then `finish` it with the report.

    Each graph gets a folder ``graph_000``, ``graph_001``, … under `directory` that no other graph and no other process
    has; it is made when the first stage comes, and a stage that comes again begins the next graph's. Every method
    raises `DumpFailed` if something cannot be written.
    """

    def __init__(self, directory: str | os.PathLike[str], summarize: Callable[[GraphReport], object] = str) -> None:
        """`summarize` makes the text of the summary from the report."""
        self._summarize = summarize
        self.directory = Path(directory)
        self.folder: Path | None = None
        self._stages: list[str] = []
        self._body = ""
        self._gm: GraphModule | None = None
        self._report: GraphReport | None = None

    def __call__(self, stage: str, gm: GraphModule, result: PassResult | None = None) -> None:
        """Write ``NN-stage.txt``, and ``NN-stage.diff`` against the stage before."""
        if self.folder is None or stage in self._stages:
            self.folder, self._stages, self._report = _claim_folder(self.directory), [], None
        self._stages.append(stage)
        self._gm = gm
        number = len(self._stages)
        before, self._body = self._body, text(gm)
        self._write(f"{number:02d}-{stage}.txt", text(gm, f"{number:02d}-{stage}"))
        if number > 1:
            names = (f"{number - 1:02d}-{self._stages[-2]}", f"{number:02d}-{stage}")
            self._write(f"{names[1]}.diff", _difference(names, before, self._body))

    def finish(self, report: GraphReport) -> None:
        """Write the summary, the report as JSON, the drawing of the sites, and the last stage as Python."""
        assert self.folder is not None, "finish comes after at least one stage"
        assert self._gm is not None
        self._report = replace(report, name=self.folder.name)
        self._write(f"{len(self._stages) + 1:02d}-lowered.py", python_text(self._gm))
        self._write("sites.dot", dot(self._gm))
        self._write_report(self._report)

    def measured(self, sqnr: Mapping[str, SiteSqnr]) -> None:
        """Write the last stage and the report again, with each site's SQNR by node name. Comes after `finish`."""
        assert self._gm is not None
        assert self._report is not None, "measured comes after finish"
        stage = f"{len(self._stages):02d}-{self._stages[-1]}"
        self._write(f"{stage}.txt", text(self._gm, stage, sqnr))
        self._write_report(self._report.with_sqnr(sqnr))

    def _write_report(self, report: GraphReport) -> None:
        self._write("report.json", json.dumps(report.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        self._write("00-summary.txt", f"{self._summarize(report)}\n")

    def _write(self, name: str, content: str) -> None:
        assert self.folder is not None
        path = self.folder / name
        try:
            write_atomically(path, content)
        except OSError as error:
            raise DumpFailed(path, error) from error


def _claim_folder(directory: Path) -> Path:
    """A new folder: the lowest number that nobody has."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DumpFailed(directory, error) from error
    for number in itertools.count():
        folder = directory / f"graph_{number:03d}"
        try:
            # Making the folder is what claims the number: only one process can succeed.
            folder.mkdir()
        except FileExistsError:
            continue
        except OSError as error:
            raise DumpFailed(folder, error) from error
        return folder
    raise AssertionError("counting does not end")


def write_atomically(path: Path, content: str) -> None:
    """Write a file so that a reader finds the old text or the new one, never a part. Raises OSError."""
    with NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False) as temporary:
        try:
            temporary.write(content)
            temporary.close()
            os.chmod(temporary.name, 0o644)
            os.replace(temporary.name, path)
        except BaseException:
            os.unlink(temporary.name)
            raise


def python_text(gm: GraphModule) -> str:
    """The graph as torch prints it: Python with types, for reading; ``gm.to_folder`` makes a module that runs alone."""
    printed = stable_text(gm.print_readable(print_output=False))
    return f"from __future__ import annotations\n\nimport torch\n\n\n{printed}\n"


def _difference(names: tuple[str, str], old: str, new: str) -> str:
    """A unified diff with one line of context; empty if the stage changed nothing."""
    lines = difflib.unified_diff(old.splitlines(), new.splitlines(), *names, lineterm="", n=1)
    return "".join(f"{line}\n" for line in lines)
