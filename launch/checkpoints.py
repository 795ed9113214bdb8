"""Commands on checkpoints: grow, convert, generate, evaluate, lineage. Each takes a checkpoint's folder or a run's."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import cast, get_args

import torch
from rich.console import Console
from rich.progress import Progress, track
from rich.table import Table

from regrowth.data_pipeline.corpus import Corpus
from regrowth.data_pipeline.tokenizer import Tokenizer
from regrowth.errors import RegrowthError, UserError, need
from regrowth.launch.training import tokenizer_of
from regrowth.pretrain.build import build_model
from regrowth.pretrain.checkpoint import list_checkpoints, load_plain, newest_whole, read_state, verify
from regrowth.pretrain.convert import export_hf
from regrowth.pretrain.evaluate import BytesReport, heldout, to_tensors
from regrowth.pretrain.growth.average import Kind, average_checkpoints
from regrowth.pretrain.growth.grow import grow_checkpoint
from regrowth.pretrain.growth.plan import GrowthPlan, plan_of
from regrowth.pretrain.lineage import read_lineage
from regrowth.pretrain.model import Transformer
from regrowth.pretrain.run_folder import RunFolder
from regrowth.settings import load, parse_overrides


def find_checkpoint(path: Path) -> Path:
    """A checkpoint folder, or the newest whole checkpoint of a run's folder.

    Raises:
        UserError: there is none, or all are refused.
    """
    if (path / "config.toml").exists():
        newest, refused = newest_whole(path)
        if newest is None:
            raise UserError("\n".join([f"{path}: the run has no whole checkpoint.", *refused]))
        return newest
    verify(path)
    return path


def run_of(checkpoint: Path) -> RunFolder:
    """The run that a checkpoint lies in.

    Raises:
        UserError: it lies outside of a run, so that its tokenizer and data are not known.
    """
    for parent in checkpoint.resolve().parents:
        if (parent / "config.toml").exists():
            return RunFolder(parent)
    raise UserError(
        f"{checkpoint}: not inside a run's folder, so its tokenizer and data are not known. Keep it under runs/NAME/checkpoints/."
    )


def corpus_of_checkpoint(checkpoint: Path) -> Corpus:
    """The corpus a checkpoint was trained on."""
    from regrowth.launch.training import corpora_of

    return corpora_of(run_of(checkpoint))


def load_model(checkpoint: Path) -> Transformer:
    """A checkpoint's model on the CPU, ready to run."""
    state, weights, _ = load_plain(checkpoint)
    model = build_model(state.model, torch.device("cpu"))
    model.load_state_dict(weights, assign=True)
    return model.eval()


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
        paths = list_checkpoints(paths[0])[-last:]
    elif runs := [path for path in paths if (path / "config.toml").exists()]:
        raise UserError(f"{runs[0]}: a run's folder; say with --last how many of its checkpoints, or name checkpoints.")
    made = average_checkpoints(paths, out, cast("Kind", kind), decay)
    Console().print(f"{out}: {kind} average of {len(paths)} checkpoints, {made.model.parameters:,} parameters", soft_wrap=True)


def convert(path: Path, out: Path, to: str) -> None:
    """The `convert` command."""
    if to != "hf":
        raise UserError(f'--to {to}: no such format; this version writes "hf".')
    checkpoint = find_checkpoint(path)
    tokenizer: Tokenizer | None = None
    length = 2048
    try:
        run = run_of(checkpoint)
        tokenizer, length = tokenizer_of(run), run.config().loader.sequence_length
    except RegrowthError as error:
        Console(stderr=True).print(f"exported without a tokenizer: {error}", soft_wrap=True)
    export_hf(checkpoint, out, tokenizer, length)
    Console().print(f"{out}: written from {checkpoint}", soft_wrap=True)


def sample_text(path: Path, prompt: str, tokens: int, temperature: float, top_p: float, seed: int) -> Iterator[str]:
    """Pieces of a continuation."""
    from regrowth.pretrain.generate import generate as continuation

    checkpoint = find_checkpoint(path)
    run = run_of(checkpoint)
    tokenizer, context = tokenizer_of(run), run.config().loader.sequence_length
    return continuation(load_model(checkpoint), tokenizer, prompt, tokens, context, temperature, top_p, seed)


def generate(path: Path, prompt: str, tokens: int, temperature: float, top_p: float, seed: int) -> None:
    """The `generate` command: prints as it goes."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(prompt, end="")
    for piece in sample_text(path, prompt, tokens, temperature, top_p, seed):
        console.print(piece, end="")
    console.print()


def evaluate(path: Path, sequences: int | None, tasks: list[str], task_path: Path | None, limit: int | None) -> None:
    """The `evaluate` command."""
    checkpoint = find_checkpoint(path)
    corpus, config = corpus_of_checkpoint(checkpoint), run_of(checkpoint).config()
    model = load_model(checkpoint)
    report = BytesReport(torch.from_numpy(corpus.tokenizer.bytes_per_token))
    batch = heldout(corpus, config.loader.sequence_length, sequences)
    sums = torch.zeros(len(corpus.domains), 3, dtype=torch.float64)
    with torch.no_grad():
        for first in track(range(0, len(batch), 8), description="evaluating", console=Console(stderr=True)):
            part = batch.slice(first, min(first + 8, len(batch)))
            read = to_tensors(part, torch.device("cpu"))
            _, nll = model(read["tokens"], read["positions"], read["doc_ids"], read["labels"], read["loss_weight"])
            sums.index_add_(0, torch.from_numpy(part.domain).long(), report(nll, read))
    table = Table("domain", "bits per byte", "nats per token", "held-out bytes", title=str(checkpoint))
    for name, (nats, bytes_, tokens) in zip([*corpus.domains, "all"], [*sums.tolist(), sums.sum(0).tolist()], strict=True):
        if bytes_:
            table.add_row(name, f"{nats / bytes_ / 0.6931471805599453:.4f}", f"{nats / tokens:.4f}", f"{bytes_:,.0f}")
    console = Console()
    console.print(table)
    if tasks:
        console.print(_lm_eval(checkpoint, corpus.tokenizer, config.loader.sequence_length, tasks, task_path, limit))


def _lm_eval(checkpoint: Path, tokenizer: Tokenizer, length: int, tasks: list[str], task_path: Path | None, limit: int | None) -> Table:
    lm_eval = need("lm_eval", "evaluation on tasks")
    need("lm_eval.models.huggingface", "evaluation on tasks")
    from lm_eval.tasks import TaskManager  # type: ignore[import-not-found]

    manager = TaskManager(include_path=str(task_path) if task_path else None)
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise UserError(
            f"--task {unknown[0]}: lm-eval knows no such task"
            + (f", nor does {task_path}." if task_path else "; --task-path names a folder of your own.")
        )
    with tempfile.TemporaryDirectory() as folder:
        export_hf(checkpoint, Path(folder) / "hf", tokenizer, length)
        arguments = {"pretrained": f"{folder}/hf", "device": "cpu", "dtype": "float32"}
        result = lm_eval.simple_evaluate(
            model="hf", model_args=arguments, tasks=tasks, task_manager=manager, limit=limit, bootstrap_iters=0
        )
    table = Table("task", "metric", "value", title="lm-eval")
    for task, metrics in result["results"].items():
        for metric, value in metrics.items():
            if isinstance(value, int | float) and "stderr" not in metric:
                table.add_row(task, metric.split(",")[0], f"{value:.4f}")
    return table


def lineage(path: Path) -> None:
    """The `lineage` command."""
    checkpoint = find_checkpoint(path)
    console = Console()
    console.print(f"[bold]{checkpoint}[/bold]  {verify(checkpoint)['id'][:12]}", soft_wrap=True)
    record = read_lineage(checkpoint)
    for depth, line in enumerate(record.lines()):
        console.print("  " * depth + ("└ " if depth else "") + line, soft_wrap=True, highlight=False)
    for domain, tokens in sorted(record.tokens_by_domain.items()):
        console.print(f"  {tokens:>14,} tokens of {domain} ({record.corpus})", soft_wrap=True, highlight=False)
