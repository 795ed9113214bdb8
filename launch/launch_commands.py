"""The commands of `regrowth launch`. Each imports what it needs when it runs."""

from pathlib import Path
from typing import Annotated

import typer

from regrowth.launch.arguments import Config, DryRun, Overrides

launch_app = typer.Typer(help="Start runs on this machine or on a cluster, and look after them.", no_args_is_help=True)
Run = Annotated[Path, typer.Argument(help="A run's folder.")]


@launch_app.command("local")
def local(config: Config, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Start a run's ranks on this machine (what `regrowth train` does)."""
    from regrowth.launch.training import train as go

    go(config, overrides or [], None, dry_run)


@launch_app.command("slurm")
def slurm(
    config: Annotated[str, typer.Argument(help="A TOML file, the name of a recipe, or the folder of a run to go on with.")],
    overrides: Overrides = None,
    cluster: Annotated[
        str | None, typer.Option(help="A described machine, or a path: the defaults of the options below, and their limits.")
    ] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Default: 1; with --cluster, as many as the plan needs.")] = None,
    ranks_per_node: Annotated[
        int | None, typer.Option(min=1, help="In the place of --nodes: as many nodes as the plan then needs.")
    ] = None,
    spares: Annotated[int, typer.Option(min=0, help="Nodes to ask for beside those, for when one fails.")] = 0,
    partition: Annotated[str | None, typer.Option(help="Slurm partition.")] = None,
    account: Annotated[str | None, typer.Option(help="Slurm account.")] = None,
    minutes: Annotated[int | None, typer.Option(min=1, help="Time limit; default: 60.")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(min=0, help="GPUs to ask for on each node; default: 0.")] = None,
    setup: Annotated[
        list[str] | None, typer.Option(help="A shell line to run first (module load ..., source ...); may be repeated.")
    ] = None,
    template: Annotated[Path | None, typer.Option(help="A batch script template of your own (jinja), in the place of ours.")] = None,
    print_only: Annotated[bool, typer.Option("--print", help="Print the batch script; submit nothing.")] = False,
) -> None:
    """Submit a run as a Slurm job."""
    from regrowth.launch.on_cluster import options_on
    from regrowth.launch.slurm import launch as go

    asked = {"nodes": nodes, "partition": partition, "account": account, "minutes": minutes, "gpus_per_node": gpus_per_node, "setup": setup,
             "ranks_per_node": ranks_per_node, "spares": spares or None, "template": str(template.resolve()) if template else None}  # fmt: skip
    go(config, overrides or [], options_on(cluster, asked), print_only)


@launch_app.command("mpi")
def mpi(
    config: Annotated[str, typer.Argument(help="A TOML file, the name of a recipe, or the folder of a run to go on with.")],
    overrides: Overrides = None,
) -> None:
    """Be one of the ranks that mpirun or srun start: `mpirun -n 4 regrowth launch mpi CONFIG`."""
    from regrowth.launch.mpi import launch as go

    go(config, overrides or [])


@launch_app.command("end-job", hidden=True)
def end_job(run: Run) -> None:
    """How a Slurm job ends itself whose run is not finished."""
    from regrowth.launch.slurm import end_job as go

    go(run)


@launch_app.command("hosts", hidden=True)
def hosts(count: int) -> None:
    """The nodes of a Slurm job with spare ones that its ranks are started on."""
    from regrowth.launch.spares import hosts as go

    print(go(count))


@launch_app.command("status")
def status(
    run: Annotated[Path, typer.Argument(help="A run's folder, or a folder of runs.")] = Path("runs"),
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What runs do: state, step, loss, newest checkpoint, starts and failures, last sign of a rank."""
    from regrowth.launch.runs import status as go

    go(run, json_)


@launch_app.command("logs")
def logs(
    run: Run,
    rank: Annotated[list[int] | None, typer.Option(help="Only of this rank; may be repeated.", min=0)] = None,
    lines: Annotated[int, typer.Option("--lines", "-n", help="The last so many; 0: all of the last 64 MB.", min=0)] = 200,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Stay, and print what comes until the run ends.")] = False,
) -> None:
    """The logs of all ranks and the run's events, merged by time; the first error on top."""
    from regrowth.launch.logs import show_logs as go

    go(run, rank or [], lines, follow)


@launch_app.command("cancel")
def cancel(run: Run, now: Annotated[bool, typer.Option("--now", help="At once, without a checkpoint.")] = False) -> None:
    """Ask a run to write a checkpoint and stop, and wait until it has."""
    from regrowth.launch.runs import cancel as go

    go(run, now)


@launch_app.command("resume")
def resume(run: Run, overrides: Overrides = None) -> None:
    """Go on with a run as it was started: on this machine, or as a Slurm job with the same options."""
    from regrowth.launch.runs import resume as go

    go(run, overrides or [])


Chain = Annotated[Path, typer.Argument(help="A TOML file with [[stages]].")]


@launch_app.command("pipeline")
def pipeline(
    chain: Chain,
    slurm: Annotated[bool, typer.Option("--slurm", help="Submit each stage as a job that waits for those that it needs.")] = False,
    begin_at: Annotated[str | None, typer.Option("--from", help="Make this stage afresh, and all that need it.")] = None,
    status: Annotated[bool, typer.Option("--status", help="Only show how the stages are.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="With --status: print JSON.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Make a chain of commands, as far as it is not made or has changed: curate, train, convert, evaluate."""
    from regrowth.launch.pipeline_run import make
    from regrowth.launch.pipeline_run import status as show

    if status:
        show(chain, json_)
        return
    make(chain, slurm, begin_at, dry_run)


@launch_app.command("stage", hidden=True)
def stage(
    chain: Chain,
    name: str,
    record: Annotated[str | None, typer.Option()] = None,
    begin: Annotated[bool, typer.Option("--begin")] = False,
) -> None:
    """One stage of a chain, as its job makes it; with --begin, only what comes before its command."""
    from regrowth.launch.pipeline_run import one_stage as go

    go(chain, name, record, begin)
