"""Ranks that are slower than the others, by name. In a step all wait for the slowest, so that all look alike slow; each one's own work is measured alone.

Now and then every rank times the same small matrix product, without talking to anyone, and adds up how long it waited for data. A device that is throttled,
a core that is shared, a node whose disk is slow then stand out from the median of all ranks.
"""

import socket
import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from regrowth.pretrain.config import SupervisionConfig

_REPEATS = 5  # of which the fastest counts: what else happens to run does not
_LEAST_WAIT = 0.05  # share of the time between two looks, below which waiting for data does not matter


class Stragglers:
    """Asked after each step, on every rank alike."""

    def __init__(self, config: SupervisionConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.waited, self.began = 0.0, time.perf_counter()
        self._suspects: set[tuple[str, int]] = set()
        self._named: set[tuple[str, int]] = set()
        self._hosts: list[Any] = []

    def look(self, step: int, waited: float) -> list[dict[str, Any]]:
        """Who has become a straggler, and who is none any more: slower than `straggler_factor` times the median in two looks in a row.

        Args:
            waited: seconds in which this rank waited for the step's data.
        """
        self.waited += waited
        every = self.config.straggler_every
        if not every or self.world_size < 2 or (step + 1) % every:
            return []
        now = time.perf_counter()
        mine = torch.tensor([probe_seconds(self.device), self.waited, now - self.began], dtype=torch.float64, device=self.device)
        everyone = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(everyone, mine)
        times = torch.stack(everyone).cpu().numpy()  # [ranks, 3]
        self.waited, self.began = 0.0, now
        if not self._hosts:
            self._hosts = [None] * self.world_size
            dist.all_gather_object(self._hosts, socket.gethostname())
        slow = {("arithmetic", rank): factor for rank, factor in slower(times[:, 0], self.config.straggler_factor).items()}
        slow |= {
            ("data", rank): factor
            for rank, factor in slower(times[:, 1], self.config.straggler_factor).items()
            if times[rank, 1] > _LEAST_WAIT * times[rank, 2]
        }
        confirmed = self._suspects & set(slow)
        self._suspects = set(slow)
        told = [self._event("straggler", step, key, times=round(slow[key], 2)) for key in sorted(confirmed - self._named)]
        told += [self._event("straggler recovered", step, key) for key in sorted(self._named - set(slow))]
        self._named = (self._named | confirmed) & set(slow)
        return told

    def _event(self, event: str, step: int, key: tuple[str, int], **more: Any) -> dict[str, Any]:
        return {"event": event, "step": step, "rank": key[1], "host": self._hosts[key[1]], "what": key[0], **more}


def slower(seconds: np.ndarray, factor: float) -> dict[int, float]:
    """Rank -> how many times the median it takes, of those that take more than `factor` times. With two ranks the other one is the measure.

    Args:
        seconds: float64 [ranks].
    """
    usual = float(np.min(seconds) if len(seconds) == 2 else np.median(seconds))
    least = max(usual, 1e-9)
    return {rank: float(took / least) for rank, took in enumerate(seconds) if took > factor * least}


def probe_seconds(device: torch.device) -> float:
    """What a fixed matrix product takes here, at its fastest."""
    size, dtype = (4096, torch.bfloat16) if device.type == "cuda" else (192, torch.float32)
    left = torch.full((size, size), 0.5, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(_REPEATS):
        _settle(device)
        began = time.perf_counter()
        _ = left @ left
        _settle(device)
        best = min(best, time.perf_counter() - began)
    return best


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
