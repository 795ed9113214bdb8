"""Proof that a plan is the same training as one process: same weights, same data, losses and every gradient compared.

`python -m pytest tests/conformance` runs it small over gloo; `regrowth conformance` runs it on whatever cluster a user has. Batches are made
up, with documents of all lengths and padding, so that no corpus is needed.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from regrowth.data_pipeline.batch import Batch
from regrowth.parallel.dtensor import full_tensor
from regrowth.parallel.engine import Engine, MicroBatch, Report
from regrowth.parallel.mesh import Mesh, choose_device
from regrowth.parallel.native_engine import NativeEngine
from regrowth.parallel.plan import ParallelPlan
from regrowth.pretrain.build import build_engine
from regrowth.pretrain.checkpoint import CheckpointState, load_tensors, read_state, save_checkpoint
from regrowth.pretrain.config import OptimizerConfig, RunSettings
from regrowth.pretrain.lineage import Lineage
from regrowth.pretrain.loss import to_tensors, training_report
from regrowth.pretrain.model_config import ModelConfig, MoEConfig
from regrowth.pretrain.moe import balance
from regrowth.pretrain.precision import load_recipe

LENGTH, BATCH = 64, 16
_SMALL: dict[str, Any] = {
    "vocabulary": 128,
    "width": 32,
    "layers": 4,
    "heads": 4,
    "kv_heads": 4,
    "head_dim": 8,
    "ffn_width": 64,
    "init_std": 0.1,
}
_MOE: dict[str, Any] = {
    "experts": 4,
    "top_k": 2,
    "expert_width": 32,
    "shared_width": 16,
    "pattern": ["dense", "moe"],
    "z_loss": 1e-3,
    "balance_loss": 0.02,
}

MODELS: dict[str, ModelConfig] = {
    "dense": ModelConfig(**_SMALL, tied=False),
    "tied": ModelConfig(**_SMALL, tied=True),
    "grouped": ModelConfig(**{**_SMALL, "kv_heads": 2}, tied=False),
    "deep": ModelConfig(**{**_SMALL, "layers": 8}, tied=False),
    "wide": ModelConfig(**{**_SMALL, "width": 64, "head_dim": 16, "ffn_width": 128}, tied=False),
    "moe": ModelConfig(**_SMALL, tied=False, moe=MoEConfig(**_MOE)),
    "moe_sigmoid": ModelConfig(**_SMALL, tied=True, moe=MoEConfig(**{**_MOE, "gate": "sigmoid", "balance_loss": 0.0, "bias_rate": 1e-3})),
    "moe_many": ModelConfig(**_SMALL, tied=False, moe=MoEConfig(**{**_MOE, "experts": 16, "top_k": 1})),
    "moe_capacity": ModelConfig(**_SMALL, tied=False, moe=MoEConfig(**{**_MOE, "capacity": 1.0, "pattern": ["moe"]})),
}


@dataclass(frozen=True)
class Shape:
    """Of a made-up batch."""

    sequence_length: int = LENGTH
    global_batch: int = BATCH


@dataclass(frozen=True)
class Setting:
    """What is trained; the plan is what varies."""

    model: str = "dense"
    recipe: str = "full"
    steps: int = 10
    parallel: ParallelPlan = field(default_factory=lambda: ParallelPlan(micro_batch=BATCH))
    run: RunSettings = field(default_factory=lambda: RunSettings(seed=6, device="cpu"))
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=3e-3, z_loss=1e-4))
    loader: Shape = field(default_factory=Shape)


@dataclass
class Outcome:
    """What was measured; the same on every rank but for the gradients, which rank 0 has."""

    losses: list[float]
    norms: list[float]
    gradients: dict[str, torch.Tensor]
    loads: list[list[float]]  # tokens that each expert got, per step, over all layers
    validation: float = 0.0  # the mean loss afterwards, on a batch that was not trained on


def made_up_batch(step: int, vocabulary: int, shape: Shape, seed: int = 1) -> Batch:
    """Sequences of documents of all lengths, most of them padded at the end; tokens repeat so that there is something to learn."""
    rng = np.random.default_rng((seed, step))
    rows, length = shape.global_batch, shape.sequence_length
    tokens = (rng.integers(0, vocabulary // 4, (rows, length + 1)) + np.arange(length + 1) % 3 * (vocabulary // 4)).astype(np.int32)
    doc_ids, positions = np.zeros((rows, length), np.int32), np.zeros((rows, length), np.int32)
    weight = rng.choice([0.5, 1.0], (rows, length)).astype(np.float32)
    for row in range(rows):
        begin = document = 0
        while begin < length:
            end = min(length, begin + int(rng.integers(3, length)))
            doc_ids[row, begin:end], positions[row, begin:end] = document, np.arange(end - begin)
            weight[row, end - 1] = 0.0  # the label is another document's
            begin, document = end, document + 1
        if row % 3 == 0:  # padding
            doc_ids[row, -7:], weight[row, -7:] = -1, 0.0
    return Batch(
        tokens[:, :-1].copy(), tokens[:, 1:].copy(), positions, doc_ids, weight, np.zeros(rows, np.int32), np.arange(rows, dtype=np.int64)
    )


def train(setting: Setting) -> Outcome:
    """Train a few steps under the setting's plan; collective over its ranks."""
    device = choose_device(setting.run.device)
    mesh, model = Mesh(setting.parallel, device), MODELS[setting.model]
    engine = build_engine(setting, model, mesh)
    recipe = load_recipe(setting.recipe)
    outcome = Outcome([], [], {}, [])
    for step in range(setting.steps):
        batch = made_up_batch(step, model.vocabulary, setting.loader)
        for module in engine.modules:
            module.follow(recipe, seed=setting.run.seed, step=step)  # pyright: ignore[reportCallIssue]
        loss = run_step(engine, batch, device)
        if step == 0:
            outcome.gradients = gathered_gradients(engine) if isinstance(engine, NativeEngine) else {}
        outcome.norms.append(engine.step(setting.optimizer.lr, clip=1.0))
        loads = balance(engine.modules, model, mesh)
        outcome.loads.append(sum((row[: model.expert_count] for row in loads.values()), torch.zeros(1)).tolist())
        outcome.losses.append(loss)
    sums = run_forward(engine, made_up_batch(1 << 20, model.vocabulary, setting.loader), training_report, device).sum(0)
    outcome.validation = float(sums[0] / sums[1])
    return outcome


def run_forward(engine: Engine, batch: Batch, report: Report, device: torch.device) -> torch.Tensor:
    """The reports of all sequences of a batch, without gradients; collective."""
    share = len(batch) // engine.data_ranks
    mine = batch.slice(engine.data_rank * share, (engine.data_rank + 1) * share)
    rows = engine.forward_rows
    return engine.gather(torch.cat([engine.forward(to_tensors(mine.slice(i, i + rows), device), report) for i in range(0, share, rows)]))


def document_losses(setting: Setting, changed: int | None) -> torch.Tensor:
    """Summed nll fp64 [B, documents] of each document of a made-up batch under a fresh model; collective.

    Args:
        changed: the number of the document that gets other tokens in every sequence; None leaves all as they are.
    """
    device = choose_device(setting.run.device)
    mesh, model = Mesh(setting.parallel, device), MODELS[setting.model]
    batch = made_up_batch(0, model.vocabulary, setting.loader)
    if changed is not None:
        inside = batch.doc_ids == changed
        batch.tokens[inside] = (batch.tokens[inside] + 1) % model.vocabulary
        batch.labels[inside] = (batch.labels[inside] + 1) % model.vocabulary

    def by_document(nll_BT: torch.Tensor, part: MicroBatch) -> torch.Tensor:
        sums = torch.zeros(len(nll_BT), setting.loader.sequence_length + 1, dtype=torch.float64, device=device)
        return sums.scatter_add_(1, part["doc_ids"].long() + 1, (nll_BT * part["loss_weight"]).double())

    return run_forward(build_engine(setting, model, mesh), batch, by_document, device)


def run_step(engine: Engine, batch: Batch, device: torch.device) -> float:
    """Forward and backward of this rank's share; the mean loss over all tokens."""
    share = len(batch) // engine.data_ranks
    mine = batch.slice(engine.data_rank * share, (engine.data_rank + 1) * share)
    size = engine.plan.micro_batch
    micro_batches = [to_tensors(mine.slice(i, min(i + size, share)), device) for i in range(0, share, size)]
    tokens = float(batch.loss_weight.sum())
    sums = engine.gather(torch.cat(engine.forward_backward(micro_batches, training_report, 1.0 / tokens)))
    return float(sums[:, 0].sum() / sums[:, 1].sum())


def gathered_gradients(engine: NativeEngine) -> dict[str, torch.Tensor]:
    """Whole gradients by canonical name, on rank 0 (empty elsewhere); collective."""
    mine = {name: full_tensor(gradient).cpu().clone() for name, gradient in engine.gradients().items()}
    if not dist.is_initialized() or engine.plan.world_size == 1:
        return mine
    place = engine.mesh.place
    if any(place[axis] for axis in place if axis != "pp"):
        mine = {}
    found: list[Any] = [None] * dist.get_world_size() if dist.get_rank() == 0 else []
    dist.gather_object(mine, found or None, dst=0)
    return {name: gradient for part in found for name, gradient in part.items()}


def deviation(outcome: Outcome, reference: Outcome) -> dict[str, float]:
    """The largest differences: of losses and norms relative, of each parameter's gradient relative to its own largest entry."""
    missing = set(reference.gradients) ^ set(outcome.gradients)
    if missing:
        raise AssertionError(f"gradients of {sorted(missing)} are on one side only")
    gradient = _largest(
        float((outcome.gradients[name] - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
        for name, expected in reference.gradients.items()
    )
    return {
        "first loss": _relative(outcome.losses[:1], reference.losses[:1]),
        "losses": _relative(outcome.losses, reference.losses),
        "first norm": _relative(outcome.norms[:1], reference.norms[:1]),
        "norms": _relative(outcome.norms, reference.norms),
        "gradients": gradient,
        "validation": _relative([outcome.validation], [reference.validation]),
    }


def _relative(got: Sequence[float], expected: Sequence[float]) -> float:
    return _largest(abs(a - b) / max(abs(b), 1e-12) for a, b in zip(got, expected, strict=True))


def _largest(values: Iterable[float]) -> float:
    """The largest, and NaN if any is: Python's `max` would pass over it."""
    return float(torch.tensor([0.0, *values], dtype=torch.float64).max())


def continue_elsewhere(setting: Setting, folder: Path, save: bool, steps: int) -> list[float]:
    """Losses of `steps` steps after which a checkpoint is saved to `folder`, or with which training goes on from the one there; collective."""
    device = choose_device(setting.run.device)
    mesh, model = Mesh(setting.parallel, device), MODELS[setting.model]
    engine = build_engine(setting, model, mesh)
    if not save:
        load_tensors(folder / "model", engine.weights())
        load_tensors(folder / "optimizer", engine.moments())
        engine.loaded(int(read_state(folder).trainer["optimizer_steps"]))
    first = 0 if save else steps
    losses = []
    for step in range(first, first + steps):
        losses.append(run_step(engine, made_up_batch(step, model.vocabulary, setting.loader), device))
        engine.step(setting.optimizer.lr, clip=1.0)
        balance(engine.modules, model, mesh)
    if save:
        trainer = {"step": steps, "optimizer_steps": engine.optimizer_steps}
        save_checkpoint(folder, engine.weights(), engine.moments(), CheckpointState(model, Lineage(), {}, trainer))
    return losses
