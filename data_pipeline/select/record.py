"""What is written of fitted selectors and known of models, without loading either."""

from pathlib import Path
from typing import Any

from regrowth.errors import UserError
from regrowth.files import fingerprint, read_json, sha256_of

FORMAT = 1
RECORD = "selector.json"
_HASHED = 1 << 26  # bytes of a model's file that are read to know it again; larger ones by their ends


def read_record(folder: Path, key: str = "") -> dict[str, Any]:
    """What selector.json says.

    Raises:
        UserError: there is none.
    """
    if not (folder / RECORD).exists():
        where = f"{key} = {folder}" if key else str(folder)
        raise UserError(f"{where}: no fitted selector is here. `regrowth data select fit RECIPE` fits those of a recipe.")
    return read_json(folder / RECORD)


def model_mark(path: str) -> str:
    """A hash by which a model is known again, wherever it lies; its name where it is no folder here. Of large files the size and both ends are read."""
    folder = Path(path)
    if not folder.is_dir():
        return path
    found = []
    for file in sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix in {".json", ".safetensors", ".model", ".txt", ".bin"}):
        size = file.stat().st_size
        if size <= _HASHED:
            mark = sha256_of(file)
        else:
            with file.open("rb") as source:
                begin = source.read(1 << 20)
                source.seek(-(1 << 20), 2)
                mark = fingerprint([begin.hex(), source.read().hex()])
        found.append([str(file.relative_to(folder)), size, mark])
    return fingerprint(found)
