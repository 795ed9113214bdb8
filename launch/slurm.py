"""Runs as Slurm jobs: one readable batch script from a template, submitted with sbatch. All Slurm of the project is here."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from regrowth.data_pipeline.config import ExecutorConfig
from regrowth.errors import RunFailed, UserError

if TYPE_CHECKING:
    from regrowth.pretrain.run_folder import RunFolder

_WARN_SECONDS = 120  # before the time limit: enough to finish a step and write a checkpoint


@dataclass(frozen=True)
class JobOptions:
    """What a job asks Slurm for. `ranks_per_node`: at most; in the place of `nodes`."""

    nodes: int = 1
    partition: str | None = None
    account: str | None = None
    minutes: int = 60
    gpus_per_node: int = 0
    setup: list[str] = field(default_factory=list)  # shell lines that run first
    ranks_per_node: int | None = None
    spares: int = 0  # nodes beside those that the run needs
    template: str | None = None  # in the place of ours
    max_nodes: int | None = None  # that the machine's description allows


def launch(config: str, overrides: list[str], options: JobOptions, print_only: bool = False) -> str:
    """The `launch slurm` command. `config` may be the folder of a run to go on with. Returns the job's number, empty if only printed."""
    from regrowth.launch.place import note_place
    from regrowth.pretrain.run_folder import RunFolder

    console = Console(highlight=False, markup=False, soft_wrap=True)
    script, folder = render(config, overrides, options)
    if print_only:
        console.print(script, end="")
        return ""
    folder.mkdir(parents=True, exist_ok=True)
    told = submit(script)
    console.print(told)
    job = told.split()[-1]
    if (Path(config) / "config.toml").exists():
        note_place(RunFolder(Path(config)), "slurm", job=job, options=asdict(options))
    return job


def _hand_over_waiting(job: str, successor: str, console: Console) -> None:
    """Let jobs that wait for the end of this one wait for the one that goes on with its run."""
    try:
        done = subprocess.run(["squeue", "-h", "-o", "%i|%E"], capture_output=True, text=True, timeout=60, check=True)
        for line in done.stdout.splitlines():
            waiting, _, condition = line.partition("|")
            if job and re.search(rf":{job}\b", condition):
                condition = re.sub(r"\([^)]*\)", "", re.sub(rf":{job}\b", f":{successor}", condition))
                subprocess.run(["scontrol", "update", f"JobId={waiting}", f"Dependency={condition}"], timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        console.print(
            f"note: jobs that wait for job {job} could not be told to wait for {successor} ({error}); submit them again when that one has ended."
        )


def end_job(folder: Path) -> None:
    """How a job ends itself. A run that waits for other ranks after a growth gets a job of its new size; one that was stopped or lost
    goes into the queue again, under the same number; of one that is finished or given up the user's command is told."""
    from regrowth.launch.place import place_of
    from regrowth.launch.supervise import given_up, may_go_on, tell_end
    from regrowth.pretrain.run_folder import RunFolder

    run, console = RunFolder.open(folder), Console(highlight=False, markup=False, soft_wrap=True)
    place = place_of(run)
    if run.replanned and place:
        job = launch(str(folder), [], JobOptions(**place.options))
        # A job that fails before it logs anything must not be submitted again for ever.
        run.log("events", {"event": "job submitted", "time": time.time()})
        _hand_over_waiting(os.environ.get("SLURM_JOB_ID", ""), job, console)
    elif os.environ.get("SLURM_JOB_ID") and may_go_on(run):
        _requeue(run, os.environ["SLURM_JOB_ID"], console)
    elif run.finished or (reason := given_up(run)):
        tell_end(run, f"{run.path}: finished." if run.finished else reason, console)


def _requeue(run: "RunFolder", job: str, console: Console) -> None:
    from regrowth.launch.supervise import note_requeued

    note_requeued(run, job)
    console.print(f"{run.path}: not finished; job {job} goes into the queue again.")
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60)
        refused = done.stderr.strip() if done.returncode else ""
    except (subprocess.TimeoutExpired, OSError) as error:
        refused = str(error)
    if refused:
        raise RunFailed(f"launch slurm: Slurm does not requeue job {job} ({refused}). Go on with: regrowth launch slurm {run.path}")


def render(config: str, overrides: list[str], options: JobOptions) -> tuple[str, Path]:
    """The batch script of a config's plan, and the folder that its logs go to. Every user string is quoted for the shell.

    Args:
        config: may be a run's folder: the job then goes on with that run, on the plan that it has come to.

    Raises:
        UserError: the plan's ranks do not fall evenly on the nodes, or an option holds a line break.
    """
    from regrowth.pretrain.config import load_config
    from regrowth.pretrain.run_folder import RunFolder
    from regrowth.settings import find_recipe

    resumed = (Path(config) / "config.toml").exists()
    settings = RunFolder(Path(config)).config(overrides) if resumed else load_config(config, overrides)
    ranks = (RunFolder(Path(config)).plan(settings) if resumed else settings.parallel).world_size
    nodes = options.nodes
    if options.ranks_per_node:
        nodes = next(n for n in range(-(-ranks // options.ranks_per_node), ranks + 1) if ranks % n == 0)
    if options.max_nodes and nodes + options.spares > options.max_nodes:
        raise UserError(f"--nodes {nodes}{f' --spares {options.spares}' if options.spares else ''}: the machine's description allows slurm.max_nodes = {options.max_nodes}. Choose a plan (parallel.*) of fewer "
                        f"than {ranks} ranks, or more of them on a node.")  # fmt: skip
    if ranks % nodes:
        raise UserError(f"--nodes {nodes}: the plan's {ranks} ranks do not fall evenly on them; choose nodes from "
                        f"{', '.join(str(d) for d in range(1, ranks + 1) if ranks % d == 0)} or change parallel.*")  # fmt: skip
    if 0 < options.gpus_per_node < ranks // nodes and settings.run.device != "cpu":
        raise UserError(f"--gpus-per-node {options.gpus_per_node}: {ranks // nodes} ranks come to each of {nodes} nodes, and each rank needs a GPU. "
                        f"Ask for more --nodes, or for as many GPUs as ranks.")  # fmt: skip
    for name, value in (
        ("--partition", options.partition),
        ("--account", options.account),
        ("run.name", settings.run.name),
        ("run.folder", str(settings.run.folder)),
    ):
        if value and any(c in value for c in "\n\r"):
            raise UserError(f"{name}: holds a line break; Slurm options are single lines.")
    logs = (settings.run.folder / "slurm").resolve()
    script = _filled(
        options.template or "slurm.sh.jinja",
        name=_option(settings.run.name),
        nodes=nodes,
        spares=options.spares,
        elastic=settings.supervision.elastic,
        minutes=options.minutes,
        partition=_option(options.partition) if options.partition else "",
        account=_option(options.account) if options.account else "",
        gpus_per_node=options.gpus_per_node,
        logs=_file_option(logs),
        warn_seconds=min(_WARN_SECONDS, options.minutes * 30),
        setup=options.setup,
        python=shlex.quote(sys.executable),
        ranks_per_node=ranks // nodes,
        restarts=settings.supervision.restarts,
        notes=shlex.quote(str(logs)),
        options=shlex.quote(json.dumps(asdict(replace(options, ranks_per_node=options.ranks_per_node or ranks // nodes)))),
        arguments=shlex.join(
            ["train", "--resume", str(Path(config).resolve()), *overrides]
            if resumed
            else ["train", str(find_recipe(config).resolve()), *overrides]
        ),
    )
    return script, logs


def render_stage(name: str, command: list[str], logs: Path, options: JobOptions, cpus: int) -> str:
    """The batch script of a stage of a chain that does not train: one task, put into the queue again when it ends with 75.

    Raises:
        UserError: an option holds a line break.
    """
    for key, value in (("partition", options.partition), ("account", options.account), ("the folder", str(logs))):
        if value and any(c in value for c in "\n\r"):
            raise UserError(f"stage {name}: {key} holds a line break; Slurm options are single lines.")
    return _filled(
        "slurm_stage.sh.jinja",
        name=_option(name),
        cpus=cpus,
        gpus=options.gpus_per_node,
        minutes=options.minutes,
        logs=_file_option(logs.resolve()),
        warn_seconds=min(60, options.minutes * 30),
        partition=_option(options.partition) if options.partition else "",
        account=_option(options.account) if options.account else "",
        setup=options.setup,
        command=shlex.join([sys.executable, "-m", "regrowth", *command]),
    )


@dataclass(frozen=True)
class ArrayJob:
    """One array job: a phase of a corpus, done by `ranks` array tasks, after the job `after` has ended."""

    name: str
    folder: Path
    phase: int
    ranks: int
    after: str = ""
    gpus: int = 0  # of each task


def render_array(job: ArrayJob, options: ExecutorConfig) -> str:
    """The batch script of an array job.

    Raises:
        UserError: an option holds a line break.
    """
    for key, value in (("partition", options.partition), ("account", options.account), ("the corpus's folder", str(job.folder))):
        if value and any(c in value for c in "\n\r"):
            raise UserError(f"data.executor: {key} holds a line break; Slurm options are single lines.")
    return _filled(
        "slurm_array.sh.jinja",
        name=_option(job.name),
        ranks=job.ranks,
        throttle=options.throttle,
        cpus=options.cpus_per_task,
        gpus=job.gpus,
        minutes=options.minutes,
        memory_megabytes=int(options.memory_gigabytes * 1024) if options.memory_gigabytes else None,
        partition=_option(options.partition) if options.partition else "",
        account=_option(options.account) if options.account else "",
        after=job.after,
        log_option=_file_option((job.folder / "slurm").resolve()),
        logs=shlex.quote(str((job.folder / "slurm").resolve())),
        warn_seconds=min(60, options.minutes * 30),
        setup=options.setup,
        python=shlex.quote(sys.executable),
        folder=shlex.quote(str(job.folder.resolve())),
        phase=job.phase,
        attempts=options.attempts,
    )


def queued(jobs: list[str]) -> dict[str, dict[str, int]]:
    """How many tasks of each job are in which state, for jobs that are still known to be waiting or running.

    Raises:
        RunFailed: Slurm does not answer, so nothing is known.
    """
    if not jobs or not shutil.which("squeue"):
        return {}
    try:
        done = subprocess.run(["squeue", "-h", "-r", "-o", "%F|%T|%r"], capture_output=True, text=True, timeout=30, check=True)
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
        raise RunFailed(f"squeue does not answer ({error}); the controller may be down. Try again when it is back.") from error
    states: dict[str, dict[str, int]] = {}
    for line in done.stdout.splitlines():
        array, state, reason = line.split("|")
        if array in jobs:
            # What a job waits for, where that is not simply its turn: an unmeetable request would wait for ever.
            told = state.lower() if reason in ("None", "Priority", "Resources", "Dependency", "BeginTime") else f"{state.lower()}: {reason}"
            states.setdefault(array, {})[told] = states.get(array, {}).get(told, 0) + 1
    return states


def _filled(template: str, **values: Any) -> str:
    """A batch script of ours, by its file's name, or of the user's, by its path.

    Raises:
        UserError: there is no such file, or it is no template for these values.
    """
    import jinja2

    path = Path(template) if "/" in template else Path(__file__).parent / template
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    try:
        return environment.from_string(path.read_text(encoding="utf-8")).render(values)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--template {template}: cannot be read ({error}).") from error
    except jinja2.TemplateSyntaxError as error:
        raise UserError(
            f"--template {template}, line {error.lineno}: {error}. Begin with a copy of {Path(__file__).parent}/slurm.sh.jinja."
        ) from error
    except jinja2.TemplateError as error:
        known = ", ".join(sorted(values))
        raise UserError(f"--template {template}: {error}. What a template can have filled in: {known}.") from error


def submit(script: str, after: list[str] | None = None) -> str:
    """Hand a script to sbatch; returns what sbatch said.

    Args:
        after: jobs that have to end well before; if one does not, this one is taken out of the queue.

    Raises:
        UserError: there is no Slurm here, or it refused the job (its own words are given).
        RunFailed: the controller does not answer.
    """
    if not shutil.which("sbatch"):
        raise UserError("launch slurm: no sbatch on this machine. Log in to the cluster's login node, or use --print to see the script.")
    try:
        depending = [f"--dependency=afterok:{':'.join(after)}", "--kill-on-invalid-dep=yes"] if after else []
        done = subprocess.run(["sbatch", *depending], input=script, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired as error:
        raise RunFailed("launch slurm: sbatch did not answer within 60 s; the controller may be down. Nothing was submitted.") from error
    if done.returncode:
        raise UserError(f"launch slurm: Slurm refused the job: {done.stderr.strip()}")
    return done.stdout.strip()


def _file_option(path: Path) -> str:
    """A path of an #SBATCH line, in which % begins what Slurm fills in, and after a backslash, wherever it stands, nothing is filled in."""
    if "\\" in str(path):
        raise UserError(f"{path}: Slurm cannot write logs to a folder with a backslash in its name.")
    return _option(str(path)).replace("%", "%%")


def _option(value: str) -> str:
    """A value of an #SBATCH line, quoted where it has to be."""
    return value if all(c.isalnum() or c in "-_./%=+,@:" for c in value) else '"' + value.replace('"', '\\"') + '"'
