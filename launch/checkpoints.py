"""Commands on checkpoints: convert, generate, evaluate. Each takes a checkpoint's folder or a run's."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from regrowth.data_pipeline.corpus import Corpus
from regrowth.data_pipeline.tokenizer import Tokenizer
from regrowth.errors import RegrowthError, UserError, need
from regrowth.launch.training import tokenizer_of
from regrowth.mpi import ranks
from regrowth.pretrain.build import build_model
from regrowth.pretrain.checkpoint import load_plain, newest_whole, verify
from regrowth.pretrain.convert import export_hf
from regrowth.pretrain.evaluate import BytesReport, heldout, to_tensors
from regrowth.pretrain.model import Transformer
from regrowth.pretrain.run_folder import RunFolder


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


def convert(path: Path, out: Path, to: str, file_gigabytes: float) -> None:
    """The `convert` command; under mpirun its ranks share the files."""
    if to != "hf":
        raise UserError(f'--to {to}: no such format; this version writes "hf".')
    together = ranks()
    checkpoint = together.first(lambda: find_checkpoint(path))
    tokenizer: Tokenizer | None = None
    length = 2048
    try:
        run = run_of(checkpoint)
        tokenizer, length = tokenizer_of(run), run.config().loader.sequence_length
    except RegrowthError as error:
        if together.rank == 0:
            Console(stderr=True).print(f"exported without a tokenizer: {error}", soft_wrap=True)
    export_hf(checkpoint, out, tokenizer, length, together, int(file_gigabytes * 1e9))
    if together.rank == 0:
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
