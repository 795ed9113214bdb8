"""How many requests are under way at once: more as long as that brings more answers a second, fewer when the server complains."""

import time
from collections.abc import Callable

_GROWTH, _SHRINK = 1.5, 0.7
_COMPLAINTS = 0.2  # of all that comes back, for the limit to fall
_BETTER = 1.05  # times the rate before, for a higher limit to stay
_LOOK_AGAIN = 20  # windows between two tries at a limit that brought nothing


class AdaptiveLimit:
    """A limit that follows what a server can take.

    A window is over when twice as many answers have come as the limit is. While the rate grows with the limit, the limit grows by half; when it does not, the limit goes back
    and stays for a while. When a fifth of what comes back are complaints (429, 503, time-outs), 30% is taken off.

    Args:
        first, most: the limit at the beginning, and at any time.
        clock: in seconds.
    """

    def __init__(self, first: int, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.most, self._clock = most, clock
        self.limit = min(first, most)
        self._before = (0, 0.0)  # the last limit that is known to be good, and its rate
        self._rest = 0  # windows until a higher limit is tried again
        self._begin()

    def _begin(self) -> None:
        self._answers, self._complaints, self._since = 0, 0, self._clock()

    def answered(self) -> None:
        """An answer has come."""
        self._answers += 1
        if self._answers < 2 * self.limit:
            return
        rate = self._answers / max(self._clock() - self._since, 1e-9)
        limit, best = self._before
        if self._rest > 0:
            self._rest -= 1
            self._before = (self.limit, rate)
        elif limit and self.limit > limit and rate < _BETTER * best:
            self.limit, self._rest = limit, _LOOK_AGAIN
        else:
            self._before = (self.limit, rate)
            self.limit = min(self.most, max(self.limit + 1, int(self.limit * _GROWTH)))
        self._begin()

    def complained(self) -> None:
        """The server was asked for too much, or seems to be."""
        self._complaints += 1
        back = self._answers + self._complaints
        if back >= min(10, self.limit) and self._complaints >= max(2.0, _COMPLAINTS * back):
            self.limit = max(1, int(self.limit * _SHRINK))
            self._rest = 2
            self._begin()
