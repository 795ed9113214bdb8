"""No document sees another, however a sequence is cut."""

import pytest
import torch

from regrowth.parallel.plan import ParallelPlan
from regrowth.pretrain.conformance import Setting, document_losses
from tests.conformance.test_plans import Ranks

PLANS = [{}, {"cp": 2}, {"cp": 2, "context": "all_to_all"}]
LONG = [{"cp": 4}, {"cp": 2, "tp": 2}, {"cp": 2, "pp": 2}]


@pytest.mark.parametrize("plan", [*PLANS, *(pytest.param(plan, marks=pytest.mark.slow) for plan in LONG)], ids=str)
def test_changing_one_document_changes_no_others_loss(plan: dict, ranks: Ranks) -> None:
    setting = Setting("grouped" if "tp" not in plan and "context" not in plan else "dense", parallel=ParallelPlan(micro_batch=4, **plan))
    pool = ranks(setting.parallel.world_size)
    before = pool.run(document_losses, setting, None)[0]
    for changed in (0, 1):
        after = pool.run(document_losses, setting, changed)[0]
        moved = (before != after).any(dim=0)
        # Column 0 is padding. A document's last label is the next one's first token, and has no weight.
        assert moved[changed + 1] and moved.sum() == 1, f"documents {torch.nonzero(moved).flatten().tolist()} changed"
