"""ToReMi: topics weigh in the loss by how hard they are (arXiv 2504.00695).

Every so many steps, with L_l the mean loss of topic l since the last time and L the mean of those over the topics that were seen:
first stage: w <- min(w L_l / L, most) where L_l > L; last part of the run: w <- clip(w (2 - L_l / L), least, most). A sequence weighs the mean of its topics' weights.

A sequence's topics are its domain's: the parts of its name between "+" ("news+sport" has two). Weights of a step follow from the losses up to `update_delay` steps before it, no
more and no fewer, whenever its batch is built; they are the same on every rank, and part of the checkpoint. Topics that were not seen keep their weight. Losses are divided by
the sum of weights, so that only their ratios count.
"""

import math
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from regrowth.settings import Settings


class Reweight(Settings):
    """Weights of topics in the loss; defaults are the published ones."""

    every: Annotated[int, Field(ge=1)] = 100  # steps
    most: Annotated[float, Field(ge=1)] = 5.0
    least: Annotated[float, Field(gt=0, le=1)] = 0.1
    second_stage: Annotated[float, Field(ge=0, le=1)] = 0.125  # the last part of the run


class TopicWeights:
    """The weights of all domains, step by step.

    Args:
        steps: of the whole run.
    """

    def __init__(self, config: Reweight, domains: list[str], update_delay: int, steps: int) -> None:
        self.config, self.delay, self.steps = config, update_delay, steps
        self.topics_of = [sorted({part for part in domain.split("+") if part} or {domain}) for domain in domains]
        topics = sorted({topic for its in self.topics_of for topic in its})
        self._history: list[tuple[int, dict[str, float]]] = [(0, dict.fromkeys(topics, 1.0))]  # from which step on, the weights
        self._sums: dict[str, list[float]] = {}  # topic -> sum of losses and number of sequences since the last update
        self._seen = -1

    def may_build(self, step: int) -> bool:
        """Whether the losses are there that a step's weights follow from."""
        return self._seen >= step - self.delay

    def topics(self, step: int) -> dict[str, float]:
        """The weights of the topics in a step."""
        return next(weights for begin, weights in reversed(self._history) if begin <= step)

    def domains(self, step: int) -> np.ndarray:
        """float32 [K]: the weight of each domain's sequences in a step."""
        weights = self.topics(step)
        return np.array([np.mean([weights[topic] for topic in its]) for its in self.topics_of], np.float32)

    def observe(self, step: int, losses: dict[int, float], counts: np.ndarray) -> None:
        """Take a step's mean loss of each drawn domain, and how many units were drawn of each [K]."""
        self._seen = max(self._seen, step)
        for domain, loss in losses.items():
            if math.isfinite(loss):
                for topic in self.topics_of[domain]:
                    its = self._sums.setdefault(topic, [0.0, 0.0])
                    its[0] += loss * float(counts[domain])
                    its[1] += float(counts[domain])
        if (step + 1) % self.config.every == 0:
            self._update(step)

    def _update(self, step: int) -> None:
        means = {topic: total / count for topic, (total, count) in self._sums.items() if count > 0}
        weights = dict(self._history[-1][1])
        self._sums = {}
        if not means:
            return
        whole = sum(means.values()) / len(means)
        last = step + 1 >= self.steps * (1 - self.config.second_stage)
        for topic, mean in means.items():
            if last:
                weights[topic] = min(max(weights[topic] * (2 - mean / whole), self.config.least), self.config.most)
            elif mean > whole:
                weights[topic] = min(weights[topic] * mean / whole, self.config.most)
        kept = 1 + self.delay // self.config.every  # that steps may still ask for
        self._history = [*self._history[-kept:], (step + self.delay, weights)]

    def state_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {"history": [[begin, weights] for begin, weights in self._history], "sums": self._sums, "seen": self._seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave; topics that have joined since weigh one."""
        known = self._history[-1][1]
        self._history = [(begin, {topic: weights.get(topic, 1.0) for topic in known}) for begin, weights in state["history"]]
        self._sums = {topic: list(its) for topic, its in state["sums"].items() if topic in known}
        self._seen = state["seen"]
