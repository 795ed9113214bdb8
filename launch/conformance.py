"""The `conformance` command: are all plans the same training on this machine or cluster?"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table

from regrowth.errors import RunFailed, UserError
from regrowth.files import write_json

if TYPE_CHECKING:
    from regrowth.pretrain.conformance import Outcome
    from regrowth.pretrain.conformance_plans import Case


def conformance(only: str, ranks: int, covering: bool, out: Path | None, listing: bool) -> None:
    """Run the plans of the table and print the largest deviation of each from one process.

    On its own it starts processes here, joined by gloo; under torchrun or Slurm it is one of the ranks, and runs the plans of as many ranks as were
    started, on their GPUs where they have any.

    Raises:
        UserError: no plan matches.
        RunFailed: a plan is not the same training.
    """
    from regrowth.pretrain.conformance_plans import CASES, COVERING

    started = int(os.environ.get("WORLD_SIZE", 0)) if "REGROWTH_LAUNCHER" not in os.environ else 0
    cases = [
        case
        for case in CASES
        if only in case.name
        and (case.plan.world_size == started if started else case.plan.world_size <= ranks)
        and (not covering or case.name in COVERING)
    ]
    console = Console()
    if listing:
        for case in cases:
            console.print(f"{case.plan.world_size} ranks  {case.name}", highlight=False)
        return
    if not cases:
        raise UserError(
            f"conformance: no plan of the table matches --only {only!r} with {started or f'at most {ranks}'} ranks; --list shows them."
        )
    rows = _as_a_rank(cases) if started else _here(cases, console)
    if not rows:
        return
    bad = [row for row in rows if row["over"]]
    _print(rows, console)
    if out:
        write_json(out, rows)
        console.print(f"wrote {out}", soft_wrap=True)
    if bad:
        raise RunFailed(f"{len(bad)} of {len(rows)} plans are not the same training: {', '.join(row['plan'] for row in bad[:5])}.")
    console.print(f"{len(rows)} plans, all within their tolerances")


def _here(cases: "list[Case]", console: Console) -> list[dict[str, Any]]:
    from regrowth.parallel.ranks import RankError, RankPool
    from regrowth.pretrain.conformance import train

    pools: dict[int, RankPool] = {}
    references: dict[tuple[str, str, str], Outcome] = {}
    rows = []
    try:
        for case in track(cases, description="conformance", console=Console(stderr=True)):
            pool = pools.setdefault(case.plan.world_size, RankPool(case.plan.world_size, timeout_seconds=600))
            one = pools.setdefault(1, RankPool(1, timeout_seconds=600))
            if case.trained not in references:
                references[case.trained] = one.run(train, case.reference())[0]
            try:
                outcome = pool.run(train, case.setting())[0]
            except RankError as error:
                console.print(f"{case.name}: {str(error)[-1500:]}", style="red", markup=False)
                rows.append({"plan": case.name, "ranks": case.plan.world_size, "over": ["failed"]})
                continue
            rows.append(_row(case, outcome, references[case.trained]))
    finally:
        for pool in pools.values():
            pool.close()
    return rows


def _as_a_rank(cases: "list[Case]") -> list[dict[str, Any]]:
    """Rows on rank 0, nothing elsewhere."""
    import torch.distributed as dist

    from regrowth.parallel.mesh import choose_device, process_group
    from regrowth.pretrain.conformance import train

    rows = []
    device = choose_device("auto")
    with process_group(device):
        for case in cases:
            reference = train(case.reference(device.type))  # each rank for itself
            outcome = train(case.setting(device.type))
            if dist.get_rank() == 0:
                rows.append(_row(case, outcome, reference))
    return rows


def _row(case: "Case", outcome: "Outcome", reference: "Outcome") -> dict[str, Any]:
    from regrowth.pretrain.conformance import deviation

    found = deviation(outcome, reference)
    over = [name for name, limit in case.tolerances.items() if not found[name] <= limit]
    return {"plan": case.name, "ranks": case.plan.world_size, **found, "tolerances": case.tolerances, "over": over}


def _print(rows: list[dict[str, Any]], console: Console) -> None:
    names = ("first loss", "losses", "gradients", "validation")
    numbers = [Column(name.replace("first ", "first\n").replace("ation", "."), no_wrap=True, justify="right") for name in names]
    table = Table("ranks", "plan", *numbers, "", title="largest relative deviation from one process", box=box.SIMPLE)
    for row in rows:
        cells = [f"{row[name]:.1e}" if name in row else "-" for name in names]
        table.add_row(
            str(row["ranks"]), row["plan"], *cells, f"[red]over: {', '.join(row['over'])}[/red]" if row["over"] else "[green]equal[/green]"
        )
    console.print(table)
