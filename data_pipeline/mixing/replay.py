"""Recompute a decision log from its losses: probabilities, draws and cursors must come out the same to the last bit."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from regrowth.data_pipeline.config import LoaderConfig
from regrowth.data_pipeline.mixing.build import build_mixer
from regrowth.data_pipeline.mixing.config import Mixing
from regrowth.data_pipeline.mixing.decisions import Segment, losses_of, read_log, segments
from regrowth.data_pipeline.mixing.limits import units_left
from regrowth.data_pipeline.mixing.mixer import Mixer


@dataclass(frozen=True)
class Replay:
    """What came of it: steps recomputed, steps that followed another run's log, and the first step that differs with what differs."""

    steps: int
    followed: int
    first_difference: str | None


def replay(run: Path) -> Replay:
    """Recompute the decisions of a run from nothing but its log.

    Raises:
        UserError: the log is not there, or does not say what its decisions were made by.
    """
    steps, followed = 0, 0
    state: dict[str, Any] | None = None
    for segment in segments(read_log(run)):
        mixer, room = _mixer(segment)
        if state is not None:
            mixer.load_state_dict(state)
        follows = segment.decided_by["mixing"]["replay_log"] is not None
        for row in segment.rows:
            if follows:
                mixer.follow(row["step"], row["probabilities"], row["draws"])
                followed += 1
            else:
                drawn = mixer.draw(row["step"], room(row))
                made = {
                    "probabilities": mixer.pending[-1]["probabilities"],
                    "draws": drawn.tolist(),
                    "rewards": mixer.pending[-1]["rewards"],
                }
                if differing := [key for key, value in made.items() if value != row[key]]:
                    key = differing[0]
                    return Replay(steps, followed, f"step {row['step']}: {key} in the log {row[key]}, recomputed {made[key]}")
                steps += 1
            mixer.observe(row["step"], losses_of(row))
        if told := _cursors_that_jump(segment):
            return Replay(steps, followed, told)
        state = mixer.state_dict(segment.rows[-1]["step"] + 1)  # as the checkpoint that the run went on from had it
    return Replay(steps, followed, None)


def _mixer(segment: Segment) -> tuple[Mixer, Any]:
    by = segment.decided_by
    mixing, loader = TypeAdapter(Mixing).validate_python(by["mixing"]), LoaderConfig.model_validate(by["loader"])
    mixer = build_mixer(mixing, loader, by["domains"], by["tokens"], by["budget_tokens"])
    most = np.array([np.inf if m is None else m for m in by["max_sequences"]])

    def room(row: dict[str, Any]) -> np.ndarray | None:
        return units_left(most, [cursor[3] for cursor in row["cursors"]], loader.unit_sequences)

    return mixer, room


def _cursors_that_jump(segment: Segment) -> str | None:
    """Within a segment, each step must begin where the one before it ended."""
    unit = segment.decided_by["loader"]["unit_sequences"]
    for row, after in zip(segment.rows, segment.rows[1:], strict=False):
        drawn = np.bincount(row["draws"], minlength=len(row["cursors"])) * unit
        for domain, (before, now, count) in enumerate(zip(row["cursors"], after["cursors"], drawn.tolist(), strict=True)):
            if now[3] != before[3] + count:
                name = segment.decided_by["domains"][domain]
                return f"step {after['step']}: {name} stands at {now[3]} sequences taken, and {before[3]} + {count} were"
    return None
