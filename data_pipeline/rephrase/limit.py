"""How many requests are under way at once: more as long as that brings more answers a second, fewer when the server complains."""

import math

_FIRST_GROWTH, _GROWTH, _SHRINK = 2.0, 1.5, 0.7
_SPARE = 1.25  # times what was enough, so that something always waits at the server
_COMPLAINTS = 0.2  # of all that comes back, for the limit to fall
_BETTER = 1.05  # times the rate before, for a higher limit to stay
_LOOK_AGAIN = 20  # windows between two tries at a limit that brought nothing


class AdaptiveLimit:
    """A limit that follows what a server can take.

    The rate is what is under way over the mean time of an answer (Little's law), which bursts do not disturb. A window begins when as many answers have come as the limit is, so
    that those from before it are not counted, and ends when as many again have come. The limit doubles until the rate does not grow with it any more, goes back, and from then on
    tries half as many more now and then. When a fifth of what comes back are complaints (429, 503, time-outs), 30% is taken off.

    Args:
        first, most: the limit at the beginning, and at any time.
    """

    def __init__(self, first: int, most: int) -> None:
        self.most, self.limit = most, min(first, most)
        self._before = (0, 0.0)  # the last limit that is known to be good, and its rate
        self._rest = 0  # windows until a higher limit is tried again
        self._growth, self._climbing = _FIRST_GROWTH, True
        self._begin()

    def _begin(self) -> None:
        self._answers = self._complaints = self._under_way = 0
        self._seconds = 0.0

    def answered(self, seconds: float, under_way: int) -> None:
        """An answer has come.

        Args:
            seconds: that it took.
            under_way: requests, when it came, itself included.
        """
        self._answers += 1
        if self._answers <= self.limit:
            return
        self._seconds += seconds
        self._under_way += under_way
        if self._answers < 2 * self.limit:
            return
        rate = self._under_way / max(self._seconds, 1e-9)
        limit, best = self._before
        if self._rest > 0:
            self._rest -= 1
            self._before = (self.limit, rate)
        elif limit and self.limit > limit and rate < _BETTER * best:
            # A limit from which higher ones were tried before has its spare already.
            self.limit = min(self.most, math.ceil(limit * _SPARE)) if self._climbing else limit
            self._rest, self._growth, self._climbing = _LOOK_AGAIN, _GROWTH, False
        else:
            self._climbing = self._climbing or rate >= _BETTER * best
            self._before = (self.limit, rate)
            self.limit = min(self.most, max(self.limit + 1, int(self.limit * self._growth)))
        self._begin()

    def complained(self) -> None:
        """The server was asked for too much, or seems to be."""
        self._complaints += 1
        back = self._answers + self._complaints
        if back >= min(10, self.limit) and self._complaints >= max(2.0, _COMPLAINTS * back):
            self.limit = max(1, int(self.limit * _SHRINK))
            self._rest, self._growth, self._climbing = 2, _GROWTH, True
            self._begin()
