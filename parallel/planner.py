"""Predicts peak memory per rank and seconds per step of a plan on a described machine.

Memory: weights, gradients and two moments in fp32 (16 bytes a parameter, divided over all ranks that split or shard them), and activations after
Korthikanti et al. 2022 (arXiv 2205.05198, table 2) without the attention matrix, times the micro-batches that a pipeline's first stage holds.
Time: matrix FLOPs over the machine's sustained rate with the pipeline's bubble, plus what gradients, shards and activations move over the link. A precision
recipe makes linears as much faster as the machine's description says of its formats (`[speed]`), and no faster if it says nothing.
"""

from dataclasses import dataclass
from typing import Protocol

from regrowth.kernels.cost import DecoderSize, PassTimes, flop_shares, recipe_times
from regrowth.kernels.recipe import FULL, PrecisionRecipe
from regrowth.parallel.cluster import Cluster
from regrowth.parallel.plan import ParallelPlan


class ModelSize(DecoderSize, Protocol):
    """What the planner needs to know of a model."""

    ffn_width: int

    @property
    def parameters(self) -> int: ...


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


def pass_times(model: DecoderSize, recipe: PrecisionRecipe, cluster: Cluster, sequence_length: int) -> PassTimes:
    """Times of the three passes under a recipe, while it is in force, relative to those in the training dtype."""
    return recipe_times(recipe, flop_shares(model, sequence_length), cluster.speed.model_dump() if cluster.speed else {}, model.layers)


def operand_bytes(model: ModelSize, recipe: PrecisionRecipe, tokens: float, bytes_per_value: int) -> float:
    """What a layer keeps until its backward pass beyond the activations of a wide one: under the estimator "trust" each linear's two operands as they were rounded, in fp32, and a
    byte for each value that says whether it was clipped, in the place of inputs that no one else keeps."""
    attended = model.heads * model.head_dim
    attention = 5 * (tokens * (3 * model.width + attended) + model.width * (2 * attended + 2 * model.kv_width))
    ffn = 5 * (tokens * (2 * model.width + model.ffn_width) + 3 * model.width * model.ffn_width)
    attention -= tokens * bytes_per_value * model.width
    ffn -= tokens * bytes_per_value * (model.width + model.ffn_width)
    kept = attention * (recipe.attention.estimator == "trust") + ffn * (recipe.ffn.estimator == "trust")
    narrow = sum(not recipe.in_wide_block(layer, model.layers) for layer in range(model.layers))
    return kept * narrow / max(model.layers, 1)


def predict(
    model: ModelSize,
    plan: ParallelPlan,
    cluster: Cluster,
    global_batch: int,
    sequence_length: int,
    bytes_per_value: int = 4,
    recipe: PrecisionRecipe = FULL,
) -> Prediction:
    """The prediction for one plan.

    Args:
        bytes_per_value: of activations: 4 for fp32, 2 for bf16.
        recipe: what linears compute in; matters where `cluster.speed` is given.
    """
    layers = max(model.layers, 1)
    slices = plan.tp * plan.pp  # of the weights, before FSDP shards them
    states = 16.0 * model.parameters / (slices * plan.shards_weights)
    if plan.shards_weights > 1:
        gathered = layers / plan.pp if not plan.reshards else 2  # all of a stage, or the unit at work and the next
        states += 4.0 * model.parameters / (layers * plan.tp) * gathered
    tokens = plan.micro_batch * sequence_length / plan.cp
    micro_steps = max(1, -(-global_batch // (plan.data_ranks * plan.micro_batch)))
    in_flight = 1 if plan.pp == 1 else micro_steps if plan.schedule in ("gpipe", "looped_bfs") else min(micro_steps, plan.pp)
    # Values kept per token and layer: norms, q k v and output of attention, SwiGLU's three; 17 widths in a block of Korthikanti's shape.
    whole_layer = 9 * model.width + 4 * model.ffn_width
    products = 4 * model.width + 3 * model.ffn_width
    kept = {"none": whole_layer, "full": model.width, "selective": products}[plan.recompute]
    kept = (kept + (plan.recompute_every - 1) * whole_layer) / plan.recompute_every
    outside = 0 if plan.sequence_parallel or plan.tp == 1 else 4 * model.width  # norms and residuals, whole on every rank
    activations = tokens * bytes_per_value * ((kept - min(outside, kept)) / plan.tp + min(outside, kept)) * layers / plan.pp * in_flight
    activations += (
        operand_bytes(model, recipe, tokens, bytes_per_value) / plan.tp * (layers / plan.pp * in_flight if plan.recompute == "none" else 1)
    )
    # The head: a chunk of logits, and the gradients of hidden states and of the matrix, which are computed beside the loss.
    heads = in_flight if plan.schedule in ("gpipe", "looped_bfs") else 1
    activations += 3 * 2.0**24 + 4.0 * model.width * (tokens + model.vocabulary / plan.tp * heads)
    compute = global_batch * sequence_length * model.train_flops_per_token(sequence_length) / plan.world_size
    compute /= cluster.sustained_tflops * 1e12 * cluster.efficiency
    times = pass_times(model, recipe, cluster, sequence_length)
    compute *= times.step + (times.forward / (3 * plan.recompute_every) if plan.recompute == "full" else 0)
    if plan.pp > 1:
        compute *= 1 + (plan.pp - 1) / (plan.held_stages * micro_steps)  # the bubble of 1F1B, interleaved over the stages of a rank
    link = cluster.link_gbytes_per_second if plan.world_size <= cluster.devices_per_node else cluster.network_gbytes_per_second
    moved = 0.0
    if plan.shards_weights > 1:  # two gathers of the weights per micro-batch, one scatter of the gradients per step
        gathers = 2 * micro_steps if plan.reshards else 1
        moved += model.parameters / slices * (plan.shards_weights - 1) / plan.shards_weights * (bytes_per_value * gathers + 4)
    if plan.dp_replicate > 1:
        moved += 2 * 4.0 * model.parameters / (slices * plan.shards_weights) * (plan.dp_replicate - 1) / plan.dp_replicate
    hidden = tokens * model.width * bytes_per_value * layers / plan.pp * micro_steps
    # Into and out of two regions a layer, forward and backward; keys and values round the ring, and back with their fp32 gradients.
    moved += 8 * hidden * (plan.tp - 1) / plan.tp
    moved += (plan.cp - 1) * 2 * tokens * model.kv_width * layers / plan.pp / plan.tp * micro_steps * (2 * bytes_per_value + 4)
    if plan.pp > 1:
        moved += 2 * tokens * model.width * bytes_per_value * micro_steps * plan.held_stages / (plan.tp if plan.sequence_parallel else 1)
    return Prediction(states, activations, compute, moved / (link * 1e9), cluster.memory_gib * 2**30)
