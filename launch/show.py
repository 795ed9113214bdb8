"""What would happen: resolved configs, plans and predictions, printed without starting anything."""

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from regrowth.errors import UserError, nearest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from regrowth.data_pipeline.config import DataConfig
    from regrowth.parallel.cluster import Cluster
    from regrowth.parallel.plan import ParallelPlan
    from regrowth.pretrain.config import RunConfig
    from regrowth.pretrain.model_config import ModelConfig


def show_dry_run(config: "RunConfig") -> None:
    """The resolved config, the plan, the predicted memory and the data that would be read."""
    from regrowth.settings import to_toml

    console = Console()
    console.print(to_toml(config), markup=False, highlight=False, soft_wrap=True)
    console.rule("data")
    if config.data and not config.loader.corpus:
        _print_sources(config.data, console)
    for place in (config.loader.corpus, *config.loader.corpora):
        if place:
            console.print(f"corpus {place}", soft_wrap=True)
    console.rule("plan")
    _print_plan(config, "laptop" if config.run.dtype == "float32" else "h100_node", console)
    tokens = config.run.steps * config.loader.global_batch * config.loader.sequence_length
    console.print(
        f"{config.run.steps:,} steps of {config.loader.global_batch} x {config.loader.sequence_length} tokens: {tokens:,} tokens. Nothing was started."
    )


def _print_sources(config: "DataConfig", console: Console) -> None:
    from regrowth.data_pipeline.pipeline import Pipeline

    plan = Pipeline.plan_of(config)
    for number, item in plan.items:
        more = f" and {len(item.paths) - 1} more" if len(item.paths) > 1 else ""
        console.print(
            f"{config.sources[number].kind:<10} {item.size / 1e6:8.2f} MB  {next(iter(item.paths))}{more}",
            soft_wrap=True,
            highlight=False,
        )
    console.print(f"corpus {plan.root} ({'ready' if plan.finished else 'to be prepared'})", soft_wrap=True)


def show_plan(name: str, overrides: list[str], cluster: str) -> None:
    """The `plan` command."""
    from regrowth.pretrain.config import load_config

    _print_plan(load_config(name, overrides), cluster, Console())


def machine_of(name: str) -> "Cluster":
    """A machine that is described here, or in a file.

    Raises:
        UserError: it is neither.
    """
    from regrowth.parallel.cluster import clusters, load_cluster

    known = clusters()
    if name not in known and not Path(name).exists():
        raise UserError(f"--cluster {name}: neither a file nor a described machine; {nearest(name, known)}")
    return load_cluster(known.get(name, Path(name)))


def _print_plan(config: "RunConfig", cluster: str, console: Console) -> None:
    from regrowth.parallel.plan import AXES
    from regrowth.parallel.planner import pass_times, predict

    machine = machine_of(cluster)
    plan, model = config.parallel, config.model

    def axes(plan: "ParallelPlan") -> str:
        return " x ".join(f"{axis} {getattr(plan, axis)}" for axis in AXES if getattr(plan, axis) > 1) or "one process"

    console.print(f"{plan.world_size} ranks: {axes(plan)}{f', ep {plan.ep}' if plan.ep > 1 else ''}, micro-batch {plan.micro_batch} x "
                  f"{config.loader.sequence_length} tokens, recompute {plan.recompute}; on {machine.name} ({machine.device})", soft_wrap=True)  # fmt: skip
    shapes = [("step 0", model, plan), *_grown(config)]
    recipe = config.precision.build()
    if machine.speed:
        faster = ", ".join(f"{format} {times:g} x" for format, times in machine.speed.model_dump().items())
        gain = 1 / pass_times(model, recipe, machine, config.loader.sequence_length).step
        console.print(
            f"products of a step under {recipe.name} are taken to be {gain:.2f} x as fast ([speed] of {machine.name}: {faster})",
            markup=False,
            soft_wrap=True,
        )
    table = Table("", *(f"{start}: {shape.layers} layers, width {shape.width}" for start, shape, _ in shapes))
    rows: dict[str, list[str]] = {}
    length = config.loader.sequence_length
    for _, shape, plan in shapes:
        p = predict(shape, plan, machine, config.loader.global_batch, length, 4 if config.run.dtype == "float32" else 2, recipe)
        room = f"of {p.capacity_bytes / 2**20:,.0f} MiB" if p.fits else f"does not fit {p.capacity_bytes / 2**20:,.0f} MiB"
        for name, value in (
            *([("ranks", f"{plan.world_size}: {axes(plan)}")] if any(event.parallel for event in config.growth) else []),
            ("parameters", f"{shape.parameters:,}"),
            ("without embeddings", f"{shape.non_embedding_parameters:,}"),
            ("training FLOPs per token", f"{shape.train_flops_per_token(length):,}"),
            ("states per rank", f"{p.state_bytes / 2**20:,.0f} MiB"),
            ("activations per rank", f"{p.activation_bytes / 2**20:,.0f} MiB"),
            ("peak memory per rank", f"{p.memory_bytes / 2**20:,.0f} MiB, {room}"),
            ("compute per step", f"{p.compute_seconds:.3f} s"),
            ("communication per step", f"{p.communication_seconds:.3f} s"),
        ):
            rows.setdefault(name, []).append(value)
    for name, values in rows.items():
        table.add_row(name, *values)
    console.print(table)


def _grown(config: "RunConfig") -> "Iterator[tuple[str, ModelConfig, ParallelPlan]]":
    shape, plan = config.model, config.parallel
    for event in config.growth:
        shape, plan = event.configs(shape)[-1], event.plan_after(plan)
        yield event.at, shape, plan
