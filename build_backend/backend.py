"""The PEP 517 backend: that of setuptools, asking also for torch where the kernels have none to be built against."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from sinkhorn_build import build_requirements, require_tools

require_tools()
if not os.access(".", os.W_OK):  # a frontend runs its backend in the source folder
    sys.exit(f"{os.getcwd()} cannot be written, and setuptools builds there: copy it, and install the copy.")
_setuptools: Any = importlib.import_module("setuptools.build_meta")  # only now is it known to be new enough

get_requires_for_build_sdist = _setuptools.get_requires_for_build_sdist
prepare_metadata_for_build_wheel = _setuptools.prepare_metadata_for_build_wheel
prepare_metadata_for_build_editable = _setuptools.prepare_metadata_for_build_editable
build_sdist = _setuptools.build_sdist
build_wheel = _setuptools.build_wheel
build_editable = _setuptools.build_editable


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return [*_setuptools.get_requires_for_build_wheel(config_settings), *build_requirements()]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return [*_setuptools.get_requires_for_build_editable(config_settings), *build_requirements()]
