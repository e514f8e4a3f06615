"""A trained aligner as one small file to ship: safetensors, its settings and training families as JSON in the header.

Nothing in the file is executed on loading, and it holds no optimizer, no history and no path of the machine it was
trained on. A run's checkpoint (``checkpoint.py``) has all of these and goes on training; a release only aligns.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .atomic import replacing
from .checkpoint import load_checkpoint
from .config import Config
from .dataset import identities
from .model import Aligner
from .pairs import Family

SHIPPED = Path(__file__).parent / "data" / "aligner.safetensors"
SUFFIX = ".safetensors"
_FORMAT = "torch_sinkhorn_attn protein aligner, 1"
_PATHS = ("data", "eval_data")


@dataclass(frozen=True)
class TrainedAligner:
    """A model in evaluation mode, its settings, and what it was trained on.

    ``trained_on`` holds the ``identities`` of each training family; empty where they were not recorded.
    """

    model: Aligner
    config: Config
    trained_on: tuple[tuple[str, ...], ...] = ()

    def seen(self, families: Iterable[Family]) -> list[str]:
        """The keys of those ``families`` that it was trained on, as far as is recorded."""
        known = {identity.casefold() for family in self.trained_on for identity in family}
        return [family.key for family in families if identities(family) & known]


def save_release(model: Aligner, config: Config, path: str | Path, trained_on: Sequence[Sequence[str]] = ()) -> Path:
    """Write the model's weights and its settings to ``path``; a file there is replaced whole, or not at all.

    Args:
        trained_on: the ``identities`` of each training family, empty for not recorded.

    Raises:
        ValueError: ``path`` does not end in .safetensors, a weight is not finite, or the weights are not those of
            ``Aligner(config)``.
        OSError: it cannot be written.
    """
    path = Path(path)
    if path.suffix != SUFFIX:
        raise ValueError(f"a released aligner is known by its suffix {SUFFIX}; {path} has another")
    weights = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    broken = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ValueError(f"weights that are not finite cannot be released: {', '.join(broken)}")
    _model(config, weights, path)
    settings = {name: value for name, value in config.to_dict().items() if name not in _PATHS}
    header = {"format": _FORMAT, "config": json.dumps(settings), "trained_on": json.dumps(trained_on)}
    data = save(weights, header)
    with replacing(path) as file:
        file.write(data)
    return path


def load_release(path: str | Path) -> TrainedAligner:
    """The aligner; ``data`` and ``eval_data`` of its settings are the defaults.

    Raises:
        FileNotFoundError: no file there.
        ValueError: it is damaged, something else, or of another version of this example.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no released aligner at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = dict(file.metadata() or {})
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file; it is damaged, or not one ({error})") from error
    if header.get("format") != _FORMAT:
        found = header.get("format", "no format")
        raise ValueError(f"{path} is not a release of this version of the aligner: {found!r} is not {_FORMAT!r}")
    try:
        settings, trained_on = json.loads(header.get("config", "")), json.loads(header.get("trained_on", "[]"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: its settings or its training families are not JSON") from error
    return _aligner(settings, weights, trained_on, path)


def load_aligner(path: str | Path | None = None) -> TrainedAligner:
    """The aligner of a release (.safetensors), a run's folder or its checkpoint file; None is the shipped one.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not readable as one.
    """
    if path is None:
        if not SHIPPED.is_file():
            raise FileNotFoundError(f"{SHIPPED}, the shipped aligner, is missing; give another with --checkpoint")
        return load_release(SHIPPED)
    path = Path(path)
    if path.suffix == SUFFIX and not path.is_dir():
        return load_release(path)
    state = load_checkpoint(path)
    return _aligner(state["config"], state["model"], state.get("trained_on", []), path)


def _aligner(settings: Any, weights: Mapping[str, Tensor], trained_on: Any, path: Path) -> TrainedAligner:
    if not (isinstance(trained_on, list) and all(isinstance(family, list) for family in trained_on)):
        raise ValueError(f"{path} is damaged: its training families are not lists of names")
    config = _config(settings, path)
    return TrainedAligner(_model(config, weights, path), config, tuple(map(tuple, trained_on)))


def _config(settings: Any, path: Path) -> Config:
    try:
        return Config.from_dict(settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} was written by another version of this example ({error})") from error


def _model(config: Config, weights: Mapping[str, Tensor], path: Path) -> Aligner:
    model = Aligner(config)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(f"the weights of {path} do not fit the model of its settings ({reason})") from error
    return model.eval()
