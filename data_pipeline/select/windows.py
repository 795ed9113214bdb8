"""Long documents in windows: every token has its loss once, with as much context as the window holds, and none from another document."""

from typing import NamedTuple


class Window(NamedTuple):
    """Tokens `begin` to `stop` of a document go through the model; those from `scored` on have their losses taken."""

    begin: int
    stop: int
    scored: int


def windows(tokens: int, window: int, stride: int) -> list[Window]:
    """Windows over a document of so many tokens, the one in front of it included, which has no loss.

    The first holds `window` tokens; each of those behind ends `stride` later, and takes the losses of what no window before it had. Nothing is left over: the last may move on by less.
    """
    if tokens < 2:
        return []
    found = [Window(0, min(window, tokens), 1)]
    while (done := found[-1].stop) < tokens:
        stop = min(done + stride, tokens)
        found.append(Window(max(0, stop - window), stop, done))
    return found
