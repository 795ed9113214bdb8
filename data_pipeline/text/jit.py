"""The compiler of the text kernels. Imported late: only transforms that count words or n-grams need it."""

from typing import Any

from regrowth.errors import need

_numba: Any = need("numba", "counting words, lines and n-grams at speed")


def jit(function: Any) -> Any:
    """Compile `function` to machine code at its first call; the code is cached on disk, so later processes load it in milliseconds."""
    return _numba.njit(cache=True, nogil=True, error_model="numpy")(function)


def inline(function: Any) -> Any:
    """As `jit`, for small functions that other kernels call in their inner loops."""
    return _numba.njit(cache=True, nogil=True, error_model="numpy", inline="never")(function)
