"""The two doors in: a graph of Dynamo's, or an ExportedProgram, becomes the one canonical graph that passes work on."""

from __future__ import annotations

from fxquant.capture.dynamo import back_to_dynamo, from_dynamo
from fxquant.capture.export import from_export
from fxquant.capture.installed import with_tensors_as_inputs

__all__ = ["back_to_dynamo", "from_dynamo", "from_export", "with_tensors_as_inputs"]
