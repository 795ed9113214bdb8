"""The main job of a newcomer: raw documents to an exported model and a report, with nothing to configure."""

import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from regrowth.files import write_json
from regrowth.launch.data import print_corpus
from regrowth.launch.training import make_report, own_corpus, run_training

if TYPE_CHECKING:
    from regrowth.pretrain.run_folder import RunFolder

RECIPE = "quickstart"
PROMPT = "def main():"


def quickstart(overrides: list[str], dry_run: bool) -> None:
    """Prepare, train, grow, export, sample, report. A run that was stopped is gone on with."""
    from regrowth.data_pipeline.corpora import open_corpora
    from regrowth.pretrain.config import load_config
    from regrowth.pretrain.run_folder import unfinished_run

    config = load_config(RECIPE, overrides)
    console = Console()
    if dry_run:
        from regrowth.launch.show import show_dry_run

        show_dry_run(config)
        return
    began = time.monotonic()
    run = unfinished_run(config)
    if run:
        console.print(f"Going on with {run.path}, which was stopped before its end.", soft_wrap=True)
    else:
        print_corpus(open_corpora(own_corpus(config, console), config.loader), console)
    run = run_training(config, console, run)
    _export(run, console)
    _sample(run, console)
    report = make_report(run)
    _summary(run, console)
    console.print(f"\n[bold]{(time.monotonic() - began) / 60:.1f} minutes.[/bold] Look at:", soft_wrap=True)
    console.print(
        f"  report   {report}\n  model    {run.path}/export/hf   (transformers: AutoModelForCausalLM.from_pretrained)", soft_wrap=True
    )
    console.print(f"  sample   regrowth generate {run.path} --prompt 'import'", soft_wrap=True)


def _export(run: "RunFolder", console: Console) -> None:
    from regrowth.launch.training import tokenizer_of
    from regrowth.pretrain.checkpoint import newest_whole
    from regrowth.pretrain.convert import export_hf

    out, (checkpoint, _) = run.path / "export" / "hf", newest_whole(run.path)
    assert checkpoint is not None
    if not out.exists():
        export_hf(checkpoint, out, tokenizer_of(run), run.config().loader.sequence_length)
    console.print(f"[bold]exported[/bold] {checkpoint.name} to {out}", soft_wrap=True)


def _sample(run: "RunFolder", console: Console) -> None:
    from regrowth.launch.checkpoints import sample_text

    text = PROMPT + "".join(sample_text(run.path, PROMPT, tokens=120, temperature=0.7, top_p=0.9, seed=0))
    write_json(run.path / "sample.json", {"text": text, "settings": f"prompt {PROMPT!r}, temperature 0.7, top-p 0.9, seed 0"})
    console.rule("a sample")
    console.print(text, markup=False, highlight=False)
    console.rule()


def _summary(run: "RunFolder", console: Console) -> None:
    from regrowth.files import read_json

    score, baseline = run.rows("evaluations")[-1], read_json(Path(run.path) / "baseline.json")
    table = Table("domain", "bits per byte", "byte trigram", title="held-out text")
    for domain, values in score["domains"].items():
        table.add_row(domain, f"{values['bits_per_byte']:.3f}", f"{baseline['domains'].get(domain, float('nan')):.3f}")
    table.add_row("all", f"[bold]{score['bits_per_byte']:.3f}[/bold]", f"{baseline['bits_per_byte']:.3f}")
    console.print(table)
