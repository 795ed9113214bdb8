"""Labelled documents from JSON lines: texts, and a label or a number each."""

import json
from pathlib import Path
from typing import Any

from regrowth.data_pipeline.document import sound_text
from regrowth.data_pipeline.sources.base import read_lines
from regrowth.data_pipeline.sources.paths import open_packed
from regrowth.errors import UserError

_LINE_BYTES = 1 << 28


def read_labelled(path: Path, key: str, field: str | None = None) -> list[tuple[str, Any]]:
    """(text, value of `field`) of each line; without a field the value is None.

    Raises:
        UserError: the file is missing, or a line is no object with a text and the field; a label with a line break.
    """
    found: list[tuple[str, Any]] = []
    try:
        with open_packed(str(path)) as stream:
            for offset, line in read_lines(stream, _LINE_BYTES):
                if line is None or not line.strip():
                    continue
                found.append(_row(line, f"{key} = {path}, byte {offset}", field))
    except OSError as error:
        raise UserError(f"{key} = {path}: cannot be read ({error}).") from error
    if not found:
        raise UserError(f"{key} = {path}: holds no document.")
    return found


def _row(line: bytes, where: str, field: str | None) -> tuple[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error}).") from error
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise UserError(f"{where}: no object with a text.")
    if field is None:
        return sound_text(row["text"]), None
    if field not in row:
        raise UserError(f"{where}: has no field {field}; it has {', '.join(sorted(row))}.")
    if isinstance(value := row[field], str) and ("\n" in value or "\r" in value):
        raise UserError(f"{where}: {field} = {value!r}: a label with a line break. Labels stand on one line; strip it.")
    return sound_text(row["text"]), row[field]


def texts_of(path: Path, key: str) -> list[str]:
    """The texts alone."""
    return [text for text, _ in read_labelled(path, key)]
