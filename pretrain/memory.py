"""What to tell when memory ran out: where it went, and which knobs help."""

import torch

from regrowth.parallel.dtensor import local_tensor
from regrowth.parallel.engine import Engine
from regrowth.parallel.plan import ParallelPlan
from regrowth.pretrain.metrics import peak_memory_bytes


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that an allocation failed, on a GPU or on the host."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def held_bytes(engine: Engine) -> dict[str, int]:
    """Bytes of this rank's weights, gradients and moments."""
    parameters = [p for module in engine.modules for p in module.parameters()]

    def total(tensors: list[torch.Tensor]) -> int:
        return sum(local.numel() * local.element_size() for local in map(local_tensor, tensors))

    return {
        "weights": total(list(parameters)),
        "gradients": total([p.grad for p in parameters if p.grad is not None]),
        "moments": engine.moment_bytes(),
    }


def letter(engine: Engine, plan: ParallelPlan, rank: int, step: int, device: torch.device) -> str:
    """One paragraph: the peak by category, and the keys to turn, those that cost least first."""
    held, peak = held_bytes(engine), peak_memory_bytes(device)
    rest = max(0, peak - sum(held.values()))
    told = ", ".join(f"{name} {size / 2**30:.2f} GiB" for name, size in {**held, "activations and the rest": rest}.items())
    knobs = []
    if plan.micro_batch > 1:
        knobs.append(f"parallel.micro_batch={max(1, plan.micro_batch // 2)} (now {plan.micro_batch})")
    if plan.recompute != "full":
        knobs.append('parallel.recompute="full"' if plan.recompute == "selective" else 'parallel.recompute="selective", then "full"')
    if rest < sum(held.values()):
        knobs = [f"parallel.dp_shard={2 * plan.dp_shard} on twice the ranks", *knobs, *([] if plan.offload else ["parallel.offload=true"])]
    elif plan.cp * plan.tp == 1:
        knobs.append("parallel.cp=2 or parallel.tp=2 on twice the ranks")
    return f"rank {rank} ran out of memory in step {step}: peak {peak / 2**30:.2f} GiB ({told}). What helps: {'; '.join(knobs)}."
