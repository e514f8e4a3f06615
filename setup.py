"""Builds the package and, where torch and a C++ compiler are at hand, the kernels of csrc/ (engine "cpu").

The kernels are one shared library of torch ops, free of the Python ABI. Its hot translation unit is compiled once for
each instruction set and chosen at run time, so no flag names the machine it is built on. Which torch they are built
against is found by build_backend/sinkhorn_build.py: from 2.10 on, whichever it is, the library serves 2.10 and every
later release; built against 2.9, it serves 2.9 (csrc/tensor_api.h). Without torch or a compiler the package installs
all the same, and says why that engine is missing: here and when it is first missed. Environment:

    TORCH_SINKHORN_ATTN_BUILD_CPU   "0" leaves the kernels out, "1" makes a failure an error (default: try)
    TORCH_SINKHORN_ATTN_SANITIZE    e.g. "address,undefined": instrument them (see `make sanitize`)
    TORCH_SINKHORN_ATTN_PORTABLE    "1" compiles them for the instruction set alone that every such processor has
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_backend"))
from sinkhorn_build import (  # noqa: E402
    BUILD_VARIABLE,
    FLAGS,
    STABLE,
    Torch,
    find_torch,
    instruction_sets,
    manylinux,
    require_tools,
    symbols_needed,
    tell,
    unpromised,
)

require_tools()
from setuptools import Extension, setup  # noqa: E402
from setuptools.command.bdist_wheel import bdist_wheel  # noqa: E402
from setuptools.command.build_ext import build_ext  # noqa: E402

NAME = "torch_sinkhorn_attn.engines._cpu"
MISSING = "_cpu_missing.txt"
RELEASES = "_cpu_torch.txt"  # which releases of torch the library is for
FILES = ("_cpu.so", MISSING, RELEASES)
PORTABLE = os.environ.get("TORCH_SINKHORN_ATTN_PORTABLE", "") == "1"
SETS = instruction_sets("portable" if PORTABLE else platform.machine())
BUILD = os.environ.get(BUILD_VARIABLE, "")
SANITIZE = os.environ.get("TORCH_SINKHORN_ATTN_SANITIZE", "")


class BuildKernels(build_ext):
    """build_ext with flags per translation unit, compiled side by side."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        missing = target.with_name(MISSING)
        for note in (missing, target.with_name(RELEASES)):
            note.unlink(missing_ok=True)
        reason = self._compile(ext, target)
        if reason is None:
            return
        if BUILD == "1":
            raise RuntimeError(f'engine "cpu" was not built: {reason}')
        for leftover in (target, target.with_name(RELEASES)):
            leftover.unlink(missing_ok=True)
        missing.write_text(reason + "\n")
        tell(
            f'warning: engine "cpu" is left out: {reason}. The package works without it, on CPUs many times slower; '
            f"mend that and install again, or set {BUILD_VARIABLE}=1 to make it an error."
        )

    def get_outputs(self) -> list[str]:
        folder = Path(self.build_lib, *NAME.split(".")[:-1])
        return [str(path) for path in (folder / x for x in FILES) if path.exists()]

    def copy_extensions_to_source(self) -> None:
        folder = ROOT.joinpath(*NAME.split(".")[:-1])
        for name in FILES:
            (folder / name).unlink(missing_ok=True)
        for path in self.get_outputs():
            shutil.copy(path, folder)

    def _compile(self, ext: Extension, target: Path) -> str | None:
        """None, or why it could not be built."""
        if BUILD == "0":
            return "the package was built with TORCH_SINKHORN_ATTN_BUILD_CPU=0"
        if self.compiler.compiler_type != "unix":
            return f"the kernels are built with GCC or Clang, not {self.compiler.compiler_type}"
        compiler = self.compiler.compiler_so_cxx or self.compiler.compiler_so
        if compiler[0].startswith("-"):
            return "CXX was set to nothing when the package was built"
        if shutil.which(compiler[0]) is None:
            return f"the C++ compiler {compiler[0]!r} was not found when the package was built"
        torch = find_torch()
        if isinstance(torch, str):
            return f"{torch} when the package was built"
        objects = Path(self.build_temp) / "csrc"
        try:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                built = list(pool.map(lambda unit: self._object(torch, objects, *unit), self._units(ext.sources)))
            self._link(torch, built, target)
            target.with_name(RELEASES).write_text(torch.serves + "\n")
            checked = torch.stable and sys.platform.startswith("linux") and not SANITIZE
            if checked and (found := unpromised(symbols_needed(target), torch)):
                return f"the library needs {', '.join(found)}, which later releases of torch may lack,"
            if not SANITIZE:  # a compiler whose OpenMP is another than torch's shows only now
                load = f"import torch; torch.ops.load_library({str(target.resolve())!r})"
                subprocess.run([sys.executable, "-c", load], env=torch.environment, check=True)
        except Exception as error:  # distutils raises its own
            return f"{type(error).__name__} when the package was built: {error}"
        return None

    @staticmethod
    def _units(sources: list[str]) -> list[tuple[str, str, list[str]]]:
        """(name, source, flags) of every translation unit, the slowest first."""
        kernels = "csrc/kernels.cpp"
        units = [
            (f"kernels_{name}", kernels, [f"-DCPU_CAPABILITY={name}", f"-DCPU_CAPABILITY_{name}", *flags])
            for name, flags in reversed(SETS.items())
        ]
        return units + [(Path(source).stem, source, []) for source in sources if source != kernels]

    def _flags(self, torch: Torch) -> list[str]:
        flags = [*FLAGS, "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized"]
        if "AVX2" in SETS:
            flags.append("-DSINKHORN_X86")
        if torch.stable:
            flags.append("-DTORCH_TARGET_VERSION=0x{:02x}{:02x}000000000000".format(*STABLE))
        elif sys.platform.startswith("linux"):
            flags.append("-fopenmp")  # of at::parallel_for
        if SANITIZE:
            flags += [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1", "-O1"]
        return flags

    def _object(self, torch: Torch, folder: Path, name: str, source: str, flags: list[str]) -> str:
        compiler = self.compiler.compiler_so_cxx or self.compiler.compiler_so
        output = folder / f"{name}.o"
        output.parent.mkdir(parents=True, exist_ok=True)
        headers = [x for path in torch.include for x in ("-isystem", str(path))]
        command = [*compiler, *self._flags(torch), *headers, *flags, "-c", str(ROOT / source), "-o", str(output)]
        self.compiler.spawn(command)
        return str(output)

    def _link(self, torch: Torch, objects: list[str], target: Path) -> None:
        """Without -fopenmp: the OpenMP runtime must be the one torch has loaded, or its thread count would not hold."""
        linker = self.compiler.linker_so_cxx or self.compiler.linker_so
        libraries = [f"-L{torch.libraries}", "-ltorch_cpu", *([] if torch.stable else ["-lc10"])]
        extra = [f"-fsanitize={SANITIZE}"] if SANITIZE else []
        self.compiler.spawn([*linker, *objects, *libraries, *extra, "-o", str(target)])


class PlatformWheel(bdist_wheel):
    """The library needs torch and the platform, not one version of Python; on Linux, what its symbols say."""

    def get_tag(self) -> tuple[str, str, str]:
        system, _, processor = super().get_tag()[2].partition("_")
        library = Path(self.get_finalized_command("build_ext").build_lib, *NAME.split(".")[:-1], "_cpu.so")
        if system == "linux" and library.exists():
            system = manylinux(symbols_needed(library)) or system
        return "py3", "none", f"{system}_{processor}"


sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*.cpp"))
setup(ext_modules=[Extension(NAME, sources)], cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel})
