"""The loader: from a corpus and a mixer to the Batch of every step.

The step's sequences are decided globally and the same on every rank; a rank then builds only its share. So the order does not depend on
the number of ranks, and the state is one cursor per domain plus the mixer's.
"""

from dataclasses import asdict
from functools import cached_property
from typing import Any

import numpy as np

from regrowth.data_pipeline.batch import Batch, domain_of
from regrowth.data_pipeline.config import LoaderConfig
from regrowth.data_pipeline.corpus import Corpus
from regrowth.data_pipeline.mixing.build import build_mixer
from regrowth.data_pipeline.mixing.config import Mixing
from regrowth.data_pipeline.mixing.decisions import Script
from regrowth.data_pipeline.mixing.limits import units_left
from regrowth.data_pipeline.mixing.reweight import TopicWeights
from regrowth.data_pipeline.packing import blank
from regrowth.data_pipeline.reader import Cursor, Damage, DomainReader
from regrowth.errors import Exhausted, UserError

# The order of a domain's sequences is theirs; they may not change while a run goes on.
_ORDER = ("sequence_length", "unit_sequences", "packing", "seed")


class Loader:
    """Training batches of a corpus under a mixing policy.

    Args:
        steps: of the whole run, for policies that plan ahead; 0 where nobody knows.

    Raises:
        UserError: the mixing config names domains the corpus does not have, its bounds cannot be met, or the log to follow is of other data.
    """

    def __init__(self, corpus: Corpus, config: LoaderConfig, mixing: Mixing, steps: int = 0) -> None:
        self.corpus, self.config, self.mixing = corpus, config, mixing
        self.domains = corpus.domains
        if len(self.domains) > 256:
            raise UserError(
                f"{corpus.folder}: {len(self.domains)} domains; a run mixes at most 256. Set `domain` of some data.sources to merge them."
            )
        tokens = [corpus.tokens("train", d) for d in self.domains]
        self.budget_tokens = steps * config.global_batch * config.sequence_length
        self.steps = steps
        self.mixer = build_mixer(mixing, config, self.domains, tokens, self.budget_tokens)
        self.readers = [
            DomainReader(corpus, "train", d, i, config.sequence_length, config.seed, config.packing, config.damaged == "skip")
            for i, d in enumerate(self.domains)
        ]
        self.cursors = [Cursor() for _ in self.domains]
        self.script = Script.open(mixing.replay_log, self.segment()) if mixing.replay_log else None
        self.topics = TopicWeights(config.reweight, self.domains, config.update_delay, steps) if config.reweight else None
        self._before: dict[int, list[list[int]]] = {}  # the cursors as they were before each step that is not done yet

    def check_enough(self) -> None:
        """See before a run's first step that neither its data nor the log it follows can end before it does.

        Domains that the policy never draws count as data here: a run may still find out later.

        Raises:
            Exhausted: they will.
        """
        if self.script:
            for needed in range(self.steps):
                self.script.row(needed)
        elif (room := self._room()) is not None and (can := np.floor(np.maximum(room, 0).sum() / self.mixer.units)) < self.steps:
            raise Exhausted(f"mixing.max_epochs: the domains have data for {can:.0f} steps together, and the run has {self.steps}. Raise it, add data "
                            f"(loader.corpora), or set run.steps = {can:.0f}.")  # fmt: skip

    def may_plan(self, step: int) -> bool:
        """Whether a step can be planned already: not before the losses are there that its draw, and its weights, have to see."""
        if self.topics and not self.topics.may_build(step):
            return False
        return self.script is not None or self.mixer.may_draw(step)

    def plan_step(self, step: int) -> list[int]:
        """Draw the step's domains and take its sequences: the sample ids of the global batch, in order. Every rank calls this once a step.

        Raises:
            Exhausted: no domain may be read any more (mixing.max_epochs), or the log that is followed has no such step.
        """
        if self.script:
            row = self.script.row(step)
            self.cursors = [Cursor(*row["cursors"][place]) for place in self.script.places]
            back = {theirs: mine for mine, theirs in enumerate(self.script.places)}
            shares = [row["probabilities"][place] for place in self.script.places]
            self._before[step] = self._places()
            drawn = self.mixer.follow(step, shares, [back[d] for d in row["draws"]])
        else:
            self._before[step] = self._places()
            drawn = self.mixer.draw(step, self._room())
        return [s for domain in drawn for s in self.readers[domain].take(self.cursors[domain], self.config.unit_sequences)]

    def build(self, sample_ids: list[int], step: int = 0) -> Batch:
        """The Batch of these sequences of a step, in this order."""
        batch = assemble(self.readers, sample_ids, self.config.sequence_length)
        if self.topics:
            np.multiply(batch.loss_weight, self.topics.domains(step)[batch.domain][:, None], out=batch.loss_weight)
        return batch

    def observe(self, step: int, losses: dict[int, float]) -> dict[str, Any]:
        """Take the mean loss of each domain of a step; returns the step's row of the decision log."""
        row = {**self.mixer.observe(step, losses), "cursors": self._before.pop(step)}
        if self.topics:
            row["topic_weights"] = self.topics.topics(step)
            self.topics.observe(step, losses, np.bincount(row["draws"], minlength=len(self.domains)))
        return row

    def cursors_before(self, step: int) -> list[Cursor]:
        """Where reading stands before a step, whatever was planned ahead."""
        return [Cursor(*place) for place in self._before.get(step, self._places())]

    def damage(self) -> list[Damage]:
        """Blocks that were skipped since this was asked last."""
        found = []
        for reader in self.readers:
            while reader.damaged:  # a thread may be adding to it
                found.append(reader.damaged.pop(0))
        return found

    def epochs(self) -> dict[str, float]:
        """How often each domain has been read, in epochs."""
        return {reader.domain: reader.epochs(cursor) for reader, cursor in zip(self.readers, self.cursors, strict=True)}

    def state_dict(self, next_step: int | None = None) -> dict[str, Any]:
        """JSON-able state before `next_step` (None: nothing was planned ahead). Nothing in it depends on ranks."""
        cursors = self.cursors if next_step is None else self.cursors_before(next_step)
        state = {"identity": self._identity(), "cursors": [asdict(c) for c in cursors], "mixer": self.mixer.state_dict(next_step)}
        return {**state, "topics": self.topics.state_dict()} if self.topics else state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave. Domains may have joined since (they begin at their beginning) or left.

        Raises:
            UserError: the state belongs to another corpus or to another order; the difference is named.
        """
        mine, theirs = self._identity(), state["identity"]
        if not isinstance(known := theirs.get("domains", {}), dict):
            raise UserError(f"{self.corpus.shown}: the checkpoint's loader state was written by an older version, which did not say where each domain's "
                            "sequences stood in all. Start a new run with run.start_from = the checkpoint.")  # fmt: skip
        told = [
            f"{key}: checkpoint {theirs.get(key)!r}, now {mine[key]!r}" for key in ("tokenizer", *_ORDER) if mine[key] != theirs.get(key)
        ]
        told += [f"domain {d}: other shards than the checkpoint's" for d in self.domains if d in known and mine["domains"][d] != known[d]]
        if not set(known) & set(self.domains):
            told.append(f"domains: checkpoint {sorted(known)}, now {self.domains}")
        if told:
            raise UserError(f"{self.corpus.shown}: the checkpoint's loader state is of another corpus or order ({'; '.join(told)}). "
                            "Resume with the run's own data, or start a new run with run.start_from = the checkpoint.")  # fmt: skip
        cursors = dict(zip(known, state["cursors"], strict=True))
        self.cursors = [Cursor(**cursors[d]) if d in cursors else Cursor() for d in self.domains]
        self.mixer.load_state_dict(state["mixer"])
        if self.topics and "topics" in state:
            self.topics.load_state_dict(state["topics"])

    def segment(self) -> dict[str, Any]:
        """What a stretch of the decision log is decided by: with it, the log can be recomputed."""
        return {
            "mixing": self.mixing.model_dump(mode="json"),
            "loader": self.config.model_dump(mode="json"),
            "domains": self.domains,
            "tokens": [self.corpus.tokens("train", d) for d in self.domains],
            "budget_tokens": self.budget_tokens,
            "identity": self._identity(),
            "max_sequences": [None if np.isinf(most) else most for most in self._most.tolist()],
        }

    def _places(self) -> list[list[int]]:
        return [[c.epoch, c.position, c.offset, c.taken] for c in self.cursors]

    def _room(self) -> np.ndarray | None:
        return units_left(self._most, [c.taken for c in self.cursors], self.config.unit_sequences)

    @cached_property
    def _most(self) -> np.ndarray:
        """float64 [K]: sequences that may be read of each domain."""
        limits = self.mixer.limits
        assert limits is not None
        capped = np.isfinite(limits.epochs)
        sizes = np.array([reader.sequences if cap else 1 for reader, cap in zip(self.readers, capped, strict=True)], dtype=np.float64)
        return np.floor(limits.epochs * sizes)

    def _identity(self) -> dict[str, Any]:
        return {
            "domains": {d: self.corpus.identity(d) for d in self.domains},
            "tokenizer": self.corpus.manifest["tokenizer"]["hash"],
            **{key: getattr(self.config, key) for key in _ORDER},
        }


def heldout_batches(corpus: Corpus, domain: str, length: int, limit: int | None = None) -> Batch:
    """Held-out sequences of a domain, in a fixed order, at most `limit` of them."""
    reader = DomainReader(corpus, "heldout", domain, index := corpus.domains.index(domain), length, seed=0)
    total = reader.sequences
    ids = reader.take(Cursor(), min(total, limit) if limit else total) if total else []
    return assemble([reader] * (index + 1), ids, length)


def assemble(readers: list[DomainReader], sample_ids: list[int], length: int) -> Batch:
    """The Batch of these sequences [B], filled in place."""
    columns = blank(len(sample_ids), length)
    ids = np.array(sample_ids, dtype=np.int64)
    domain = domain_of(ids)
    for sample, index, *rows in zip(sample_ids, domain.tolist(), *columns, strict=True):
        readers[index].fill(sample, tuple(rows))
    return Batch(*columns, domain, ids)
