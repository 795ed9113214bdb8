"""`launch mpi`: this process is one of a run's ranks, which mpirun or srun have started and which find each other without torchrun.

Errors are told once, by the rank that has the most to say. A rank that fails alone ends the others, who would wait for it.
"""

import os
import shlex
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regrowth.errors import RegrowthError, Stopped, UserError
from regrowth.launch.letter import tell
from regrowth.launch.rendezvous import Standing, clear_away, meeting, standing, world_of_mpi
from regrowth.mpi import Alone, MpiRanks

if TYPE_CHECKING:
    from regrowth.launch.local import Letter
    from regrowth.pretrain.config import RunConfig
    from regrowth.pretrain.run_folder import RunFolder

_ECHO_SECONDS = 3.0  # for the others to say that they fail too
_STOP_SECONDS = 120.0  # for the others to write a checkpoint, after a request to stop

_TELL_SECONDS = 1.0  # for what was told to reach the terminal, which mpirun may leave behind when ranks are aborted


def launch(config: str, overrides: list[str]) -> None:
    """The `launch mpi` command; does not return where several ranks have trained to the end.

    Args:
        config: may be the folder of a run to go on with.

    Raises:
        UserError: neither mpirun nor srun started this process, or the plan needs another number of ranks.
    """
    world = world_of_mpi(os.environ)
    here = Standing(world.rank, world.size, *world.on_this_host()) if world else standing(os.environ)
    together = world or Alone()
    try:
        settings, run = together.together(partial(_open, config, overrides, here))
        if here is None:
            raise UserError(_how_to_start(config, overrides, settings, run))
        if run and run.finished:
            if here.rank == 0:
                print(f"{run.path}: finished already.")
            return
        os.environ.update(meeting(os.environ, here, world))
        from regrowth.launch.one_rank import be_one_rank
        from regrowth.parallel.mesh import choose_device

        together.together(lambda: choose_device(settings.run.device))  # before a rank waits for one that has too few GPUs
        be_one_rank(settings, run, by="mpi", failed=partial(_end, here, world))
    except RegrowthError as error:  # of all ranks, or of all of a host
        clear_away(here)
        if here is None or here.rank == 0 or (world is None and here.local_rank == 0):
            raise
        sys.exit(error.exit_code)
    _leave(here, world)


def _open(config: str, overrides: list[str], here: Standing | None) -> "tuple[RunConfig, RunFolder | None]":
    from regrowth.pretrain.config import load_config
    from regrowth.pretrain.run_folder import RunFolder

    run = RunFolder(Path(config)) if (Path(config) / "config.toml").exists() else None
    settings = run.config(overrides) if run else load_config(config, overrides)
    try:
        if here:
            (run.plan(settings) if run else settings.parallel).check_world(here.size)
    except ValueError as error:
        raise UserError(f"{error}.") from error
    return settings, run


def _how_to_start(config: str, overrides: list[str], settings: "RunConfig", run: "RunFolder | None") -> str:
    ranks = (run.plan(settings) if run else settings.parallel).world_size
    command = shlex.join(["regrowth", "launch", "mpi", config, *overrides])
    return (
        f"launch mpi: neither mpirun nor srun started this process, and the plan needs {ranks} rank{'s' if ranks > 1 else ''}. "
        f"Start it with: mpirun -n {ranks} {command}; in a Slurm job: srun --ntasks={ranks} --kill-on-bad-exit=1 {command}"
    )


def _end(here: Standing, world: MpiRanks | None, folder: Path, error: BaseException) -> None:
    """Leave this rank's letter, let one rank tell, and end. Returns for a rank alone."""
    from regrowth.launch.local import letters
    from regrowth.pretrain.worker import leave_letter

    code = leave_letter(folder, error)
    if here.size == 1:
        return
    if not isinstance(error, RegrowthError):
        sys.excepthook(type(error), error, error.__traceback__)  # into this rank's log, and where mpirun prints
    until = time.monotonic() + (_STOP_SECONDS if isinstance(error, Stopped) else _ECHO_SECONDS)
    while len(left := letters(folder)) < here.size and time.monotonic() < until:
        time.sleep(0.1)
    speaker = _speaker(left)
    if speaker.rank == here.rank:
        log = "" if speaker.exit_code in (Stopped.exit_code, UserError.exit_code) else f" (log: {folder}/logs/rank-{here.rank}.log)"
        tell(f"{speaker.message}{log}", code)
    _leave(here, world, code, everyone=len(left) == here.size)


def _speaker(left: "list[Letter]") -> "Letter":
    """Whose letter says the most: the user's faults, then requests to stop, then what no new start mends; echoes of another's death at last."""
    order: list[Any] = [UserError.exit_code, Stopped.exit_code]
    return min(
        left,
        key=lambda told: (told.echo, order.index(told.exit_code) if told.exit_code in order else 2, told.mendable, told.time, told.rank),
    )


def _leave(here: Standing, world: MpiRanks | None, code: int = 0, everyone: bool = True) -> None:
    """End this rank, and with it, if not everyone is about to leave, those that would wait for it.

    Everything is written: this is done without the interpreter's teardown, in which communication threads that are still winding down abort now and then.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if world and everyone:
        world.leave()  # mpirun ends them all when one just goes
    clear_away(here)
    if world and not everyone:
        time.sleep(_TELL_SECONDS)
        world.abort(code)
    os._exit(code)  # without MPI, the others hear of it by their closed connections
