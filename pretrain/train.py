"""The process of one rank: its settings, the group it joins, what must be the same on all ranks, and what stops it.

Whatever ends a run early - a signal, a full disk, a lost rank - leaves its newest whole checkpoint; `train` on the same folder goes on from there.
"""

import hashlib
import os
import platform
import signal
import socket
import time
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

import torch

from regrowth import __version__
from regrowth.data_pipeline.corpora import open_corpora
from regrowth.data_pipeline.corpus import Corpus
from regrowth.errors import RankLost, RunFailed
from regrowth.files import exclusive, fingerprint
from regrowth.parallel import health
from regrowth.parallel.agree import check_same, on_every_rank, on_first_rank
from regrowth.parallel.heartbeat import Heartbeat, explain, record_collectives
from regrowth.parallel.mesh import choose_device, process_group
from regrowth.pretrain.config import RunConfig
from regrowth.pretrain.run_folder import RunFolder
from regrowth.pretrain.session import prepare_process
from regrowth.pretrain.snapshot import note_start
from regrowth.pretrain.trainer import Trainer


class StopRequest:
    """SIGTERM, SIGINT and SIGUSR1 ask for a checkpoint and an orderly end at the next step; a second SIGINT ends at once."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True


def train(folder: Path, place: str | Path, ranks_here: int = 1, heart: Heartbeat | None = None, config: RunConfig | None = None) -> None:
    """Run or resume the run in `folder` until its last step; called on every rank, with the launcher's environment.

    Args:
        place: folder or address of the run's corpus.
        ranks_here: ranks on this machine, which share its cores.
        heart: this rank's, if it has begun to beat already.
        config: in the place of the run's own, for this start alone.

    Raises:
        Stopped: on request, after a checkpoint; or by a growth, after which the plan needs another number of ranks.
        UserError: config, corpus and checkpoint do not fit.
        RunFailed: a checkpoint could not be written, or the loss is not finite step after step.
    """
    stop = StopRequest()
    run = RunFolder.open(folder)
    config = config or run.config()
    prepare_process(config, ranks_here)
    torch.use_deterministic_algorithms(config.run.deterministic)
    device = choose_device(config.run.device)
    record_collectives(folder / "logs")
    with process_group(device, config.run.timeout_seconds) as (rank, world_size):
        heart = heart or Heartbeat(folder / "logs", rank, world_size)
        heart.beat(0, "startup")
        if rank == 0 and (changed := note_start(folder, **_device(device, world_size))):
            run.log("events", {**changed, "step": max(run.checkpointed, 0)})
        if config.supervision.health_check:
            found = on_every_rank(lambda: _check_health(device, folder))
            speed = health.reduce_speed(device)
            if rank == 0:
                told = {
                    "disk_megabytes_per_second": round(found.write_megabytes_per_second),
                    "reduce_gigabytes_per_second": round(speed, 3),
                }
                run.log("events", {"event": "nodes checked", "time": time.time(), **told})
        corpus = on_every_rank(lambda: open_corpora(place, config.loader))
        check_same(identity(config, corpus))
        with ExitStack() as held:
            held.callback(heart.close)
            refusal = f"{folder}: another process is running this run. Wait for it, or stop it first."
            on_first_rank(lambda: bool(held.enter_context(exclusive(folder / ".lock", refusal))))
            try:
                Trainer(run, config, corpus, device, rank, lambda: stop.asked, heart).run_to_the_end()
            except RuntimeError as error:
                if told := explain(folder / "logs", error, rank):
                    raise RankLost(f"{folder}: {told}") from error
                raise


def _device(device: torch.device, ranks: int) -> dict[str, str | int]:
    """What the first rank computes on, and how many there are."""
    if device.type == "cuda":
        runtime = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
        return {"device": f"{torch.cuda.get_device_name(device)}, {runtime}", "ranks": ranks}
    names = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {"device": names[0] if names else platform.processor() or "cpu", "ranks": ranks}


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _check_health(device: torch.device, folder: Path) -> health.Health:
    """Raises RunFailed with this host's name, if it is not fit to train."""
    found = health.check(device, folder, only_arithmetic=os.environ.get("LOCAL_RANK", "0") != "0")
    if found.faults:
        raise RunFailed(f"{socket.gethostname()}: {'; '.join(found.faults)}. (supervision.health_check = false goes on all the same.)")
    return found


def identity(config: RunConfig, corpus: Corpus) -> dict[str, str]:
    """What must be the same on all ranks."""
    told = config.model_dump_json(exclude={"run": {"threads"}})
    return {
        "the version of regrowth": __version__,
        "the version of torch": torch.__version__,
        "the version of Python": platform.python_version(),
        "the hash of the config": hashlib.sha256(told.encode()).hexdigest()[:16],
        "the hash of the data": fingerprint(
            [
                [split, domain, row["sha256"]]
                for split, by_domain in sorted(corpus.manifest["splits"].items())
                for domain, rows in sorted(by_domain.items())
                for row in rows
            ]
        ),
    }
