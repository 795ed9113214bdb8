"""A NaN on one rank, once, in a loss, a gradient or the weights: no rank's weights are spoilt by it, and the run goes on."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from regrowth.data_pipeline.corpus import Corpus
from regrowth.pretrain.train import Trainer, train
from tests.pretrain.helpers import Ranks, before_step, losses, new_run

AT = 13


def poisoned(folder: Path, corpus: Path, what: str) -> None:
    """Train; at one step, on the last rank alone, something becomes NaN."""
    import torch.distributed as dist

    left = [dist.get_rank() == dist.get_world_size() - 1]

    def poisoning(trainer: Trainer, number: int) -> None:
        engine: Any = trainer.session.engine
        if number == AT and left[0]:
            left[0] = False
            if what == "weights":
                _poison(list(engine.weights().values())[-1])
            elif what == "gradient":
                update = engine.step

                def with_a_bad_gradient(*args: Any, **kwargs: Any) -> float:
                    engine.step = update
                    _poison(next(p.grad for module in engine.modules for p in module.parameters() if p.grad is not None))
                    return update(*args, **kwargs)

                engine.step = with_a_bad_gradient
            else:
                forward = engine.forward_backward

                def with_a_bad_loss(*args: Any, **kwargs: Any) -> list[torch.Tensor]:
                    engine.forward_backward = forward
                    reports = forward(*args, **kwargs)
                    reports[0].reshape(-1)[0] = math.nan
                    return reports

                engine.forward_backward = with_a_bad_loss

    with before_step(poisoning):
        train(folder, corpus)


def _poison(tensor: torch.Tensor) -> None:
    with torch.no_grad():
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[operator]
        local.reshape(-1)[0] = math.nan


@pytest.mark.parametrize(
    "what", [pytest.param("loss", marks=pytest.mark.slow), pytest.param("gradient", marks=pytest.mark.slow), "weights"]
)
def test_a_nan_costs_a_step_or_a_way_back_and_no_more(what: str, corpus: Corpus, tmp_path: Path, ranks: Ranks) -> None:
    run = new_run(corpus, tmp_path, run={"steps": 24}, parallel={"dp_shard": 2, "micro_batch": 4}, checkpoint={"every": 4, "keep": 8},
                  safety={"rewind_after": 3})  # fmt: skip
    ranks(2).run(poisoned, run.path, corpus.folder, what)
    events = run.rows("events")
    skipped = [event["step"] for event in events if event["event"] == "skipped step"]
    back = [event["to"] for event in events if event["event"] == "rewound"]
    if what == "weights":  # they stay bad: back to the checkpoint from before
        assert skipped == [AT, AT + 1, AT + 2] and back == [12]
    else:
        assert skipped == [AT] and not back
    assert run.finished
    told = losses(run)
    finite = [x for x in told if x is not None and math.isfinite(x)]
    assert len(told) == 24 and len(finite) >= 23 and finite[-1] < finite[0]
