"""Which modules of ours a module needs, read from its source: everything it imports at any depth, inside functions too."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def imported_by(module: Path) -> set[Path]:
    """The files of `stages` that a file's own import statements name, relative to the repository."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    files = {Path(*name.split(".")).with_suffix(".py") for name in names if name.split(".")[0] == "stages"}
    return {file for file in files if (ROOT / file).is_file()}


def needed_by(module: Path) -> set[Path]:
    """A file and all that it imports, directly or not."""
    needed, waiting = set(), [module]
    while waiting:
        file = waiting.pop()
        if file not in needed:
            needed.add(file)
            waiting.extend(imported_by(file))
    return needed


def all_modules() -> list[Path]:
    """Every module under stages/, relative to the repository."""
    return sorted(path.relative_to(ROOT) for path in (ROOT / "stages").rglob("*.py"))
