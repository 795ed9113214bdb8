"""When a run's checkpoints are written, and what is told of them; how, is `background`'s and `checkpoint`'s."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NoReturn

from regrowth.errors import RunFailed
from regrowth.parallel.agree import barrier
from regrowth.pretrain.background import BackgroundSaver, Saved
from regrowth.pretrain.checkpoint import prune
from regrowth.pretrain.checkpoint_folders import checkpoint_path
from regrowth.pretrain.config import RunConfig
from regrowth.pretrain.records import Records
from regrowth.pretrain.session import Session


class Saving:
    """One rank's part in a run's checkpoints; called by every rank at the same steps.

    Args:
        at: the step of the checkpoint that the run starts from, -1 without one.
        pruning: entered while old checkpoints are removed, which may take long.
    """

    def __init__(self, config: RunConfig, records: Records, at: int, pruning: Callable[[], AbstractContextManager[None]]) -> None:
        self.config, self.records, self.at, self.pruning = config, records, at, pruning
        self.background = BackgroundSaver(config.parallel.world_size, config.run.timeout_seconds)

    def save(self, step: int, session: Session, guard: dict[str, float], wait: bool = False) -> None:
        """Begin to write a checkpoint of this moment, unless there is one, and with `wait` see it stand.

        Raises:
            RunFailed: it, or the one before, could not be written.
        """
        if self.at != step:
            state = session.state(step, guard)
            path = checkpoint_path(self.records.run.path, step, grown=step in session.lineage.growth_steps)
            logs = self.records.run.logs()
            before = self.background.start(path, step, session.engine.weights(), session.engine.moments(), state, logs)
            self.at = step
            if before is not None:
                self._note(before)
        if wait or not self.config.checkpoint.background:
            self.settle()

    def settle(self) -> None:
        """Until no checkpoint is on its way."""
        if (saved := self.background.wait()) is not None:
            self._note(saved)
        barrier()

    def note_finished(self) -> None:
        """Tell of the checkpoint on its way, if it stands by now."""
        if (saved := self.background.finished()) is not None:
            self._note(saved)

    def fail(self) -> NoReturn:
        """After any rank's write has failed: raise it where it did, and a letter elsewhere.

        Raises:
            RunFailed: always.
        """
        self.background.wait()
        raise RunFailed(f"{self.records.run.path}: a checkpoint could not be written on another rank. Older checkpoints are intact.")

    def _note(self, saved: Saved) -> None:
        if self.records.rank == 0:
            with self.pruning():
                prune(self.records.run.path, self.config.checkpoint.keep)
        seconds, stall = round(saved.write_seconds, 3), round(saved.stall_seconds, 3)
        self.records.event("checkpoint", step=saved.step, path=saved.path.name, seconds=seconds, stall=stall)
