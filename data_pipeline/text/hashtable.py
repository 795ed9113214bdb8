"""Open addressing over uint64 keys: arrays whose length is a power of two, in which 0 marks a free place."""

import numpy as np

from regrowth.data_pipeline.text.jit import jit


@jit
def table_size(elements):  # type: ignore[no-untyped-def]
    """A power of two at least twice `elements`."""
    size = 8
    while size < 2 * elements:
        size *= 2
    return size


@jit
def slot(table, key):  # type: ignore[no-untyped-def]
    """Where a nonzero key is, or the free place where it belongs."""
    mask = np.uint64(len(table) - 1)
    place = key & mask
    while table[place] != 0 and table[place] != key:
        place = (place + np.uint64(1)) & mask
    return place


@jit
def add_to_set(table, key):  # type: ignore[no-untyped-def]
    """Put a nonzero key into a set; whether it was there."""
    place = slot(table, key)
    known = table[place] == key
    table[place] = key
    return known
