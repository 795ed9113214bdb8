"""The compiler of the text kernels. Imported late: only transforms that count words or n-grams need it.

Machine code is cached in the user's own cache folder, in a folder named by a hash of all kernel sources: numba itself looks only at the file of
the function it compiles, and would go on using old code of another file's helpers after an update.
"""

import hashlib
import os
from functools import cache
from pathlib import Path
from typing import Any

from regrowth.errors import need
from regrowth.files import user_cache

_numba: Any = need("numba", "counting words, lines and n-grams at speed")


@cache
def cache_folder() -> Path | None:
    """Where compiled kernels are kept; None where there is no folder of the user's own (then every process compiles anew)."""
    digest = hashlib.sha256(_numba.__version__.encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    try:
        folder = user_cache() / f"kernels-{digest.hexdigest()[:16]}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder if os.access(folder, os.W_OK) and folder.stat().st_uid == os.getuid() else None
    except (OSError, RuntimeError):
        return None


def jit(function: Any) -> Any:
    """Compile `function` to machine code at its first call; later processes load it in milliseconds."""
    folder = cache_folder()
    if folder is None:
        return _numba.njit(nogil=True, error_model="numpy")(function)
    before, _numba.config.CACHE_DIR = _numba.config.CACHE_DIR, str(folder)
    try:
        return _numba.njit(cache=True, nogil=True, error_model="numpy")(function)
    finally:
        _numba.config.CACHE_DIR = before
