"""Lineage: where a checkpoint comes from, as a graph by content hash. Nothing paid for is forgotten: data, tokens and FLOPs of all ancestors."""

from pathlib import Path
from typing import Any

from pydantic import Field

from regrowth.settings import Settings


class Parent(Settings):
    """An ancestor and what was done with it. `tokens` and `train_flops` were spent on it by then, on its own ancestors too."""

    id: str
    relation: str  # "grown from", "continued from", "averaged from"
    step: int
    operator: dict[str, Any] = {}
    tokens: int = 0
    train_flops: float = 0.0


class Lineage(Settings):
    """One checkpoint's record. `tokens` and `train_flops` are spent on it in all, its ancestors' included."""

    parents: list[Parent] = []  # oldest first
    run: str = ""
    step: int = 0
    tokens: int = 0
    train_flops: float = 0.0
    tokens_by_domain: dict[str, int] = Field(default_factory=dict)
    corpus: str = ""
    version: str = ""

    def as_parent(self, parent_id: str, relation: str, operator: dict[str, Any]) -> Parent:
        """This checkpoint as an ancestor."""
        return Parent(id=parent_id, relation=relation, step=self.step, operator=operator, tokens=self.tokens, train_flops=self.train_flops)

    def grown(self, parent_id: str, operator: dict[str, Any]) -> "Lineage":
        """The record of a model grown from this one."""
        parent = self.as_parent(parent_id, "grown from", operator)
        return self.model_copy(update={"parents": [*self.parents, parent]})

    def continued(self, parent_id: str) -> "Lineage":
        """The record of a new run that starts from this checkpoint; its steps count from 0, tokens and FLOPs go on."""
        parent = self.as_parent(parent_id, "continued from", {"op": "a new run"})
        return self.model_copy(update={"parents": [*self.parents, parent], "step": 0})

    def trained(self, run: str, tokens: int, flops: float, by_domain: dict[str, int]) -> "Lineage":
        """The record after one more step.

        Args:
            by_domain: tokens of the step, padding counted.
        """
        of_domains = {name: self.tokens_by_domain.get(name, 0) + by_domain.get(name, 0) for name in {**self.tokens_by_domain, **by_domain}}
        spent = {"tokens": self.tokens + tokens, "train_flops": self.train_flops + flops, "tokens_by_domain": of_domains}
        return self.model_copy(update={"run": run, "step": self.step + 1, **spent})

    @property
    def growths(self) -> list[Parent]:
        """The growths of the present run, oldest first."""
        begun = max((i for i, parent in enumerate(self.parents) if parent.relation == "continued from"), default=-1)
        return [parent for parent in self.parents[begun + 1 :] if parent.relation == "grown from"]

    @property
    def growth_steps(self) -> list[int]:
        """The steps of the present run before which growths happened."""
        return [parent.step for parent in self.growths]

    def lines(self) -> list[str]:
        """The record for people, oldest first."""
        told = [
            f"{p.id[:12]}, step {p.step:,}{f', {p.train_flops:.3g} training FLOPs by then' if p.train_flops else ''}: "
            f"{p.relation.removesuffix(' from')} by {_spell(p.operator)}"
            for p in self.parents
        ]
        return [*told, f"this checkpoint  step {self.step:,}, {self.tokens:,} tokens, {self.train_flops:.3g} training FLOPs in all"]


def _spell(operator: dict[str, Any]) -> str:
    """An operator, or a chain of them with their settings, and which sizes it changed."""
    settings = [
        f"{key} {value}" for step in operator.get("operators", []) for key, value in step.items() if key != "op" and value not in (False, 0)
    ]
    sizes = [
        f"{key} {size[0]:,} to {size[1]:,}"
        for key, size in operator.items()
        if isinstance(size, list) and key != "operators" and size[0] != size[1]
    ]
    rest = ", ".join(told.replace("_", " ") for told in settings + sizes)
    return f"{operator.get('op', '?')} ({rest})" if rest else str(operator.get("op", "?"))


def read_lineage(checkpoint: Path) -> Lineage:
    """The lineage of a checkpoint folder."""
    from regrowth.files import read_json
    from regrowth.settings import validate

    path = checkpoint / "lineage.json"
    return validate(Lineage, read_json(path), str(path))
