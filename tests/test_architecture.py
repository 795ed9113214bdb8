"""The house stays as it is drawn: imports run one way, names are clean, files are small, recipes ship."""

import ast
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("data_pipeline", "kernels", "launch", "parallel", "pretrain")
GROUND = {"errors", "files", "mpi", "settings", "__version__"}  # the modules beside the rooms, which import no room
ALLOWED = {
    "launch": {"pretrain", "parallel", "kernels", "data_pipeline"} | GROUND,
    "pretrain": {"parallel", "kernels", "data_pipeline"} | GROUND,
    "parallel": {"kernels"} | GROUND,
    "data_pipeline": GROUND,
    "kernels": {"errors", "files"},  # for the files of packed tensors
}
# What may not be imported at the top of any module: optional, compiled or huge.
LATE = {"deepspeed", "megatron", "mpi4py", "fasttext", "lm_eval", "transformers", "triton", "torchao", "tensorboard", "datasets"}
LATE |= {"numba", "fastwarc", "resiliparse", "trafilatura", "py3langid", "ftfy", "fsspec", "fastokens", "aiohttp"}


def sources() -> list[Path]:
    return [p for room in ROOMS for p in (ROOT / room).rglob("*.py")] + sorted((ROOT / "regrowth").glob("*.py"))


def imported(tree: ast.AST) -> set[str]:
    """Every module a piece of code imports, as written; `from regrowth import x` counts as regrowth.x."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {f"regrowth.{a.name}" for a in node.names} if node.module == "regrowth" else {node.module or ""}
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_imports_run_one_way(room: str) -> None:
    for path in (ROOT / room).rglob("*.py"):
        for module in imported(ast.parse(path.read_text())):
            if module.startswith("regrowth."):
                other = module.split(".")[1]
                assert other == room or other in ALLOWED[room], f"{path.relative_to(ROOT)} imports {module}"
            assert module.split(".")[0] not in ROOMS, f"{path.relative_to(ROOT)} imports the bare name {module}"
            if room == "kernels" and not module.startswith("regrowth."):
                assert module.split(".")[0] in {"torch", "triton"} | sys.stdlib_module_names


def test_the_ground_imports_no_room() -> None:
    for path in (ROOT / "regrowth").glob("*.py"):
        if path.name != "__main__.py":
            assert not {m for m in imported(ast.parse(path.read_text())) if m.split(".")[:2] in [["regrowth", r] for r in ROOMS]}


def test_optional_and_huge_packages_are_imported_late() -> None:
    for path in sources():
        tree = ast.parse(path.read_text())
        top = ast.Module([n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)], [])
        # Kernels are compiled from what stands at the top of their modules, which are imported late themselves.
        own = {"triton"} if path.parent.name == "kernels" and path.name.startswith("triton_") else set()
        assert not {m.split(".")[0] for m in imported(top)} & (LATE - own), path
        assert not {m for m in imported(top) if m.startswith("regrowth.kernels.triton_")} or own, path


def test_no_pickle_no_remote_code_no_huge_file() -> None:
    for path in sources():
        text = path.read_text()
        assert "trust_remote_code" not in text and not re.search(r"\bimport pickle|pickle\.load|allow_pickle=True", text), path
        for call in re.findall(r"torch\.load\([^)]*\)", text):
            assert "weights_only=True" in call, path
        assert len(text.splitlines()) <= 600, path


def test_every_module_begins_with_what_it_decides_and_public_names_are_documented() -> None:
    for path in sources():
        tree = ast.parse(path.read_text())
        if tree.body:
            assert ast.get_docstring(tree), f"{path} has no docstring"
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path}: {node.name} has no docstring"


def test_tests_mirror_the_rooms() -> None:
    folders = {p.name for p in (ROOT / "tests").iterdir() if p.is_dir() and not p.name.startswith("__")}
    assert set(ROOMS) <= folders <= {*ROOMS, "conformance", "faults", "slurm"}


def test_only_regrowth_is_importable_and_recipes_ship(tmp_path: Path) -> None:
    """A wheel holds `regrowth` alone, with every room, recipe and template in it."""
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(ROOT)], check=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"regrowth"}
    for path in sources():
        relative = path.relative_to(ROOT)
        assert (str(relative) if relative.parts[0] == "regrowth" else f"regrowth/{relative}") in names
    for shipped in [*(ROOT / "configs").rglob("*.toml"), *(ROOT / "launch").glob("*.jinja"), *(ROOT / "pretrain/report").glob("*.jinja")]:
        assert f"regrowth/{shipped.relative_to(ROOT)}" in names
    code = "import importlib.util as u; print([n for n in ('kernels', 'launch', 'parallel', 'pretrain', 'configs') if u.find_spec(n)])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_launchers_and_configs_do_without_torch() -> None:
    """It takes seconds to import, each of them before the first rank starts."""
    modules = "regrowth.launch.main, regrowth.launch.supervise, regrowth.launch.data, regrowth.data_pipeline.corpora"
    program = f"import sys, {modules}; from regrowth.pretrain.config import load_config; load_config('quickstart'); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
