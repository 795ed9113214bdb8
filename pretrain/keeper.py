"""Which parallel plan a run is on: its config's, or what its growths have made of it; and the mesh of that plan."""

import time
from pathlib import Path

import torch

from regrowth.errors import Stopped, UserError
from regrowth.parallel.mesh import Mesh
from regrowth.parallel.plan import ParallelPlan
from regrowth.pretrain.config import RunConfig
from regrowth.pretrain.growth.event import plan_in_force
from regrowth.pretrain.lineage import Lineage, read_lineage
from regrowth.pretrain.run_folder import RunFolder


class PlanKeeper:
    """`config` has the plan in force as its own, and `mesh` is made of it, once `follow` was called."""

    def __init__(self, run: RunFolder, config: RunConfig, device: torch.device, rank: int) -> None:
        self.run, self.config, self.device, self.rank = run, config, device, rank
        self.first, self._mesh = config.parallel, None

    @property
    def mesh(self) -> Mesh:
        """The mesh of the plan in force."""
        assert self._mesh is not None
        return self._mesh

    def plan_at(self, checkpoint: Path | None) -> ParallelPlan:
        """The plan in force at a checkpoint; None: at the start."""
        return plan_in_force(self.first, self.config.growth, read_lineage(checkpoint) if checkpoint else Lineage())

    def follow(self, checkpoint: Path | None) -> None:
        """Take the plan on which a run goes on from a checkpoint.

        Raises:
            Stopped: a growth changed the number of ranks, and a launcher has to start them.
            UserError: the config asks for another number of ranks.
        """
        plan = self.plan_at(checkpoint)
        ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        try:
            plan.check_world(ranks)
        except ValueError as error:
            if not any(event.parallel for event in self.config.growth):
                raise UserError(f"{self.run.path}/config.toml: {error}.") from error
            step = read_lineage(checkpoint).step if checkpoint else 0
            if self.rank == 0:
                self.run.log("events", {"event": "replanned", "time": time.time(), "step": step, "ranks": plan.world_size})
            raise Stopped(
                f"{self.run.path}: after the growth at step {step} the plan needs {plan.world_size} ranks; these are {ranks}. "
                f"Go on with: regrowth train --resume {self.run.path}"
            ) from error
        if self._mesh is None or self._mesh.plan != plan:
            # The groups of the mesh before stay: torch would give their names again, and ranks would meet at the addresses of old ones.
            self._mesh = Mesh(plan, self.device, self.config.run.timeout_seconds)
            self.config = self.config.model_copy(update={"parallel": plan})
