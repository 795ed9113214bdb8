"""Commands of growth: grow, plan a growth, average, lineage and its verification."""

import tempfile
from pathlib import Path
from typing import cast, get_args

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from regrowth.errors import RunFailed, UserError
from regrowth.launch.checkpoints import find_checkpoint, run_of
from regrowth.pretrain.checkpoint import identity_of, list_checkpoints, read_state, verify
from regrowth.pretrain.growth.advice import PUBLISHED_SPEEDUPS, growth_tokens
from regrowth.pretrain.growth.average import Kind, average_checkpoints
from regrowth.pretrain.growth.grow import grow_checkpoint
from regrowth.pretrain.growth.plan import GrowthPlan, plan_of
from regrowth.pretrain.lineage import Parent, read_lineage
from regrowth.settings import load, parse_overrides, validate


def grow(path: Path, settings: list[str], plan: Path | None, out: Path | None, workers: int, dry_run: bool) -> None:
    """The `grow` command.

    Raises:
        UserError: settings and a plan were given, or the growth does not fit the checkpoint.
    """
    if plan and settings:
        raise UserError(f"--plan {plan}: the operators stand in it; leave {settings[0]} away, or the plan.")
    growth = load(GrowthPlan, plan) if plan else plan_of(parse_overrides(settings), "regrowth grow")
    source = find_checkpoint(path)
    before = read_state(source).model
    *_, after = growth.configs(before)
    # Not among the run's own checkpoints: those are what the run goes on from.
    target = out or run_of(source).path / "grown" / f"{source.name}-{growth.describe()['op'].replace(' + ', '-')}-{after.parameters}"
    console = Console()
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
    with Progress(*Progress.get_default_columns(), console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("growing", total=None)
        grow_checkpoint(source, target, growth, workers, lambda done, total: bar.update(task, completed=done, total=total))
    console.print(f"{target}: {after.layers} layers, {after.parameters:,} parameters", soft_wrap=True)
    console.print(f"Train it with: regrowth train CONFIG run.start_from={target}", soft_wrap=True)


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


def plan(name: str, settings: list[str], tokens: float, cluster: str) -> None:
    """The `grow plan` command."""
    from regrowth.launch.show import machine_of
    from regrowth.parallel.planner import predict
    from regrowth.pretrain.config import load_config

    config = load_config(name, [])
    growth = plan_of(parse_overrides(settings), "regrowth grow plan")
    small, large = config.model, growth.configs(config.model)[-1]
    per_step, length = config.loader.global_batch * config.loader.sequence_length, config.loader.sequence_length
    budget = tokens or float(config.run.steps * per_step)
    compute = 6.0 * large.non_embedding_parameters * budget
    base = growth_tokens(large.non_embedding_parameters, compute)
    spent = base * small.train_flops_per_token(length)
    console, table = Console(), Table("", "now", "grown")
    machine = machine_of(cluster)
    before, after = (predict(shape, config.parallel, machine, config.loader.global_batch, length) for shape in (small, large))
    for what, values in (
        ("parameters", [f"{shape.parameters:,}" for shape in (small, large)]),
        ("without embeddings", [f"{shape.non_embedding_parameters:,}" for shape in (small, large)]),
        ("training FLOPs per token", [f"{shape.train_flops_per_token(length):,}" for shape in (small, large)]),
        (
            f"peak memory per rank, {machine.name}",
            [f"{p.memory_bytes / 2**20:,.0f} MiB{'' if p.fits else ', does not fit'}" for p in (before, after)],
        ),
        ("compute per step", [f"{p.compute_seconds:.3f} s" for p in (before, after)]),
    ):
        table.add_row(what, *values)
    console.print(table)
    scratch = budget * large.train_flops_per_token(length)
    low, high = PUBLISHED_SPEEDUPS
    console.print(
        f"Trained from scratch on {budget:.3g} tokens, the grown model costs {scratch:.3g} FLOPs. The guideline of G_stack (arXiv 2405.15319) grows after "
        f"{base:.3g} tokens of the small one: step {base / per_step:,.0f} of this config, {spent / scratch:.1%} of those FLOPs.",
        soft_wrap=True,
        highlight=False,
    )
    if base >= budget:
        console.print(
            "That is more than the whole budget: the guideline was fitted to 410M parameters and more, and says nothing for a run as small as this.",
            soft_wrap=True,
        )
    console.print(
        f"Published savings with stacking at 410M to 7B: the same loss for {1 / (1 + high):.0%} to {1 / (1 + low):.0%} of the FLOPs, the base's included; here that would be "
        f"{scratch / (1 + high):.3g} to {scratch / (1 + low):.3g}. Depth by stacking four times is what they measured; a checkpoint that was trained longer is worth more.",
        soft_wrap=True,
        highlight=False,
    )


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
    keys = {key: born.operator[key] for key in ("operators", "moments", "seed")}
    growth = validate(GrowthPlan, keys, f"{checkpoint}/lineage.json")
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
