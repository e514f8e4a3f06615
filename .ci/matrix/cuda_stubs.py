"""Make a torch that was installed without its CUDA libraries importable on a machine that has no use for them.

    python -m pip install --no-deps torch==2.14.1
    python cuda_stubs.py FOLDER_OF_TORCH

The big wheel of torch loads CUDA's libraries at import: some 3 GB that tests on a CPU never call. This puts a stub in
place of each that torch's own libraries name and the environment lacks: its functions are those that torch asks for,
under the versions it asks for, and all of them answer "no device" (100). torch.cuda.is_available() is then False.
Needs a C compiler, nm and readelf (Linux). For tests only.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

SYSTEM = re.compile(r"(ld-linux.*|lib(c|m|dl|rt|pthread|gcc_s|stdc\+\+|gomp))\.so\.\d+$")

OF_CUDA = re.compile(r"(cu|nccl|nv)[A-Za-z]*")


def output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def symbols(kind: str, library: Path) -> list[tuple[str, str]]:
    """(name, version or "") of those it defines or lacks."""
    lines = output("nm", "-D", f"--{kind}-only", "--format=posix", str(library)).splitlines()
    names = (line.split()[0] for line in lines)
    return [(name.split("@")[0], name.split("@")[-1] if "@" in name else "") for name in names]


def missing(libraries: list[Path]) -> set[str]:
    """Libraries that they name and that are neither the system's nor among them."""
    dynamic = "".join(output("readelf", "-d", str(library)) for library in libraries)
    named = set(re.findall(r"NEEDED.*\[(.*)\]", dynamic))
    return {name for name in named if not SYSTEM.match(name)} - {library.name for library in libraries}


def owners(libraries: list[Path]) -> dict[str, str]:
    """Which library each version of a symbol is of."""
    found = {}
    for library in libraries:
        owner = ""
        for line in output("readelf", "-VW", str(library)).splitlines():
            if file := re.search(r"File: (\S+)", line):
                owner = file[1]
            elif name := re.search(r"Name: (\S+)\s+Flags", line):
                found[name[1]] = owner
    return found


def build(folder: Path, soname: str, wanted: dict[str, set[str]]) -> None:
    """A library of functions, by version."""
    with tempfile.TemporaryDirectory() as scratch:
        source, script = Path(scratch, "stub.c"), Path(scratch, "stub.map")
        names = sorted(set().union(*wanted.values()))
        source.write_text("".join(f"int {name}(void) {{ return 100; }}\n" for name in names))
        nodes = [f"{version} {{ global: {'; '.join(sorted(x))}; }};\n" for version, x in wanted.items() if version]
        script.write_text("".join(nodes))
        versions = [f"-Wl,--version-script={script}"] if nodes else []
        command = ["cc", "-shared", "-fPIC", "-w", "-O1", f"-Wl,-soname,{soname}", *versions, str(source)]
        subprocess.run([*command, "-o", str(folder / soname)], check=True)


def main(torch: Path) -> None:
    folder = torch / "lib"
    libraries = sorted(folder.glob("*.so*"))
    defined = {name for library in libraries for name, _ in symbols("defined", library)}
    lacked = {x for library in libraries for x in symbols("undefined", library) if x[0] not in defined}
    owner = owners(libraries)
    stubs: dict[str, dict[str, set[str]]] = {name: defaultdict(set) for name in sorted(missing(libraries))}
    for name, version in lacked:
        if owner.get(version) in stubs:
            stubs[owner[version]][version].add(name)
    loose = {name for name, version in lacked if not version and OF_CUDA.match(name)}  # found in whichever is loaded
    for soname, wanted in stubs.items():
        build(folder, soname, wanted or {"": loose})
    print(f"{len(stubs)} stubs in {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
