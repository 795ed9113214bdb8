"""The parallel plan: how many ways each axis splits, and what a micro-batch is. All axes are named from the first day.

This version splits data (`dp_replicate`, `dp_shard`); a plan that asks for another axis is refused before anything starts.
"""

from typing import Annotated

from pydantic import Field, model_validator

from regrowth.settings import Settings

Size = Annotated[int, Field(ge=1)]


class ParallelPlan(Settings):
    """dp_replicate x dp_shard x cp x tp x pp ranks; experts (`ep`) share the ranks of the data axes."""

    dp_replicate: Size = 1  # replicas that all-reduce gradients
    dp_shard: Size = 1  # ranks that shard weights, gradients and moments (FSDP2)
    cp: Size = 1
    tp: Size = 1
    pp: Size = 1
    ep: Size = 1
    micro_batch: Size = 8  # sequences per forward/backward of one data-parallel rank
    recompute: bool = False  # keep block inputs only, compute activations again in the backward pass
    compile: bool = False  # torch.compile each block

    @model_validator(mode="after")
    def _only_what_is_built(self) -> "ParallelPlan":
        if asked := [f"parallel.{axis} = {getattr(self, axis)}" for axis in ("cp", "tp", "pp", "ep") if getattr(self, axis) > 1]:
            raise ValueError(
                f"{', '.join(asked)}: this version splits data only. Use dp_replicate and dp_shard, and leave the other axes at 1."
            )
        return self

    @property
    def world_size(self) -> int:
        """Ranks the plan needs."""
        return self.dp_replicate * self.dp_shard * self.cp * self.tp * self.pp

    @property
    def data_ranks(self) -> int:
        """Ranks that read different sequences."""
        return self.dp_replicate * self.dp_shard

    def check_batch(self, global_batch: int) -> None:
        """A step's sequences must fall evenly on ranks.

        Raises:
            ValueError: naming the nearest batch that does.
        """
        if global_batch % self.data_ranks:
            near = max(1, round(global_batch / self.data_ranks)) * self.data_ranks
            raise ValueError(
                f"loader.global_batch = {global_batch} sequences cannot be shared evenly by parallel.dp_replicate x dp_shard = "
                f"{self.data_ranks} ranks; the nearest batch that can is {near}"
            )

    def check_world(self, ranks: int) -> None:
        """The processes that were started must be as many as the plan needs.

        Raises:
            ValueError: with both numbers and the remedy.
        """
        if ranks != self.world_size:
            raise ValueError(
                f"the plan needs {self.world_size} processes (dp_replicate = {self.dp_replicate} x dp_shard = {self.dp_shard}), {ranks} were "
                f"started. Start {self.world_size}, or set parallel.dp_replicate={ranks} parallel.dp_shard=1"
            )
