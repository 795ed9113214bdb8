"""The text that a Python installation carries, as three domains that read differently: code, docs, reference.

Docstrings go to `reference` and are cut out of `code`, so that a held-out page of reference is not in a training file as well.
Files are taken in the order of a hash of their name: a size limit then samples all packages alike, and deterministically.
"""

import ast
import email
import hashlib
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from regrowth.data_pipeline.document import Raw
from regrowth.data_pipeline.source_config import InstalledSource
from regrowth.data_pipeline.sources.base import Item
from regrowth.files import fingerprint

_BYTES_PER_ITEM = 2 << 20  # parsing costs more than reading: smaller items than other sources have
_MAX_FILE_BYTES = 1 << 20  # larger ones are generated tables


class InstalledText:
    """Standard library and packages of the running interpreter."""

    def __init__(self, config: InstalledSource) -> None:
        self.limit = config.max_megabytes * 1e6 if config.max_megabytes else float("inf")
        self.roots = _roots()

    def items(self, target_bytes: int) -> list[Item]:
        """Source files in items of about 2 MB, then package READMEs, then the interpreter's own topics."""
        sources = self._take(path for root in self.roots for path in root.rglob("*.py") if _is_own(path, root))
        metadata = self._take(path for root in self.roots for path in root.glob("*.dist-info/METADATA"))
        items, held, size = [], [], 0
        for path, length in sources:
            held.append((path, length))
            size += length
            if size >= _BYTES_PER_ITEM:
                items.append(_item("code", held))
                held, size = [], 0
        if held:
            items.append(_item("code", held))
        items.append(_item("docs", metadata))
        items.append(Item(("pydoc_data.topics",), 0, "reference"))
        return items

    def read(self, item: Item) -> Iterator[Raw]:
        """The documents of an item; names are relative to their root, so that they agree between machines."""
        if item.stamp.startswith("docs"):
            yield from (document for name in item.paths if (document := self._readme(Path(name))))
        elif item.stamp == "reference":
            yield from _topics()
        else:
            for name in item.paths:
                yield from self._module(Path(name))

    def _take(self, paths: Iterator[Path]) -> list[tuple[Path, int]]:
        by_hash = sorted(paths, key=lambda path: hashlib.sha256(self._relative(path).encode()).digest())
        taken, size = [], 0
        for path in by_hash:
            try:
                length = path.stat().st_size
            except OSError:
                continue
            if not 0 < length <= _MAX_FILE_BYTES:
                continue
            taken.append((path, length))
            size += length
            if size >= self.limit:
                break
        return taken

    def _relative(self, path: Path) -> str:
        root = max((r for r in self.roots if path.is_relative_to(r)), key=lambda r: len(r.parts))
        return str(path.relative_to(root))

    def _readme(self, path: Path) -> Raw | None:
        try:
            body = email.message_from_bytes(path.read_bytes()).get_payload(decode=True)
        except OSError:
            return None
        if not isinstance(body, bytes) or not body.strip():
            return None
        return Raw(body.decode("utf-8", "replace"), "docs", self._relative(path))

    def _module(self, path: Path) -> Iterator[Raw]:
        name = self._relative(path)
        try:
            data = path.read_bytes()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(data)
        except (OSError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
            yield Raw("", "code", name, {"error": str(error)[:200]}, dropped="not_python")
            return
        entries, spans = _docstrings(tree)
        lines: list[str | None] = list(data.decode("utf-8", "replace").splitlines())
        for first, last, stand_in in spans:
            lines[first - 1 : last] = [stand_in, *[None] * (last - first)]
        yield Raw("\n".join(line for line in lines if line is not None), "code", name)
        if entries:
            module = name.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
            yield Raw("\n\n".join([module, *entries]), "reference", f"{name}#docstrings")


def _item(kind: str, files: list[tuple[Path, int]]) -> Item:
    """An item stamped with its kind and each file's size (times differ between equal installations)."""
    sizes = [length for _, length in files]
    return Item(tuple(str(path) for path, _ in files), sum(sizes), f"{kind} {fingerprint(sizes)}")


def _roots() -> list[Path]:
    paths = sysconfig.get_paths()
    return sorted({Path(paths[key]).resolve() for key in ("stdlib", "purelib", "platlib")})


def _is_own(path: Path, root: Path) -> bool:
    """Leave out packages installed below the standard library (another root has them) and caches."""
    below = path.relative_to(root).parts
    return not {"site-packages", "dist-packages", "__pycache__", "lib2to3"} & set(below[:-1])


def _docstrings(tree: ast.Module) -> tuple[list[str], list[tuple[int, int, str | None]]]:
    """The docstrings of a module as "signature, then text"; and the lines they stand on, with what has to stand there instead."""
    entries: list[str] = []
    spans: list[tuple[int, int, str | None]] = []

    def visit(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, prefix: str) -> None:
        own = node.body[0] if node.body else None
        if isinstance(own, ast.Expr) and isinstance(own.value, ast.Constant) and isinstance(own.value.value, str):
            text = ast.get_docstring(node) or ""
            if isinstance(node, ast.Module) or own.lineno > node.lineno:  # not `class A: "text"` on one line
                needs_body = len(node.body) == 1 and not isinstance(node, ast.Module)
                spans.append((own.lineno, own.end_lineno or own.lineno, " " * own.col_offset + "..." if needs_body else None))
            if text:
                entries.append(f"{_heading(node, prefix)}\n{text}" if not isinstance(node, ast.Module) else text)
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                visit(child, f"{prefix}{child.name}.")

    visit(tree, "")
    return entries, spans


def _heading(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, prefix: str) -> str:
    name = prefix.removesuffix(".")
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return f"{name}({', '.join(argument.arg for argument in node.args.args)})"
    return f"class {name}"


def _topics() -> Iterator[Raw]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave the topics out
        return
    for name, text in sorted(topics.items()):
        yield Raw(text, "reference", f"pydoc_data.topics#{name}")
