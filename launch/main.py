"""The `regrowth` command. Imports nothing heavy: each command imports what it needs when it runs.

Exit codes: 0 done, 1 the run failed, 2 the user's input, 75 stopped and resumable.
"""

import os
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperGroup

from regrowth.errors import RegrowthError
from regrowth.launch.arguments import BudgetTokens, Config, DryRun, Overrides
from regrowth.launch.launch_commands import launch_app
from regrowth.launch.letter import tell
from regrowth.launch.select_commands import select_app


def with_default(name: str) -> type[TyperGroup]:
    """A group of commands of which one need not be named: `regrowth grow RUN` is `regrowth grow checkpoint RUN`."""

    class Group(TyperGroup):
        def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
            named = args and (args[0] in self.commands or args[0] == "--help")
            return super().parse_args(ctx, args if named or not args else [name, *args])

    return Group


app = typer.Typer(
    help="Pretraining that throws nothing away: raw documents and a recipe go in, a pretrained model comes out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
data_app = typer.Typer(help="Documents to Arrow shards.", no_args_is_help=True)
mix_app = typer.Typer(help="Look into the mixture of a run.", no_args_is_help=True)
grow_app = typer.Typer(
    cls=with_default("checkpoint"), help="Grow a checkpoint into a larger model's start, or plan to.", no_args_is_help=True
)
lineage_app = typer.Typer(cls=with_default("show"), help="Where a checkpoint comes from.", no_args_is_help=True)
app.add_typer(data_app, name="data")
data_app.add_typer(select_app, name="select")
app.add_typer(mix_app, name="mix")
app.add_typer(launch_app, name="launch")
app.add_typer(grow_app, name="grow")
app.add_typer(lineage_app, name="lineage")

Operators = Annotated[list[str] | None, typer.Argument(help="An operator and its settings: op=hyperclone factor=2 (default: op=stack).")]
Checkpoint = Annotated[Path, typer.Argument(help="A checkpoint folder, or a run's folder (its newest whole checkpoint).")]


@app.callback()
def options(debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False) -> None:
    """Options of all commands."""
    if debug:
        os.environ["REGROWTH_DEBUG"] = "1"


@app.command()
def quickstart(overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Raw documents to an exported model and a report, in minutes."""
    from regrowth.launch.quickstart import quickstart as go

    go(overrides or [], dry_run)


@app.command()
def train(
    config: Annotated[str | None, typer.Argument(help="A TOML file or the name of a recipe; not with --resume.")] = None,
    overrides: Overrides = None,
    resume: Annotated[Path | None, typer.Option("--resume", help="Go on with the run in this folder.")] = None,
    dry_run: DryRun = False,
    deterministic: Annotated[bool, typer.Option("--deterministic", help="Equal plans give equal bits; refuses what cannot.")] = False,
    profile: Annotated[bool, typer.Option("--profile", help="Trace some steps and tell where they go, in the run's folder.")] = False,
) -> None:
    """Train: prepare the data if need be, start the plan's ranks on this machine, watch. Under torchrun: be one of the ranks."""
    from regrowth.launch.training import train as go

    more = ["run.deterministic=true"] if deterministic else []
    go(config, [*(overrides or []), *more], resume, dry_run, profile)


@app.command()
def conformance(
    only: Annotated[str, typer.Option(help="Plans whose name contains this.")] = "",
    ranks: Annotated[int, typer.Option(help="Plans of at most so many ranks, started here.", min=1)] = 8,
    covering: Annotated[bool, typer.Option("--covering", help="A subset in which every axis appears.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the table as JSON.")] = None,
    listing: Annotated[bool, typer.Option("--list", help="Name the plans and run none.")] = False,
) -> None:
    """Hold every parallel plan to one process: losses and all gradients. Under torchrun or Slurm: be one of the ranks."""
    from regrowth.launch.conformance import conformance as go

    go(only, ranks, covering, out, listing)


@app.command()
def plan(
    config: Config, overrides: Overrides = None, cluster: Annotated[str, typer.Option(help="A described machine, or a path.")] = "laptop"
) -> None:
    """Predict memory per rank and time per step of a config's plan."""
    from regrowth.launch.show import show_plan

    show_plan(config, overrides or [], cluster)


@grow_app.command("checkpoint")
def grow_checkpoint(
    checkpoint: Checkpoint,
    settings: Operators = None,
    plan: Annotated[Path | None, typer.Option(help="A TOML file with a chain of [[operators]].")] = None,
    out: Annotated[Path | None, typer.Option(help="Where the grown checkpoint goes; default: `grown/` in the run's folder.")] = None,
    workers: Annotated[int, typer.Option(help="Processes; 0: as many as the size is worth.", min=0)] = 0,
    dry_run: DryRun = False,
) -> None:
    """Grow a checkpoint into a larger model's start."""
    from regrowth.launch.growth import grow as go

    go(checkpoint, settings or [], plan, out, workers, dry_run)


@grow_app.command("plan")
def grow_plan(
    config: Annotated[str, typer.Argument(help="A TOML file, the name of a recipe, a checkpoint or a run's folder.")],
    settings: Operators = None,
    tokens: Annotated[
        float, typer.Option(help="Tokens that the grown model is to be worth, as if it had been trained from scratch.")
    ] = 0.0,
    cluster: Annotated[str, typer.Option(help="A described machine, or a path.")] = "laptop",
    ranks: Annotated[int, typer.Option(help="For which to search a parallel plan; 0: as many as the config's.", min=0)] = 0,
) -> None:
    """When to grow a model, what it saves and costs, and the parallel plan for the grown one."""
    from regrowth.launch.growth_plan import plan as go

    go(config, settings or [], tokens, cluster, ranks)


@app.command()
def average(
    checkpoints: Annotated[list[Path], typer.Argument(help="Checkpoints of one model, oldest first; or a run's folder with --last.")],
    out: Annotated[Path, typer.Option(help="The checkpoint to write.")],
    last: Annotated[int | None, typer.Option(help="Of a run: how many of its newest checkpoints.", min=2)] = None,
    kind: Annotated[str, typer.Option(help="uniform, or ema (exponential in their order).")] = "uniform",
    decay: Annotated[float, typer.Option(help="Of an exponential average.", min=0.0, max=1.0)] = 0.9,
) -> None:
    """Average checkpoints of one model into one."""
    from regrowth.launch.growth import average as go

    go(checkpoints, out, last, kind, decay)


@app.command()
def convert(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    to: Annotated[str, typer.Option(help="The format: hf.")] = "hf",
    file_gigabytes: Annotated[float, typer.Option(min=1e-6, help="Of a file with weights, at most.")] = 4.0,
) -> None:
    """Write a checkpoint in another project's format; under mpirun several processes share the work."""
    from regrowth.launch.checkpoints import convert as go

    go(checkpoint, out, to, file_gigabytes)


@app.command()
def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[str, typer.Option(help="How the text begins.")] = "",
    tokens: Annotated[int, typer.Option(min=1)] = 120,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.8,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 0.95,
    seed: int = 0,
) -> None:
    """Print a sample of what a checkpoint writes."""
    from regrowth.launch.checkpoints import generate as go

    go(checkpoint, prompt, tokens, temperature, top_p, seed)


@app.command()
def evaluate(
    checkpoint: Checkpoint,
    sequences: Annotated[int | None, typer.Option(help="Held-out sequences per domain; default all.", min=1)] = None,
    tasks: Annotated[list[str] | None, typer.Option("--task", help="An lm-eval task (needs the eval extra).")] = None,
    task_path: Annotated[Path | None, typer.Option(help="A folder of lm-eval task files of your own.")] = None,
    limit: Annotated[int | None, typer.Option(help="Items per lm-eval task.", min=1)] = None,
) -> None:
    """Held-out bits per byte by domain; with --task also lm-eval tasks."""
    from regrowth.launch.checkpoints import evaluate as go

    go(checkpoint, sequences, tasks or [], task_path, limit)


@lineage_app.command("show")
def lineage_show(checkpoint: Checkpoint) -> None:
    """Print where a checkpoint comes from."""
    from regrowth.launch.growth import lineage as go

    go(checkpoint)


@lineage_app.command("verify")
def lineage_verify(
    checkpoint: Checkpoint,
    parent: Annotated[Path | None, typer.Option(help="The checkpoint it was grown from; default: looked for in its run.")] = None,
) -> None:
    """Grow a grown checkpoint's parent again; it must come out the same, bit for bit."""
    from regrowth.launch.growth import verify_growth as go

    go(checkpoint, parent)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A run's folder.")]) -> None:
    """Write a run's report.html."""
    from regrowth.launch.training import report as go

    go(run)


@app.command()
def doctor(
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    cluster: Annotated[bool, typer.Option("--cluster", help="Check nodes of a Slurm cluster, and that they are alike.")] = False,
    nodes: Annotated[int, typer.Option(help="With --cluster: how many; in a job, all of it by default.", min=0)] = 0,
    partition: Annotated[str | None, typer.Option(help="With --cluster: the partition.")] = None,
) -> None:
    """Check this machine: versions, extras, devices, arithmetic, disk, limits, process start; each fault with its remedy."""
    if cluster:
        from regrowth.launch.cluster_doctor import cluster_doctor

        raise typer.Exit(cluster_doctor(json_, nodes, partition))
    from regrowth.launch.doctor import doctor as go

    raise typer.Exit(go(json_))


@data_app.command("prepare")
def data_prepare(config: Config, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Curate, tokenise and shard the documents of a config."""
    from regrowth.launch.data import prepare as go

    go(config, overrides or [], dry_run)


@data_app.command("run")
def data_run(
    recipe: Config,
    overrides: Overrides = None,
    executor: Annotated[str | None, typer.Option(help="local, mpi or slurm; default: the recipe's data.executor.kind.")] = None,
    dry_run: DryRun = False,
    print_only: Annotated[bool, typer.Option("--print", help="Slurm: print the batch scripts; submit nothing.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Slurm: stay until the corpus is finished, showing how far it is.")] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try inputs again that were given up (executor.max_failed).")
    ] = False,
    budget_tokens: BudgetTokens = None,
) -> None:
    """Make a corpus from a recipe: on this machine, over MPI ranks, or as Slurm array jobs. Run it again to go on."""
    from regrowth.launch.data_run import run as go

    go(recipe, overrides or [], executor, dry_run, print_only, wait, retry_failed, budget_tokens)


@data_app.command("rephrase")
def data_rephrase(
    recipe: Annotated[str, typer.Argument(help="A recipe or config; with --report also a corpus folder.")],
    overrides: Overrides = None,
    preview: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Rephrase N documents; show source and rephrase side by side.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write the preview or the report as a page, too.")] = None,
    estimate: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Requests, tokens and cost, from at least N documents; nothing is asked.")
    ] = None,
    report: Annotated[bool, typer.Option("--report", help="Of a corpus: what was dropped and why, and what became a template.")] = False,
    budget_tokens: BudgetTokens = None,
) -> None:
    """Try a recipe's rephrasing, see what it would cost, or what came of it. `data run` does it."""
    from regrowth.launch.rephrase import run as go

    go(recipe, overrides or [], preview, html, estimate, report, budget_tokens)


@data_app.command("status")
def data_status(
    corpus: Annotated[Path, typer.Argument(help="A corpus folder.")],
    watch: Annotated[bool, typer.Option("--watch", help="Stay and refresh.")] = False,
) -> None:
    """How far a corpus is: tasks, throughput, time left, what failed. From any shell that sees the folder."""
    from regrowth.launch.data_run import status as go

    go(corpus, watch)


@data_app.command("worker", hidden=True)
def data_worker(
    folder: Path,
    phase: Annotated[int, typer.Option()],
    rank: Annotated[int, typer.Option()],
    world: Annotated[int, typer.Option()],
) -> None:
    """One rank's share of one phase (what array tasks run)."""
    from regrowth.launch.data_run import worker as go

    go(folder, phase, rank, world)


@data_app.command("inspect")
def data_inspect(
    shard: Annotated[Path, typer.Argument(help="A shard, .arrow.")],
    sample: Annotated[int, typer.Option(help="Documents to show.", min=0)] = 3,
    seed: int = 0,
) -> None:
    """Statistics of a shard, and some of its documents decoded."""
    from regrowth.launch.data_tools import inspect as go

    go(shard, sample, seed)


@data_app.command("stats")
def data_stats(
    corpus: Annotated[str, typer.Argument(help="A corpus folder, a config or a recipe.")],
    split: Annotated[str, typer.Option(help="train or heldout.")] = "train",
    html: Annotated[Path | None, typer.Option(help="Write a page as well.")] = None,
) -> None:
    """Tokens by domain and source, and a histogram of document lengths."""
    from regrowth.launch.data import open_corpus
    from regrowth.launch.data_tools import stats as go

    go(open_corpus(corpus, []), split, html)


@data_app.command("trace")
def data_trace(
    corpus: Annotated[Path, typer.Argument(help="A corpus folder.")],
    document: Annotated[str | None, typer.Argument(help="A document's id, or the beginning of one.")] = None,
    source: Annotated[
        str | None, typer.Option(help="A source file, folder or file@offset: which of its documents are left, why not the others.")
    ] = None,
    list_all: Annotated[bool, typer.Option("--all", help="List every document that is left, as JSON lines.")] = False,
) -> None:
    """Where a document came from and what became of it; or what is left of a source."""
    from regrowth.launch.data_tools import trace_document as go

    go(corpus, document, source, list_all)


BlockTokens = Annotated[int, typer.Option(help="Tokens of a block.", min=1024)]


@data_app.command("merge")
def data_merge(
    out: Annotated[Path, typer.Argument(help="A new folder.")],
    shards: Annotated[list[Path], typer.Argument(help="Shards of one domain and tokenizer.")],
    block_tokens: BlockTokens = 1 << 20,
) -> None:
    """Write several shards as one."""
    from regrowth.launch.data_tools import merge as go

    go(out, shards, block_tokens)


@data_app.command("split")
def data_split(
    shard: Annotated[Path, typer.Argument(help="A shard, .arrow.")],
    out: Annotated[Path, typer.Argument(help="A new folder.")],
    parts: Annotated[int, typer.Option(min=2)] = 2,
    block_tokens: BlockTokens = 1 << 20,
) -> None:
    """Write one shard as several."""
    from regrowth.launch.data_tools import split as go

    go(shard, out, parts, block_tokens)


@data_app.command("export")
def data_export(
    corpus: Annotated[str, typer.Argument(help="A corpus folder, a config or a recipe.")],
    out: Annotated[Path, typer.Argument(help="A new folder.")],
    to: Annotated[str, typer.Option(help="The format: megatron.")] = "megatron",
) -> None:
    """Write a corpus's tokens in Megatron-LM's indexed format (.bin, .idx)."""
    from regrowth.launch.data import open_corpus
    from regrowth.launch.data_tools import export as go

    go(open_corpus(corpus, []), out, to)


@data_app.command("show")
def data_show(corpus: Annotated[str, typer.Argument(help="A corpus folder, a config or a recipe.")], overrides: Overrides = None) -> None:
    """What a corpus holds, what was dropped and why."""
    from regrowth.launch.data import show as go

    go(corpus, overrides or [])


@data_app.command("verify")
def data_verify(corpus: Annotated[str, typer.Argument(help="A corpus folder, a config or a recipe.")], overrides: Overrides = None) -> None:
    """Check every shard of a corpus against its sha256."""
    from regrowth.launch.data import verify as go

    go(corpus, overrides or [])


Run = Annotated[Path, typer.Argument(help="A run's folder.")]


@mix_app.command("replay")
def mix_replay(run: Run) -> None:
    """Recompute every decision of a run from its logged losses; they must agree to the last bit."""
    from regrowth.launch.mix import replay as go

    go(run)


@mix_app.command("explain")
def mix_explain(
    run: Run,
    step: Annotated[int, typer.Option(help="The step, as in metrics.jsonl.", min=0)],
    documents: Annotated[int, typer.Option(help="Documents to list.", min=0)] = 20,
    domain: Annotated[str | None, typer.Option(help="List this domain's only.")] = None,
    text: Annotated[int, typer.Option(help="Characters of each document to show.", min=0)] = 60,
) -> None:
    """Which documents a step was made of, from which shards and sources."""
    from regrowth.launch.mix import explain as go

    go(run, step, documents, domain, text)


@mix_app.command("plot")
def mix_plot(
    run: Run, out: Annotated[Path | None, typer.Option(help="The page to write; default: mixture.html in the run.")] = None
) -> None:
    """Draw the mixture over time, as a page."""
    from regrowth.launch.mix import plot as go

    go(run, out)


_STOPPED = "What was finished is kept; the same command goes on from there."


def main() -> None:
    """Run the command line; turn every error into one paragraph and an exit code."""
    debug = "--debug" in sys.argv or bool(os.environ.get("REGROWTH_DEBUG"))
    try:
        code = app(standalone_mode=False)
        if code == 130:  # how the argument parser tells of Ctrl-C
            raise KeyboardInterrupt
        sys.exit(code if isinstance(code, int) else 0)
    except RegrowthError as error:
        if debug:
            traceback.print_exc()
        sys.exit(tell(str(error), error.exit_code))
    except KeyboardInterrupt:
        sys.exit(tell(_STOPPED, 75))
    except BrokenPipeError:
        sys.exit(0)
    except Exception as error:
        if hasattr(error, "show") and hasattr(error, "exit_code"):  # a usage error of the argument parser, which spells itself
            error.show()  # pyright: ignore[reportAttributeAccessIssue]
            sys.exit(error.exit_code)  # pyright: ignore[reportAttributeAccessIssue]
        if type(error).__name__ == "Abort":  # how older ones tell of it
            sys.exit(tell(_STOPPED, 75))
        if debug:
            traceback.print_exc()
        sys.exit(
            tell(
                f"{type(error).__name__}: {error}\nThis should have been a clearer message; `regrowth --debug ...` shows the traceback.", 1
            )
        )
