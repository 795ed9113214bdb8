"""The `grow plan` command: when to grow, what it saves, what it costs in memory, and on which plan the grown model runs."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from regrowth.launch.checkpoints import find_checkpoint, run_of
from regrowth.launch.show import machine_of
from regrowth.parallel.cluster import Cluster
from regrowth.parallel.plan import AXES, ParallelPlan
from regrowth.parallel.planner import predict
from regrowth.parallel.search import best_plan
from regrowth.pretrain.checkpoint import read_state
from regrowth.pretrain.config import RunConfig, load_config
from regrowth.pretrain.growth.advice import PUBLISHED_SPEEDUPS, SUNK, chinchilla_tokens, growth_tokens
from regrowth.pretrain.growth.plan import plan_of
from regrowth.pretrain.lineage import Lineage
from regrowth.pretrain.model_config import ModelConfig
from regrowth.settings import parse_overrides


def plan(name: str, settings: list[str], tokens: float, cluster: str, ranks: int) -> None:
    """The `grow plan` command.

    Args:
        name: a config, a recipe, or a checkpoint (or a run's folder), whose growth is then planned with what was sunk into it.
        tokens: that the grown model is to be worth, as from scratch; 0: those of the config's steps.
        ranks: for which to search a parallel plan; 0: as many as the config's.

    Raises:
        UserError: nothing of that name, or the growth does not fit.
    """
    config, small, lineage = _subject(name)
    growth = plan_of(parse_overrides(settings), "regrowth grow plan")
    large, machine = growth.configs(small)[-1], machine_of(cluster)
    console = Console()
    console.print(_sizes(config, small, large, machine))
    budget = tokens or float(config.run.steps * config.loader.global_batch * config.loader.sequence_length)
    for line in (
        *_timing(config, small, large, budget),
        *_sunk(lineage, small, large, config.loader.sequence_length),
        *_new_plan(config, large, machine, ranks),
    ):
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def _subject(name: str) -> tuple[RunConfig, ModelConfig, Lineage | None]:
    path = Path(name)
    if path.is_dir():
        checkpoint = find_checkpoint(path)
        state = read_state(checkpoint)
        run = run_of(checkpoint)
        config = run.config()
        return config.model_copy(update={"parallel": run.plan(config)}), state.model, state.lineage
    config = load_config(name, [])
    return config, config.model, None


def _bytes_per_value(config: RunConfig) -> int:
    return 4 if config.run.dtype == "float32" else 2


def _sizes(config: RunConfig, small: ModelConfig, large: ModelConfig, machine: Cluster) -> Table:
    length, table = config.loader.sequence_length, Table("", "now", "grown")
    before, after = (
        predict(shape, config.parallel, machine, config.loader.global_batch, length, _bytes_per_value(config), config.precision.build())
        for shape in (small, large)
    )
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
    return table


def _timing(config: RunConfig, small: ModelConfig, large: ModelConfig, budget: float) -> list[str]:
    length, per_step = config.loader.sequence_length, config.loader.global_batch * config.loader.sequence_length
    base = growth_tokens(large.non_embedding_parameters, 6.0 * large.non_embedding_parameters * budget)
    spent, scratch = base * small.train_flops_per_token(length), budget * large.train_flops_per_token(length)
    low, high = PUBLISHED_SPEEDUPS
    told = [
        f"Trained from scratch on {budget:.3g} tokens, the grown model costs {scratch:.3g} FLOPs. The guideline of G_stack (arXiv 2405.15319) grows after "
        f"{base:.3g} tokens of the small one: step {base / per_step:,.0f} of this config, {spent / scratch:.1%} of those FLOPs."
    ]
    if base >= budget:
        told.append(
            "That is more than the whole budget: the guideline was fitted to 410M parameters and more, and says nothing for a run as small as this."
        )
    return [
        *told,
        f"Published savings with stacking at 410M to 7B: the same loss for {1 / (1 + high):.0%} to {1 / (1 + low):.0%} of the FLOPs, the base's included; here that would be "
        f"{scratch / (1 + high):.3g} to {scratch / (1 + low):.3g}. Depth by stacking four times is what they measured; a checkpoint that was trained longer is worth more.",
    ]


def _sunk(lineage: Lineage | None, small: ModelConfig, large: ModelConfig, length: int) -> list[str]:
    if lineage is None:
        return []
    times = lineage.tokens / chinchilla_tokens(small.active_parameters)
    (_, poor), (steps, rich) = SUNK
    worth = lineage.train_flops / large.train_flops_per_token(length)
    depth = "interpose keeps more of it than stack does" if times >= 1 else "stack was measured on bases as young as this"
    return [
        f"Sunk into this checkpoint: {lineage.tokens:.3g} tokens and {lineage.train_flops:.3g} FLOPs, {times:.2g} times the tokens that are best for its size (20 a parameter, "
        f"Chinchilla); from scratch the grown model would have seen {worth:.3g} tokens for them. By that measure, for depth {depth} (arXiv 2510.08008).",
        f"What is sunk is not lost: published grown models ended the better the longer their base was trained ({poor} % mean accuracy over a base of 0 steps, "
        f"{rich} % over one of {steps:,}; mixtures of experts, the same source).",
    ]


def _new_plan(config: RunConfig, large: ModelConfig, machine: Cluster, ranks: int) -> list[str]:
    count = ranks or config.parallel.world_size
    loader = config.loader
    found = best_plan(
        large,
        config.parallel,
        count,
        machine,
        loader.global_batch,
        loader.sequence_length,
        _bytes_per_value(config),
        config.precision.build(),
    )
    if found is None:
        return [f"No plan of {count} ranks of {machine.name} can run the grown model; try more with --ranks."]
    chosen, predicted = found
    if chosen == config.parallel:
        return [f"The plan of {count} ranks stays the best for the grown model: {predicted.step_seconds:.3g} s a step are predicted."]
    changes = {key: value for key, value in chosen.model_dump().items() if value != getattr(config.parallel, key)}
    spelt = ", ".join(f"{key} = {str(value).lower() if isinstance(value, bool) else value!r}" for key, value in changes.items()).replace(
        "'", '"'
    )
    return [
        f"For the grown model on {count} ranks the fastest plan that fits: {_axes(chosen)}, {predicted.step_seconds:.3g} s a step and "
        f"{predicted.memory_bytes / 2**20:,.0f} MiB a rank are predicted. In [[growth]]: parallel = {{ {spelt} }}"
    ]


def _axes(plan: ParallelPlan) -> str:
    return " x ".join(f"{axis} {getattr(plan, axis)}" for axis in AXES if getattr(plan, axis) > 1) or "one process"
