"""Make a project of Hugging Face's kernel-builder out of this repository: `python hub/assemble.py [FOLDER]`.

It holds what is here and, as its entry module, the package itself. A kernel is imported by a name that is its build's
own, from a folder on no path, so its modules import one another relatively; that is all that is changed in them.
"""

from __future__ import annotations

import ast
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "torch_sinkhorn_attn"
PROJECT = ("build.toml", "flake.nix")
NOT_CARRIED = ("aot", "_ops.py")  # a command-line tool; what kernel-builder writes itself


def assemble(folder: Path) -> None:
    """Write the project to a folder, in place of one that it wrote there before.

    Raises:
        ValueError: there is something in the folder, and it is no such project.
    """
    entry = folder / "torch-ext" / PACKAGE
    if folder.exists() and any(folder.iterdir()) and not entry.exists():
        raise ValueError(f"{folder} holds something else than a kernel's project: give an empty folder, or a new one.")
    shutil.rmtree(entry, ignore_errors=True)
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        name = path.relative_to(ROOT / PACKAGE)
        if name.parts[0] not in NOT_CARRIED:
            target = entry / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(relative(path.read_text(encoding="utf-8"), len(name.parts)), encoding="utf-8")
    for file in PROJECT:
        shutil.copy(ROOT / "hub" / file, folder / file)


def relative(source: str, dots: int) -> str:
    """A module's source with its imports of the package made relative, `dots` levels up.

    >>> relative("from torch_sinkhorn_attn.engines import tiled\\n", 2)
    'from ..engines import tiled\\n'
    """
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == PACKAGE:
            at = node.lineno - 1
            lines[at] = re.sub(rf"from {PACKAGE}\.?", "from " + "." * dots, lines[at], count=1)
    return "".join(lines)


if __name__ == "__main__":
    made = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build/hub"
    try:
        assemble(made)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"made {made}; next: cd {made} && kernel-builder build")
