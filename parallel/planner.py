"""Predicts peak memory per rank and seconds per step of a plan on a described machine.

Memory: weights, gradients and two moments in fp32 (16 bytes a parameter, divided over `dp_shard`), and activations after Korthikanti et al. 2022
(arXiv 2205.05198, table 2) without the attention matrix, or block inputs only with recomputation, plus fp32 logits and their gradient.
Time: matrix FLOPs over the machine's sustained rate, plus what gradients and shards move over the link.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Protocol

from pydantic import Field

from regrowth.parallel.plan import ParallelPlan
from regrowth.settings import Settings, load, recipe_folder

Positive = Annotated[float, Field(gt=0)]


class Cluster(Settings):
    """A machine as the planner sees it; `configs/clusters/*.toml`."""

    name: str
    device: str
    devices_per_node: Annotated[int, Field(ge=1)]
    memory_gib: Positive  # of one device
    sustained_tflops: Positive  # of one device in the training dtype, as large matrix products reach it
    efficiency: Annotated[float, Field(gt=0, le=1)]  # share of that which a training step reaches
    link_gbytes_per_second: Positive  # within a node, each way, per device
    network_gbytes_per_second: Positive  # between nodes, each way, per device


class ModelSize(Protocol):
    """What the planner needs to know of a model."""

    vocabulary: int
    width: int
    layers: int
    ffn_width: int

    @property
    def parameters(self) -> int: ...

    def train_flops_per_token(self, sequence_length: int) -> int: ...


@dataclass(frozen=True)
class Prediction:
    """Per rank, and per step."""

    state_bytes: float
    activation_bytes: float
    compute_seconds: float
    communication_seconds: float
    capacity_bytes: float

    @property
    def memory_bytes(self) -> float:
        """Peak: states and activations together."""
        return self.state_bytes + self.activation_bytes

    @property
    def step_seconds(self) -> float:
        """Compute and communication one after the other (no overlap assumed)."""
        return self.compute_seconds + self.communication_seconds

    @property
    def fits(self) -> bool:
        """Whether the memory of a device suffices."""
        return self.memory_bytes <= self.capacity_bytes


def clusters() -> dict[str, Path]:
    """The described machines that ship with the package, by name."""
    return {path.stem: path for path in sorted((recipe_folder() / "clusters").glob("*.toml"))}


def load_cluster(path: Path) -> Cluster:
    """A machine's description."""
    return load(Cluster, path)


def predict(
    model: ModelSize, plan: ParallelPlan, cluster: Cluster, global_batch: int, sequence_length: int, bytes_per_value: int = 4
) -> Prediction:
    """The prediction for one plan.

    Args:
        bytes_per_value: of activations: 4 for fp32, 2 for bf16.
    """
    states = 16.0 * model.parameters / plan.dp_shard
    if plan.dp_shard > 1:
        states += 4.0 * model.parameters / max(model.layers, 1) * 2  # the unit at work and the next one, gathered
    tokens = plan.micro_batch * sequence_length
    # Values kept per token and layer: norms, q k v and output of attention, SwiGLU's three; 17 widths in a block of Korthikanti's shape.
    per_layer = model.width if plan.recompute else 9 * model.width + 4 * model.ffn_width
    logits = 3.0 * 4 * tokens * model.vocabulary
    activations = tokens * bytes_per_value * per_layer * model.layers + logits
    step_tokens = global_batch * sequence_length / plan.data_ranks
    compute = step_tokens * model.train_flops_per_token(sequence_length) / (cluster.sustained_tflops * 1e12 * cluster.efficiency)
    if plan.recompute:
        compute *= 4 / 3
    link = cluster.link_gbytes_per_second if plan.world_size <= cluster.devices_per_node else cluster.network_gbytes_per_second
    micro_steps = max(1, -(-global_batch // (plan.data_ranks * plan.micro_batch)))
    moved = 0.0
    if plan.dp_shard > 1:  # two gathers of the weights per micro-batch, one scatter of the gradients per step
        moved += 4.0 * model.parameters * (plan.dp_shard - 1) / plan.dp_shard * (2 * micro_steps + 1)
    if plan.dp_replicate > 1:
        moved += 2 * 4.0 * model.parameters / plan.dp_shard * (plan.dp_replicate - 1) / plan.dp_replicate
    return Prediction(states, activations, compute, moved / (link * 1e9), cluster.memory_gib * 2**30)
