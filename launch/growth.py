"""Commands of growth: grow, plan a growth, average, lineage and its verification."""

import os
import tempfile
from pathlib import Path
from typing import cast, get_args

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from regrowth.errors import RegrowthError, RunFailed, UserError
from regrowth.launch.checkpoints import find_checkpoint, run_of
from regrowth.launch.training import corpora_of
from regrowth.mpi import ranks
from regrowth.pretrain.checkpoint import identity_of, read_state, verify
from regrowth.pretrain.checkpoint_folders import list_checkpoints
from regrowth.pretrain.evaluate import heldout
from regrowth.pretrain.growth.average import Kind, average_checkpoints
from regrowth.pretrain.growth.grow import grow_checkpoint
from regrowth.pretrain.growth.plan import GrowthPlan, plan_in_lineage, plan_of
from regrowth.pretrain.growth.probe import probe
from regrowth.pretrain.lineage import Parent, read_lineage
from regrowth.settings import load, parse_overrides


def grow(path: Path, settings: list[str], plan: Path | None, out: Path | None, workers: int, dry_run: bool) -> None:
    """The `grow` command.

    Raises:
        UserError: settings and a plan were given, or the growth does not fit the checkpoint.
    """
    if plan and settings:
        raise UserError(f"--plan {plan}: the operators stand in it; leave {settings[0]} away, or the plan.")
    growth = load(GrowthPlan, plan) if plan else plan_of(parse_overrides(settings), "regrowth grow")
    together = ranks()
    source = together.first(lambda: find_checkpoint(path))
    before = read_state(source).model
    *_, after = growth.configs(before)
    # Not among the run's own checkpoints: those are what the run goes on from.
    target = out or run_of(source).path / "grown" / f"{source.name}-{growth.describe()['op'].replace(' + ', '-')}-{after.parameters}"
    console = Console(quiet=together.rank > 0)
    table = Table("", "now", "grown")
    for key in ("layers", "width", "heads", "kv_heads", "ffn_width", "expert_count", "vocabulary", "parameters", "active_parameters"):
        if getattr(before, key) != getattr(after, key) or key in ("layers", "width", "parameters"):
            table.add_row(key.replace("_", " "), f"{getattr(before, key):,}", f"{getattr(after, key):,}")
    console.print(table)
    console.print(
        f"{growth.describe()['op']}: {'keeps the function' if growth.preserves_function(before) else 'changes the function; training mends it'}"
    )
    if dry_run:
        return console.print(f"would write {target}", soft_wrap=True)
    with Progress(*Progress.get_default_columns(), console=console, disable=not console.is_terminal or together.rank > 0) as bar:
        task = bar.add_task("growing", total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        grow_checkpoint(source, target, growth, workers, show, together, identity_of(source))
    if together.rank > 0:
        return
    console.print(f"{target}: {after.layers} layers, {after.parameters:,} parameters", soft_wrap=True)
    if growth.preserves_function(before):
        console.print(_probed(source, target), soft_wrap=True)
    console.print(f"Train it with: regrowth train CONFIG run.start_from={target}", soft_wrap=True)


def _probed(source: Path, target: Path) -> str:
    """What a look at real text says of a growth that keeps the function.

    Raises:
        RunFailed: it does not.
    """
    weights = 4 * read_state(target).model.parameters
    if weights > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2:
        return f"not compared with its source on text: {weights / 1e9:.0f} GB of weights are more than half of this machine's memory."
    try:
        run = run_of(source)
        batch = heldout(corpora_of(run), run.config().loader.sequence_length, 1)
    except RegrowthError as error:
        return f"not compared with its source on text: {error}"
    found = probe(source, target, batch.slice(0, 4))
    told = (
        f"logits on {found.tokens:,} tokens of held-out text differ by at most {found.deviation:.2g} (the largest is {found.largest:.3g})"
    )
    if not found.holds:
        raise RunFailed(
            f"{target}: {told}, and this growth should keep the function. It stands for you to look into; do not train it. Please report this."
        )
    return f"{told}: the function stays."


def average(paths: list[Path], out: Path, last: int | None, kind: str, decay: float) -> None:
    """The `average` command.

    Raises:
        UserError: an unknown kind, a run without --last, or checkpoints that cannot be averaged.
    """
    if kind not in get_args(Kind):
        raise UserError(f"--kind {kind}: no such average; choose {' or '.join(get_args(Kind))}.")
    if last is not None:
        if len(paths) != 1 or not (paths[0] / "config.toml").exists():
            raise UserError("--last takes the newest checkpoints of one run: name its folder, and nothing else.")
        if len(there := list_checkpoints(paths[0])) < last:
            raise UserError(f"--last {last}: {paths[0]} has {len(there)} checkpoints; ask for fewer, or keep more (checkpoint.keep).")
        paths = there[-last:]
    elif runs := [path for path in paths if (path / "config.toml").exists()]:
        raise UserError(f"{runs[0]}: a run's folder; say with --last how many of its checkpoints, or name checkpoints.")
    made = average_checkpoints(paths, out, cast("Kind", kind), decay)
    Console().print(f"{out}: {kind} average of {len(paths)} checkpoints, {made.model.parameters:,} parameters", soft_wrap=True)


def lineage(path: Path) -> None:
    """The `lineage` command."""
    checkpoint = find_checkpoint(path)
    console = Console()
    console.print(f"[bold]{checkpoint}[/bold]  {identity_of(checkpoint)[:12]}", soft_wrap=True)
    record = read_lineage(checkpoint)
    for depth, line in enumerate(record.lines()):
        console.print("  " * depth + ("└ " if depth else "") + line, soft_wrap=True, highlight=False)
    for domain, tokens in sorted(record.tokens_by_domain.items()):
        console.print(f"  {tokens:>14,} tokens of {domain} ({record.corpus})", soft_wrap=True, highlight=False)


def verify_growth(path: Path, parent: Path | None) -> None:
    """The `lineage verify` command.

    Raises:
        UserError: the checkpoint was not grown, or its parent is not there.
        RunFailed: it comes out otherwise.
    """
    checkpoint = path if (path / "manifest.json").exists() else find_checkpoint(path)
    record = read_lineage(checkpoint)
    born = record.parents[-1] if record.parents else None
    if born is None or born.relation != "grown from" or born.step != record.step:
        raise UserError(
            f"{checkpoint}: not fresh from a growth, so there is none to verify; name a checkpoint that `regrowth grow` wrote, or step-N-grown of a run."
        )
    identity, source = verify(checkpoint)["id"], _parent_of(checkpoint, born, parent)
    growth = plan_in_lineage(born.operator, f"{checkpoint}/lineage.json")
    with tempfile.TemporaryDirectory(dir=checkpoint.parent, prefix=".verify-") as folder:
        grow_checkpoint(source, Path(folder) / "again", growth)
        again = identity_of(Path(folder) / "again")
    if again != identity:
        raise RunFailed(f"{checkpoint}: grown again from {source} by {born.operator['op']} it is {again[:12]}, not {identity[:12]}. One of them was altered, or "
                        "grown by another version.")  # fmt: skip
    Console().print(f"{checkpoint}: {born.operator['op']} of {source} again, equal to the last bit ({identity[:12]}).", soft_wrap=True)


def _parent_of(checkpoint: Path, born: Parent, parent: Path | None) -> Path:
    candidates = [parent] if parent else list_checkpoints(run_of(checkpoint).path)
    for candidate in candidates:
        if identity_of(candidate) == born.id:  # growing checks its files
            return candidate
    where = str(parent) if parent else f"the checkpoints of {run_of(checkpoint).path}"
    raise UserError(f"{checkpoint}: its parent {born.id[:12]} is not {'' if parent else 'among '}{where}. Name it with --parent.")
