"""Checkpoints: a folder that is either whole or refused.

    step-000400/
      model/ optimizer/    sharded safetensors under canonical names; no pickle is ever written or read
      model.json           the model's config: the checkpoint owns it, growth changes it
      loader.json trainer.json lineage.json
      manifest.json        written last: the size and sum of every other file

Written beside under a name that no reader accepts, synced, then renamed. Loading reshards to any mesh. A folder without manifest, or with a
file that differs from it, is refused by name, and the one before is used.
"""

import hashlib
import json
import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.api import CheckpointException

from regrowth.errors import RunFailed, UserError
from regrowth.files import disk_full_message, fsync_path, make_folder, read_json, sha256_of
from regrowth.parallel.agree import on_first_rank
from regrowth.parallel.heartbeat import tells_of_a_lost_rank
from regrowth.pretrain.checkpoint_folders import list_checkpoints, step_of
from regrowth.pretrain.lineage import Lineage
from regrowth.pretrain.model_config import ModelConfig
from regrowth.pretrain.tensor_files import StreamedWriter, TensorFile, sum_of_file
from regrowth.settings import validate

FORMAT = 2
_READABLE = (1, 2)  # 1: files of tensors have the sha256 of the whole file, not a sum of sums


@dataclass(frozen=True)
class CheckpointState:
    """Everything but the tensors."""

    model: ModelConfig
    lineage: Lineage
    loader: dict[str, Any]
    trainer: dict[str, Any]  # step, optimizer_steps


def save_checkpoint(
    path: Path,
    weights: dict[str, torch.Tensor],
    moments: dict[str, torch.Tensor],
    state: CheckpointState,
    alone: bool = False,
    group: dist.ProcessGroup | None = None,
    logs: Sequence[Path] = (),
) -> str:
    """Write a checkpoint atomically; every rank calls it with its shards, or one calls it `alone` with whole tensors. Returns its id.

    Args:
        group: of all ranks, whose collectives to use; None for the default one.
        logs: that tell of the steps before it, and are synced before it stands: who goes on from it does not write these steps again.

    Raises:
        RunFailed: on every rank, if any of them could not write (disk full, I/O error). Older checkpoints are untouched.
    """
    folder = path.with_name(f".{path.name}.partial")
    alone = alone or not dist.is_initialized()
    once: Callable[[Callable[[], Any]], Any] = (lambda function: function()) if alone else partial(on_first_rank, group=group)
    once(lambda: _fresh_folder(folder, weights, moments))
    try:
        # What fails on one rank inside of these comes to all of them as one CheckpointException (which is no Exception).
        files = {f"{kind}/{file.name}": file for kind, tensors in (("model", weights), ("optimizer", moments))
                 for file in _save_tensors(folder / kind, tensors, alone, group)}  # fmt: skip
        return once(lambda: finish(folder, path, state, files, logs))
    except (Exception, CheckpointException) as error:
        raise _write_failure(path, error) from error
    finally:
        if alone or dist.get_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)


def _fresh_folder(partial: Path, weights: dict[str, torch.Tensor], moments: dict[str, torch.Tensor]) -> None:
    for old in partial.parent.glob(".step-*.partial"):  # left by a killed writer
        shutil.rmtree(old, ignore_errors=True)
    make_folder(partial.parent)
    for name in ("model", "optimizer"):
        (partial / name).mkdir(parents=True)
    try:
        check_room(partial, sum(t.numel() * t.element_size() for t in (*weights.values(), *moments.values())))
    except RunFailed:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def check_room(folder: Path, needed: int) -> None:
    """Whether `needed` bytes fit on the disk.

    Raises:
        RunFailed: they do not.
    """
    if needed > shutil.disk_usage(folder).free:
        raise RunFailed(f"{disk_full_message(folder.parent)} This checkpoint needs {needed / 2**20:.1f} MiB.")


def _save_tensors(folder: Path, tensors: dict[str, torch.Tensor], alone: bool, group: dist.ProcessGroup | None) -> list[TensorFile]:
    """The files of all ranks, on the first one."""
    writer = StreamedWriter(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(dict(tensors), storage_writer=writer, process_group=group, no_dist=alone)
    return writer.files


def finish(partial: Path, path: Path, state: CheckpointState, files: dict[str, TensorFile], logs: Sequence[Path] = ()) -> str:
    """Make a checkpoint of a folder that has all tensor files: the small files, the manifest last, then the rename. Returns its id."""
    parts = {"model": state.model.model_dump(), "loader": state.loader, "trainer": state.trainer, "lineage": state.lineage.model_dump()}
    small = [_dump(partial / f"{name}.json", value) for name, value in parts.items()]
    sums = {name: {"size": file.size, "sum_of_sums": file.sum} for name, file in sorted(files.items())}
    sums |= {file.name: {"size": file.stat().st_size, "sha256": sha256_of(file)} for file in small}
    identity = content_id(sums["model.json"]["sha256"], files)
    manifest = {"format": FORMAT, "id": identity, "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "files": sums}
    small.append(_dump(partial / "manifest.json", manifest))
    # Ranks have synced their own files; a log's entry in its folder may be as new as the log.
    for file in [*small, partial / "model", partial / "optimizer", partial, *logs, *{log.parent for log in logs}]:
        fsync_path(file)
    if path.exists():  # the same step written again after a rewind
        shutil.rmtree(path)
    partial.replace(path)
    fsync_path(path.parent)
    return identity


def content_id(model_sha256: str, files: dict[str, TensorFile]) -> str:
    """sha256 over the model's config and every stored tensor part (name, place, bytes), whatever the order they lie in on disk."""
    parts: list[list[Any]] = [["model.json", model_sha256]]
    parts += [[name.split("/")[0], *part] for name, file in files.items() for part in file.parts]
    return hashlib.sha256("\n".join(sorted(json.dumps(part, sort_keys=True) for part in parts)).encode()).hexdigest()


def _dump(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")
    return path


def _write_failure(path: Path, error: BaseException) -> RunFailed:
    if isinstance(error, RunFailed):
        return error
    told = reasons(error)
    if any(sign in told for sign in ("No space left", "ENOSPC", "Disk quota", "os error 28", "StorageFull")):
        return RunFailed(disk_full_message(path.parent))
    return RunFailed(f"{path}: the checkpoint could not be written: {told[:500]}. Older checkpoints are intact.")


def reasons(error: BaseException) -> str:
    """What an error says; of one that gathers the errors of several ranks, the first rank's own."""
    failures = getattr(error, "failures", None)
    if not isinstance(failures, dict) or not failures:
        return str(error)
    rank, (inner, _) = next(iter(sorted(failures.items())))
    return f"rank {rank}: {type(inner).__name__}: {inner}"


def verify(path: Path) -> dict[str, Any]:
    """Check a checkpoint against its manifest, which is returned.

    Raises:
        UserError: naming the file that is missing, truncated or altered.
    """
    manifest = _manifest(path)
    if manifest.get("format") not in _READABLE:
        raise UserError(f"{path}: refused, checkpoint format {manifest.get('format')}; this version reads formats up to {FORMAT}.")
    for name, entry in manifest["files"].items():
        file = path / name
        if not file.exists():
            raise UserError(f"{path}: refused, {name} is missing.")
        if (size := file.stat().st_size) != entry["size"]:
            raise UserError(f"{path}: refused, {name} is truncated or altered ({size:,} bytes, the manifest says {entry['size']:,}).")
    with ThreadPoolExecutor(4) as readers:  # hashing leaves the interpreter's lock free
        sums = {name: _sum(path / name, entry, readers) for name, entry in manifest["files"].items()}
        for name, entry in manifest["files"].items():
            if sums[name]() != entry.get("sum_of_sums", entry.get("sha256")):
                raise UserError(f"{path}: refused, {name} was altered (its sum is not the manifest's).")
    return manifest


def _sum(file: Path, entry: dict[str, Any], readers: ThreadPoolExecutor) -> Callable[[], str]:
    if "sum_of_sums" not in entry:
        return readers.submit(sha256_of, file).result
    try:
        return sum_of_file(file, readers)
    except (ValueError, LookupError, TypeError, AttributeError):  # its header was altered
        return lambda: "none"


def identity_of(path: Path) -> str:
    """A checkpoint's id, as its manifest says: the files are not looked at.

    Raises:
        UserError: it has no manifest.
    """
    return _manifest(path)["id"]


def _manifest(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise UserError(f"{path}: there is no such checkpoint folder.")
    if not (path / "manifest.json").exists():
        raise UserError(f"{path}: refused, it has no manifest.json: it was never finished, or is not a checkpoint.")
    return read_json(path / "manifest.json")


def newest_whole(run: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that passes `verify`, and the letters about newer ones that were refused."""
    refused = []
    for path in reversed(list_checkpoints(run)):
        try:
            verify(path)
            return path, refused
        except UserError as error:
            refused.append(str(error))
    return None, refused


def newest_before(run: Path, step: int) -> Path | None:
    """The newest whole checkpoint of a step up to and including `step`."""
    for path in reversed(list_checkpoints(run)):
        if step_of(path) <= step:
            try:
                verify(path)
                return path
            except UserError:
                continue
    return None


def read_state(path: Path) -> CheckpointState:
    """The parts of a checkpoint that are not tensors."""
    return CheckpointState(
        model=validate(ModelConfig, read_json(path / "model.json"), str(path / "model.json")),
        lineage=validate(Lineage, read_json(path / "lineage.json"), str(path / "lineage.json")),
        loader=read_json(path / "loader.json"),
        trainer=read_json(path / "trainer.json"),
    )


def load_tensors(folder: Path, into: dict[str, torch.Tensor], alone: bool = False) -> None:
    """Read `model/` or `optimizer/` of a checkpoint into existing tensors: every rank its part, or one process `alone`.

    Raises:
        UserError: a name or a shape is not the checkpoint's.
        RuntimeError: another rank was lost meanwhile.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            dcp.load(dict(into), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=alone or not dist.is_initialized())
        except (Exception, CheckpointException) as error:
            if tells_of_a_lost_rank(told := reasons(error)):
                raise RuntimeError(told) from error
            raise UserError(f"{folder}: does not fit the model: {told[:600]}") from error


def load_plain(path: Path) -> tuple[CheckpointState, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A whole checkpoint on this process's CPU, after `verify`: (state, weights, moments). For growth, conversion and evaluation."""
    verify(path)
    state = read_state(path)
    shapes = canonical_shapes(state.model)
    weights = {name: torch.empty(shape) for name, shape in shapes.items()}
    moments = {f"{name}.{m}": torch.empty(shape) for name, shape in shapes.items() if has_moments(name) for m in ("exp_avg", "exp_avg_sq")}
    load_tensors(path / "model", weights, alone=True)
    load_tensors(path / "optimizer", moments, alone=True)
    return state, weights, moments


def canonical_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Canonical name -> shape of every weight of a model (parameters, and what is kept with them), without building its storage."""
    from regrowth.pretrain.attention import Sdpa
    from regrowth.pretrain.model import Transformer

    with torch.device("meta"):
        model = Transformer(config, Sdpa())
    return {name: tensor.shape for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def has_moments(name: str) -> bool:
    """Whether a weight is trained by the optimizer; a router's balancing bias is not."""
    return not name.endswith("router.bias")


def set_aside(run: Path, newer_than: Path | None) -> None:
    """Rename what was refused to `refused-step-N`, so that it is neither counted nor removed as one of the checkpoints."""
    paths = list_checkpoints(run)
    newer = paths[paths.index(newer_than) + 1 :] if newer_than else paths
    for path in newer:
        aside = path.with_name(f"refused-{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        path.replace(aside)
    if newer:  # the logs, which are cut back next, must not be on the disk without this
        fsync_path(run / "checkpoints")


def prune(run: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints."""
    for path in list_checkpoints(run)[:-keep]:
        shutil.rmtree(path, ignore_errors=True)
