"""Prompts as files: the styles that ship (`configs/prompts/`), and those of one's own. A user adds a style by adding a file."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from regrowth.errors import UserError, nearest
from regrowth.settings import PlainName, Settings, read_toml, recipe_folder, validate

Share = Annotated[float, Field(ge=0, le=1)]


class After(Settings):
    """What is asked of an answer, and done to it."""

    prefix: str = ""  # it has to begin so; taken off
    must_hold: list[str] = []
    min_tokens: Annotated[int, Field(ge=1)] = 10
    markdown: Literal["strip", "keep"] = "strip"
    max_copied: Share = 0.8  # of its runs of eight words, those that are the source's
    keep_numbers: Share = 0.0  # of the source's numbers, dates among them, those that it has to hold
    keep_names: Share = 0.0  # of the words that the source writes with a capital inside a sentence
    some_pairs: bool = False  # of pairs of Question: and Answer:, a number by the source's length, in an order that is drawn
    append: bool = False  # it follows the source's text instead of replacing it


class Prompt(Settings):
    """How one style is asked for. Whoever changes what it asks raises `version`: answers to the old one are then no answers to it."""

    name: PlainName
    version: Annotated[int, Field(ge=1)] = 1
    level: Annotated[int, Field(ge=4, le=9)] = 4
    system: str = ""
    template: str
    chunk_tokens: Annotated[int, Field(ge=16)] = 300
    max_tokens: Annotated[int, Field(ge=1)] = 600
    temperature: Annotated[float, Field(ge=0)] = 0.7
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.9
    after: After = After()

    @field_validator("template")
    @classmethod
    def _has_a_place_for_the_text(cls, template: str) -> str:
        if template.count("{text}") != 1:
            raise ValueError('the template has to have one place for the text, written "{text}"')
        return template

    @property
    def mark(self) -> str:
        """Name and version."""
        return f"{self.name}@{self.version}"

    def payload(self, text: str) -> dict[str, Any]:
        """What is sent for a chunk, but for the model."""
        system = [{"role": "system", "content": self.system.strip()}] if self.system.strip() else []
        asked = {"role": "user", "content": self.template.strip().replace("{text}", text)}
        return {"messages": [*system, asked], "max_tokens": self.max_tokens, "temperature": self.temperature, "top_p": self.top_p}


def shipped() -> list[str]:
    """The names of the styles that come with the package."""
    return sorted(path.stem for path in (recipe_folder() / "prompts").glob("*.toml"))


def load_prompt(name: str, folder: Path | None = None) -> Prompt:
    """A style by name: from a folder of one's own where it is there, else one that ships.

    Raises:
        UserError: no such folder or style, or a fault in its file, by key.
    """
    if folder and not folder.is_dir():
        raise UserError(f"prompts = {folder}: there is no such folder.")
    own = folder / f"{name}.toml" if folder else None
    path = own if own and own.exists() else recipe_folder() / "prompts" / f"{name}.toml"
    if not path.exists():
        known = [*shipped(), *(sorted(p.stem for p in folder.glob("*.toml")) if folder else [])]
        raise UserError(f'styles: there is no prompt "{name}"; {nearest(name, known)}')
    prompt = validate(Prompt, read_toml(path), str(path))
    if prompt.name != name:
        raise UserError(f'{path}: name = "{prompt.name}"; give the prompt the name of its file, "{name}".')
    return prompt
