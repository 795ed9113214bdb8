"""Growing a checkpoint into a checkpoint. Growth inside a run is the same path: checkpoint -> grow -> rebuild.

Tensor by tensor, in streams: a worker holds a target tensor and what it is made of, and no more. Target files are small enough for several workers to share them;
each is noted when it stands, so that a growth that was killed goes on with those that are missing.
"""

import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import asdict
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from regrowth.errors import RunFailed, UserError
from regrowth.files import disk_full_is_a_letter, exclusive, make_folder, read_json, write_json
from regrowth.mpi import Alone
from regrowth.pretrain.checkpoint import FORMAT, CheckpointState, canonical_shapes, check_room, finish, has_moments, read_state, verify
from regrowth.pretrain.growth.names import TensorName
from regrowth.pretrain.growth.operator import GrowthOperator
from regrowth.pretrain.growth.plan import GrowthPlan
from regrowth.pretrain.growth.scales import grown_precision
from regrowth.pretrain.model_config import ModelConfig
from regrowth.pretrain.tensor_files import TensorFile, TensorReader, TensorSpec, write_safetensors

Read = Callable[[str], torch.Tensor]
Jobs = dict[str, dict[str, TensorSpec]]  # files of a target, and the tensors in each
Progress = Callable[[int, int], None]  # bytes done, bytes in all

_FILE_BYTES = 1 << 30
_ALONE_BELOW = 256 << 20  # bytes of target that are not worth starting processes for
_MOST_WORKERS = 8  # unless told: each holds a target tensor and its sources


def grow_checkpoint(
    source: Path,
    target: Path,
    plan: GrowthPlan,
    workers: int = 0,
    progress: Progress = lambda done, total: None,
    ranks: Alone | None = None,
    identity: str = "",
) -> CheckpointState:
    """Grow the checkpoint at `source` into a new one at `target`; returns the new state.

    Args:
        workers: processes; 0: as many as the size is worth, at most one a core.
        ranks: that do it together, on file systems that they share; all of them call this.
        identity: the source's id, where it was verified just now; else it is.

    Raises:
        UserError: `source` is refused, `target` exists, an operator does not fit, or another process is growing to the same place.
        RunFailed: the disk is full, or a worker was killed; what is done stays, and the same growth goes on from it.
    """
    ranks = ranks or Alone()
    partial = target.with_name(f".{target.name}.growing")
    with ExitStack() as held:  # the first rank's lock
        identity = ranks.first(lambda: _begin(source, target, partial, plan, identity, held))
        state = read_state(source)
        shapes = plan.configs(state.model)
        ranks.together(lambda: _grow_files(source, partial, plan, state.model, workers, progress, ranks))
        sizes = {key: [getattr(shapes[0], key), getattr(shapes[-1], key)] for key in ("layers", "width", "parameters")}
        source_model = {"source": state.model.model_dump(mode="json")} if plan.operators[-1].op == "random_pad" else {}  # for its ramp
        lineage = state.lineage.grown(identity, {**plan.describe(), **sizes, **source_model})
        # Losses of the smaller model are no measure for the larger one.
        trainer = {key: value for key, value in state.trainer.items() if key != "precision"} | {"guard": {}}
        if precision := grown_precision(state.trainer.get("precision", {}), plan, state.model):
            trainer["precision"] = precision
        grown = CheckpointState(shapes[-1], lineage, state.loader, trainer)
        ranks.first(lambda: _finish(partial, target, grown))
    return grown


def _begin(source: Path, target: Path, partial: Path, plan: GrowthPlan, identity: str, held: ExitStack) -> str:
    """See that the growth can be done, and make the folder that it is done in, or find what was done before; returns the source's id."""
    if target.exists():
        raise UserError(f"{target}: exists already; growing never overwrites. Remove it or choose another output.")
    identity = identity or verify(source)["id"]
    jobs = _jobs(plan.configs(read_state(source).model)[-1])
    make_folder(partial)
    held.enter_context(
        exclusive(partial / ".lock", f"{target}: another process is growing to this place. Wait for it, or choose another output.")
    )
    if target.exists():  # it was not there a moment ago
        raise UserError(f"{target}: exists already; another process has grown to this place.")
    begun = {"source": identity, "plan": plan.describe(), "format": FORMAT}
    note = partial / "growing.json"
    if note.exists() and read_json(note) != begun:  # of another growth
        for kind in ("model", "optimizer"):
            shutil.rmtree(partial / kind, ignore_errors=True)
    write_json(note, begun)
    for kind in ("model", "optimizer"):
        (partial / kind).mkdir(exist_ok=True)
    check_room(partial, _bytes(_missing(partial, jobs)))
    return identity


def _finish(partial: Path, target: Path, grown: CheckpointState) -> None:
    files = {name: TensorFile(**read_json(partial / f"{name}.done")) for name in _jobs(grown.model)}
    for note in (partial / "growing.json", partial / ".lock", *partial.glob("*/*.done")):
        note.unlink(missing_ok=True)
    finish(partial, target, grown, files)


def _missing(partial: Path, jobs: Jobs) -> Jobs:
    return {name: specs for name, specs in jobs.items() if not (partial / f"{name}.done").exists()}


def _bytes(jobs: Jobs) -> int:
    return sum(spec.size for specs in jobs.values() for spec in specs.values())


def _grow_files(source: Path, partial: Path, plan: GrowthPlan, config: ModelConfig, workers: int, progress: Progress, ranks: Alone) -> None:
    """Write this rank's share of the files that are missing; progress is of the share."""
    jobs = dict(list(_jobs(plan.configs(config)[-1]).items())[ranks.rank :: ranks.size])
    missing = _missing(partial, jobs)
    total, left = _bytes(jobs), _bytes(missing)
    done = total - left
    tasks = [(source, partial, plan, config, name, specs) for name, specs in missing.items()]
    alone = left < _ALONE_BELOW if not workers else workers == 1
    if alone or not tasks:
        for task in tasks:
            done += _grow_file(*task)
            progress(done, total)
    else:
        try:
            with ProcessPoolExecutor(workers or min(os.cpu_count() or 1, len(tasks), _MOST_WORKERS), get_context("spawn")) as pool:
                for size in pool.map(_grow_file, *zip(*tasks, strict=True)):
                    done += size
                    progress(done, total)
        except BrokenProcessPool as error:
            raise RunFailed(f"{partial}: a worker was killed, perhaps for want of memory. What is done stays: do the same again to go on, with fewer --workers "
                            "if it was memory.") from error  # fmt: skip


def _jobs(config: ModelConfig) -> Jobs:
    """The files of a target, by name: which tensors go into each."""
    weights = {name: TensorSpec(torch.float32, shape) for name, shape in canonical_shapes(config).items()}
    moments = {f"{name}.{m}": spec for name, spec in weights.items() if has_moments(name) for m in ("exp_avg", "exp_avg_sq")}
    jobs: Jobs = {}
    for kind, specs in (("model", weights), ("optimizer", moments)):
        number, size = 0, 0
        for name, spec in specs.items():
            if size and size + spec.size > _FILE_BYTES:
                number, size = number + 1, 0
            size += spec.size
            jobs.setdefault(f"{kind}/shard-{number:05d}-model-00001-of-00001.safetensors", {})[name] = spec
    return jobs


def _grow_file(source: Path, partial: Path, plan: GrowthPlan, config: ModelConfig, name: str, specs: dict[str, TensorSpec]) -> int:
    """Write one file and note that it stands; returns its bytes."""
    read = grown_reader(plan, config, TensorReader(source / name.split("/")[0]))
    places = {tensor: {"saved_offsets": [0] * len(spec.shape)} for tensor, spec in specs.items()}
    with disk_full_is_a_letter(partial / name):
        file = write_safetensors(partial / name, specs, read, places)
    write_json(partial / f"{name}.done", asdict(file))
    return sum(spec.size for spec in specs.values())


def grown_reader(plan: GrowthPlan, config: ModelConfig, read: Read) -> Read:
    """Gives the target's tensors by name, made when they are asked for.

    Args:
        config: the source model's.
        read: gives the source's: weights by canonical name, moments with `.exp_avg` or `.exp_avg_sq` behind it.
    """
    for operator, before, after in zip(plan.operators, shapes := plan.configs(config), shapes[1:], strict=False):
        read = _one_step(operator, before, after, read, plan.seed)
    if plan.moments == "carry":
        return read
    sizes, carried = canonical_shapes(shapes[-1]), read
    return lambda name: torch.zeros(sizes[_split(name)[0]]) if _split(name)[1] else carried(name)


def _one_step(operator: GrowthOperator, before: ModelConfig, after: ModelConfig, read: Read, seed: int) -> Read:
    sizes = canonical_shapes(after)
    kept = lru_cache(maxsize=2)(read)  # terms of one target often share a source
    return lambda name: grow_tensor(operator, name, sizes[_split(name)[0]], before, after, kept, seed)


def grow_tensor(
    operator: GrowthOperator,
    name: str,
    shape: torch.Size,
    config: ModelConfig,
    grown: ModelConfig,
    read: Read,
    seed: int = 0,
) -> torch.Tensor:
    """A target weight, or with `.exp_avg` or `.exp_avg_sq` behind its name a moment.

    Args:
        shape: the target's.
        read: gives a source tensor by its name, with the same ending.
    """
    base, ending = _split(name)
    terms = operator.terms(TensorName.parse(base), config, grown)

    def source(of: TensorName) -> torch.Tensor:
        return read(f"{of}{ending}")

    parts = (term.moments(source, ending == ".exp_avg_sq") if ending else term.weights(source, seed) for term in terms)
    return _combine(shape, torch.float32, parts, name)


def _split(name: str) -> tuple[str, str]:
    for ending in (".exp_avg_sq", ".exp_avg"):
        if name.endswith(ending):
            return name.removesuffix(ending), ending
    return name, ""


def _combine(shape: torch.Size, dtype: torch.dtype, parts: Iterable[torch.Tensor | None], name: str) -> torch.Tensor:
    """The sum of the parts, zeros if there are none."""
    total: Any = None
    for part in parts:
        if part is not None:
            assert part.shape == shape, f"{name}: {tuple(part.shape)} is not {tuple(shape)}"
            total = part.to(dtype) if total is None else total + part
    return torch.zeros(shape, dtype=dtype) if total is None else total
