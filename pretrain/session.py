"""A run's moving parts at one model size: model, engine, loader; built from the config and, when there is one, a checkpoint.

Growth ends a session and begins the next, so there is one way to come to a model: build it, fill it, train it.
"""

import ctypes
import os
import sys
from pathlib import Path
from typing import Any

import torch

from regrowth import __version__
from regrowth.data_pipeline.batch import Batch
from regrowth.data_pipeline.corpus import Corpus
from regrowth.data_pipeline.feed import Feed
from regrowth.data_pipeline.loader import Loader
from regrowth.errors import UserError
from regrowth.parallel.engine import MicroBatch
from regrowth.parallel.mesh import Mesh
from regrowth.pretrain.build import build_engine
from regrowth.pretrain.checkpoint import CheckpointState, load_tensors, read_state, verify
from regrowth.pretrain.config import RunConfig
from regrowth.pretrain.growth.ramp import ramp_of
from regrowth.pretrain.lineage import Lineage
from regrowth.pretrain.loss import to_tensors
from regrowth.pretrain.precision_state import PrecisionState
from regrowth.pretrain.products import choose_products


class Session:
    """Everything that a growth replaces.

    Raises:
        UserError: the tokenizer's ids do not fit the model, or the checkpoint does not fit the data.
    """

    def __init__(self, config: RunConfig, corpus: Corpus, mesh: Mesh, checkpoint: Path | None) -> None:
        self.config, self.corpus, self.device = config, corpus, mesh.device
        begins = checkpoint is None
        checkpoint = checkpoint or config.run.start_from
        state = read_state(checkpoint) if checkpoint else None
        self.model_config = state.model if state else config.model
        self.lineage = state.lineage if state else Lineage(corpus=corpus.shown.rstrip("/").split("/")[-1], version=__version__)
        self.trainer_state = state.trainer if state and not begins else {}
        self.step = int(state.trainer["step"]) if state and not begins else 0
        if begins and checkpoint:
            self.lineage = self.lineage.continued(verify(checkpoint)["id"])
        if corpus.tokenizer.size > self.model_config.vocabulary:
            raise UserError(
                f"model.vocabulary = {self.model_config.vocabulary} is smaller than the tokenizer's {corpus.tokenizer.size} ids "
                f"({corpus.tokenizer.path}). Set model.vocabulary to at least {corpus.tokenizer.size}."
            )
        try:
            config.parallel.check_model(self.model_config, config.loader.sequence_length, config.loader.global_batch)
        except ValueError as error:
            raise UserError(f"the model of {checkpoint or 'this config'} does not fit the plan: {error}.") from error
        self.loader = Loader(corpus, config.loader, config.mixing, config.run.steps)
        if begins:  # one that goes on may have skipped data, and ends where its data does
            self.loader.check_enough()
        self.engine = build_engine(config, self.model_config, mesh)
        self.feed = Feed(self.loader, self.engine.data_rank, self.engine.data_ranks, self._micro_batches, config.run.steps)
        self.precision = PrecisionState(config.precision.build(), self.model_config, config.run.seed, self.device)
        if checkpoint and state:
            if not begins:
                self.loader.load_state_dict(state.loader)
                self.precision.load_state_dict(self.trainer_state.get("precision", {}))
            load_tensors(checkpoint / "model", self.engine.weights())
            load_tensors(checkpoint / "optimizer", self.engine.moments())
            self.engine.loaded(int(state.trainer["optimizer_steps"]))
        self.slow_products = self._choose_products()
        # Evaluations that come before the next step are of the recipe of the last.
        self.precision.begin_step(self.engine.modules, max(0, self.step - 1), config.run.steps)
        self.ramp = ramp_of(self.lineage, self.model_config, self.engine.weights(), self.step)
        if self.ramp and config.parallel.engine != "native":
            raise UserError(
                f'growth: random_pad fades its values in during training, which parallel.engine = "{config.parallel.engine}" does not; use "native".'
            )

    def _choose_products(self) -> dict[str, float]:
        """Give linears to the device's matrix units; those that would be slower narrow stay wide, as long as the run has this model."""
        config, precision = self.config, self.precision
        products = config.precision.products if config.run.dtype == "bfloat16" else "emulated"
        tokens = config.parallel.micro_batch * config.loader.sequence_length // config.parallel.cp
        layers, chosen = self.model_config.layers, precision.slow
        slow = choose_products(self.engine.modules, precision.planned, products, layers, tokens, self.device, chosen)
        precision.slow = list(slow) if chosen is None else chosen
        return slow

    def close(self) -> None:
        """End the loader's thread; the session is done with."""
        self.feed.close()

    def _micro_batches(self, batch: Batch) -> tuple[int, float, list[MicroBatch]]:
        """A rank's share of a step: its tokens (padding left out), their weight in the loss, and its micro-batches on the device."""
        size = self.config.parallel.micro_batch * (len(batch) * self.config.parallel.data_ranks // self.config.loader.global_batch)
        parts = [to_tensors(batch.slice(i, min(i + size, len(batch))), self.device) for i in range(0, len(batch), size)]
        return int((batch.doc_ids >= 0).sum()), float(batch.loss_weight.sum()), parts

    def state(self, step: int, guard: dict[str, Any] | None = None) -> CheckpointState:
        """What a checkpoint of this moment says besides its tensors."""
        trainer: dict[str, Any] = {"step": step, "optimizer_steps": self.engine.optimizer_steps, "guard": guard or {}}
        if precision := self.precision.state_dict():
            trainer["precision"] = precision
        return CheckpointState(self.model_config, self.lineage, self.loader.state_dict(step), trainer)


def prepare_process(config: RunConfig, ranks_here: int) -> None:
    """Settings of a training process: this machine's cores shared between its ranks, where compiled kernels are kept, and freed memory."""
    if config.run.compile_cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(config.run.compile_cache.resolve())
    torch.set_num_threads(config.run.threads or max(1, (os.cpu_count() or 1) // max(1, ranks_here)))
    keep_freed_memory()


def keep_freed_memory() -> None:
    """A step frees and takes the same large tensors again; glibc would hand them back to the kernel each time, and faulting them in anew costs a
    CPU step about a tenth of its time (measured in docs/performance.md)."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: do not shrink the heap
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: large tensors come from the heap
