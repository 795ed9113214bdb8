"""What is written of fitted selectors and known of models, without loading either."""

from functools import lru_cache
from pathlib import Path
from typing import Any

from regrowth.errors import UserError
from regrowth.files import fingerprint, read_json, sha256_of

FORMAT = 1
RECORD = "selector.json"


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
    """A hash by which a model is known again, wherever it lies: of its files' contents. A model that is no folder here (a name on the Hub) is known by its name."""
    folder = Path(path)
    if not folder.is_dir():
        return path
    found = []
    for file in sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix in {".json", ".safetensors", ".model", ".txt", ".bin"}):
        state = file.stat()
        found.append([str(file.relative_to(folder)), _sha256(str(file.resolve()), state.st_size, state.st_mtime_ns)])
    return fingerprint(found)


@lru_cache(maxsize=4096)
def _sha256(path: str, size: int, modified: int) -> str:
    """Of a file in a certain state, taken once a process."""
    return sha256_of(Path(path))
