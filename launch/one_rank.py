"""One rank of a run, as torchrun starts it, on its own or in a Slurm job; or as mpirun or srun do."""

import faulthandler
import json
import os
import shlex
import signal
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from regrowth.errors import UserError
from regrowth.files import write_json, write_text
from regrowth.launch.local import final_letter, letters
from regrowth.launch.place import note_place, place_of
from regrowth.launch.supervise import KNOWN_ENDS, backoff, losses_in_a_row, note_loss
from regrowth.launch.training import change_config, corpus_of, own_corpus
from regrowth.parallel.agree import on_first_rank, patience
from regrowth.parallel.mesh import choose_device, process_group
from regrowth.pretrain.config import RunConfig
from regrowth.pretrain.rank_output import Stamped
from regrowth.pretrain.run_folder import RunFolder
from regrowth.pretrain.train import train as train_rank
from regrowth.pretrain.worker import leave_letter
from regrowth.settings import differences

_MEETING_SECONDS = 600.0  # for all ranks to be there, at least: hosts import at different speeds


def be_one_rank(
    config: RunConfig,
    run: RunFolder | None,
    by: Literal["torchrun", "mpi"] = "torchrun",
    failed: Callable[[Path, BaseException], object] = leave_letter,
) -> None:
    """Rank 0 prepares data and folder, then all train.

    Args:
        config: of a run to go on with, its own with what is to change in it.
        failed: called with the run's folder when this rank fails.

    Raises:
        UserError: the plan needs another number of ranks; the config has changed since this job began; or what a rank said before torchrun started it again.
    """
    asked = config.model_dump(mode="json")
    noted = _run_of_this_job(config)
    run = run or noted
    again = bool(run and noted and run.path.resolve() == noted.path.resolve())
    if run and run is noted:
        config = run.config()
    if again and run and (run.replanned or run.finished):  # the job's script goes on with it; or a rank was lost on its way out
        return
    restarted = any(os.environ.get(count, "0") != "0" for count in ("TORCHELASTIC_RESTART_COUNT", "REGROWTH_START"))  # in the same job
    world_size = int(os.environ["WORLD_SIZE"])
    fewer = None
    if restarted and config.supervision.elastic and world_size < config.parallel.world_size:  # on what is left of the job's nodes
        fewer = config.with_fewer_replicas(world_size)

    def set_up() -> tuple[Path, str]:
        # Torchrun starts again whatever it was that ended a rank; each of its agents counts the ends of its own ranks.
        if again and run and restarted and (last := final_letter(run.path)):
            raise last
        if again and run and not restarted:
            _refuse_a_changed_config(run, asked)
        if run:
            change_config(run, config)
        else:
            RunFolder.check_place(config)
        place = corpus_of(run) if run else own_corpus(config, Console(stderr=True))
        folder = run or RunFolder.create(config)
        if run is None:
            write_json(folder.path / "data.json", {"corpus": place})
        elif _ended_unnoted(folder):
            said = [letter.message for letter in letters(folder.path) if not letter.echo]
            silent = f"{folder.path}: its ranks ended without a word; {folder.path}/logs and what mpirun or srun printed tell why"
            note_loss(folder, said[0] if said else silent)
        elif again and not run.ended_by(*KNOWN_ENDS):
            told = f"{folder.path}: a rank was lost, and torchrun started all of them again; {folder.path}/logs and the job's log tell why"
            note_loss(folder, told)
        if restarted and (seconds := backoff(config.supervision, losses_in_a_row(folder))):
            time.sleep(seconds)
        for letter in folder.path.glob("logs/rank-*.error"):  # of an earlier start, of ranks that this one may not have
            letter.unlink()
        options = json.loads(os.environ.get("REGROWTH_LAUNCH_OPTIONS", "{}"))
        job = os.environ.get("SLURM_JOB_ID", "") if options else ""
        note_place(folder, "slurm" if job else by, job=job, options=options, asked=asked if job else {})
        if note := _note_of_this_job(config):  # for the job's own script, which the run may outlive, and for its next start
            write_text(note, str(folder.path.resolve()))
        return folder.path, place

    try:
        (run.plan(fewer or config) if run else config.parallel).check_world(world_size)
    except ValueError as error:
        raise UserError(f"{error}.") from error
    meeting_seconds = max(_MEETING_SECONDS, config.run.timeout_seconds)
    with process_group(choose_device(config.run.device), meeting_seconds):
        with patience(meeting_seconds):  # the data may take hours to prepare on rank 0
            folder, place = on_first_rank(set_up)
        _tee_output(folder)
        if os.environ["RANK"] == "0":
            print(f"run {folder}", flush=True)
        try:
            train_rank(folder, place, ranks_here=int(os.environ.get("LOCAL_WORLD_SIZE", "1")), config=fewer)
        except BaseException as error:
            failed(folder, error)
            raise


def _ended_unnoted(run: RunFolder) -> bool:
    """Whether mpirun or srun have ended the last start's ranks, of which nobody else takes note."""
    place, last = place_of(run), run.rows("events")[-1:]
    return bool(place and place.by == "mpi" and last and not run.replanned and not run.finished) and not run.ended_by(*KNOWN_ENDS)


def _refuse_a_changed_config(run: RunFolder, asked: dict[str, Any]) -> None:
    """A job that is put into the queue again reads its config file again, which may be another by then."""
    place = place_of(run)
    if place is None or not place.asked or not (changed := differences(place.asked, asked)):
        return
    told = ", ".join(f"{key} was {json.dumps(before)}, is {json.dumps(after)}" for key, before, after in changed)
    resume = f"regrowth launch resume {shlex.quote(str(run.path))}"
    if all(_is_toml(after) for _, _, after in changed):
        take = f"{resume} {shlex.join(f'{key}={json.dumps(after)}' for key, _, after in changed)}"
    else:
        take = f"{resume}, with each change behind it as KEY=VALUE in TOML"
    error = UserError(
        f"{run.path}: the job's config has changed since it began: {told}. To go on as it was: {resume}; to take the change: {take}"
    )
    leave_letter(run.path, error)
    raise error


def _is_toml(value: Any) -> bool:
    """Whether a value reads the same in TOML as in JSON."""
    try:
        return tomllib.loads(f"value = {json.dumps(value)}")["value"] == value
    except tomllib.TOMLDecodeError:
        return False


def _tee_output(folder: Path) -> None:
    """Let what this rank prints, and its stacks on SIGUSR2, end up in the run's folder as well."""
    (folder / "logs").mkdir(exist_ok=True)
    log = (folder / "logs" / f"rank-{os.environ['RANK']}.log").open("a", encoding="utf-8")
    sys.stdout, sys.stderr = Stamped(log, sys.stdout), Stamped(log, sys.stderr)
    faulthandler.register(signal.SIGUSR2, file=log, all_threads=True)


def _note_of_this_job(config: RunConfig) -> Path | None:
    """Where a Slurm job notes which run it is; a job that is requeued keeps its number."""
    job = os.environ.get("SLURM_JOB_ID")
    return config.run.folder / "slurm" / f"job-{job}.run" if job else None


def _run_of_this_job(config: RunConfig) -> RunFolder | None:
    """The run that this job has begun, when it or its ranks are started again. A job may train several, one after the other: one that was finished before counts no more."""
    note = _note_of_this_job(config)
    if note is None or not note.exists():
        return None
    run = RunFolder.open(Path(note.read_text(encoding="utf-8")))
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" or os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
    return run if run.config().run.name == config.run.name and (restarted or not run.finished) else None
