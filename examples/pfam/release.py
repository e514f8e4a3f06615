"""A trained aligner as one small file to ship: safetensors, its settings and training families as JSON in the header.

Nothing in the file is executed on loading, and it holds no optimizer, no history and no path of the machine it was
trained on. A run's checkpoint (``checkpoint.py``) has all of these and goes on training; a release only aligns.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from examples.common.files import replacing
from examples.common.text import clip, visible

from .checkpoint import load_checkpoint
from .config import Config
from .identity import Known, are_families
from .model import Aligner
from .pairs import Family
from .stockholm import shown
from .verdict import UNFITTED, Verdict

SHIPPED = Path(__file__).parent / "data" / "aligner.safetensors"
SUFFIX = ".safetensors"
_FORMAT = "torch_sinkhorn_attn protein aligner, 4"
_PATHS = ("data", "eval_data")
_TAUGHT = ("trained_on", "profiled_on")
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

Kind = tuple[tuple[int, ...], torch.dtype | None]
"""A weight's shape and type."""


@dataclass(frozen=True)
class TrainedAligner:
    """A model in evaluation mode, its settings, and what it was trained on.

    ``trained_on`` holds the ``identities`` of each training family; empty where they were not recorded. So does
    ``profiled_on``, of the families whose profile HMMs or alignments taught its context profiles. ``verdict`` makes a
    probability of homology of an alignment.
    """

    model: Aligner
    config: Config
    trained_on: tuple[tuple[str, ...], ...] = ()
    verdict: Verdict = UNFITTED
    profiled_on: tuple[tuple[str, ...], ...] = ()

    def digest(self) -> str:
        """Of the weights and the settings: two that align alike have the same."""
        settings = {name: value for name, value in self.config.to_dict().items() if name not in _PATHS}
        found = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            found.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        found.update(json.dumps(self.verdict.to_list()).encode())
        return found.hexdigest()

    def seen(self, families: Iterable[Family]) -> list[str]:
        """The keys of those ``families`` that it was, or may have been, trained on, as far as is recorded."""
        return Known(self.trained_on).among(families)

    def profiled(self, families: Iterable[Family]) -> list[str]:
        """The keys of those that taught its context profiles, or may have, as far as is recorded."""
        return Known(self.profiled_on).among(families)


def with_hmms(aligner: TrainedAligner, gaps: str | None = None, kin: str | None = None) -> TrainedAligner:
    """The same weights over other pair HMMs: with the costs of ``runs.BEGINNINGS[gaps]``, for the relatives of
    ``runs.RELATIVES[kin]``; None for those trained with.

    Raises:
        ValueError: it has no pair HMM.
    """
    if aligner.model.runs is None:
        raise ValueError(f"an aligner with --gaps single has no pair HMM that gaps={gaps} and kin={kin} could change")
    config = replace(aligner.config, gaps=gaps or aligner.config.gaps, kin=kin or aligner.config.kin)
    model = Aligner(config, loaded=True)
    model.load_state_dict(aligner.model.state_dict())
    return replace(aligner, model=model.eval(), config=config)


def save_release(
    model: Aligner,
    config: Config,
    path: str | Path,
    trained_on: Sequence[Sequence[str]] = (),
    verdict: Verdict = UNFITTED,
    profiled_on: Sequence[Sequence[str]] = (),
) -> Path:
    """Write the model's weights and its settings to ``path``; a file there is replaced whole, or not at all.

    Args:
        trained_on: the ``identities`` of each training family, empty for not recorded.
        verdict: fitted on families that are not among them.
        profiled_on: the ``identities`` of each family that taught its context profiles, likewise.

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
    header |= {"verdict": json.dumps(verdict.to_list()), "profiled_on": json.dumps(profiled_on)}
    data = save(weights, header)
    with replacing(path) as file:
        file.write(data)
    return path


def load_release(path: str | Path) -> TrainedAligner:
    """The aligner; ``data`` and ``eval_data`` of its settings are the defaults, whatever stands there.

    The file may come from anywhere. Its settings have bounds, those of ``Config``, and no weight is read before its
    name, shape and type are what the settings make of them.

    Raises:
        FileNotFoundError: no file there.
        ValueError: it is damaged, something else, or of another version of this example.
    """
    path = Path(path)
    if not os.path.isfile(path):  # a name that no file system takes is none either
        raise FileNotFoundError(f"no released aligner at {shown(path)}")
    try:
        with safe_open(path, framework="pt") as file:
            header = dict(file.metadata() or {})
            if header.get("format") != _FORMAT:
                found = clip(header.get("format", "no format"))
                raise ValueError(
                    f"{shown(path)} is not a release of this version of the aligner: {found!r} is not {_FORMAT!r}"
                )
            settings, taught = _parsed(header, path)
            config = _config(settings, path)
            described = {}
            for name in file.keys():  # noqa: SIM118
                described[name] = file.get_slice(name)
            _check_fit(
                {name: (tuple(part.get_shape()), _DTYPES.get(part.get_dtype())) for name, part in described.items()},
                _expected(config),
                path,
            )
            weights = {name: file.get_tensor(name) for name in described}
    except SafetensorError as error:
        reason = clip(visible(str(error)), 200)
        raise ValueError(
            f"{shown(path)} is not a readable safetensors file; it is damaged, or not one ({reason})"
        ) from error
    return replace(_aligner(config, weights, taught, path), verdict=_verdict(header, path))


def _verdict(header: Mapping[str, str], path: Path) -> Verdict:
    if "verdict" not in header:
        warnings.warn(
            f"{shown(path)} holds no verdict: probabilities of homology are the pair HMM's own odds, which say too "
            "much; release it again with --calibrate",
            stacklevel=3,
        )
        return UNFITTED
    try:
        return Verdict.from_list(json.loads(header["verdict"]))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{shown(path)} is damaged: its verdict is not that of an aligner") from error


def _parsed(header: Mapping[str, str], path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings without paths, and the families of ``_TAUGHT``."""
    try:
        settings = json.loads(header.get("config", ""))
        taught = {name: json.loads(header.get(name, "[]")) for name in _TAUGHT}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{shown(path)} is damaged: its settings or its training families are not JSON") from error
    if isinstance(settings, dict):
        settings = {name: value for name, value in settings.items() if name not in _PATHS}
    return settings, taught


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
    if not str(path):
        raise ValueError("the aligner's path is empty; give a release or a run's folder, or none for the shipped one")
    path = Path(path)
    if path.suffix == SUFFIX and not os.path.isdir(path):
        return load_release(path)
    state = load_checkpoint(path)
    taught = {name: state.get(name, []) for name in _TAUGHT}
    return _aligner(_config(state["config"], path), state["model"], taught, path)


def _aligner(config: Config, weights: Any, taught: Mapping[str, Any], path: Path) -> TrainedAligner:
    for families in taught.values():
        if not are_families(families):
            raise ValueError(f"{shown(path)} is damaged: its training families are not lists of names")
    trained_on, profiled_on = (tuple(map(tuple, taught[name])) for name in _TAUGHT)
    return TrainedAligner(_model(config, weights, path), config, trained_on, profiled_on=profiled_on)


def _config(settings: Any, path: Path) -> Config:
    try:
        return Config.from_dict(settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{shown(path)} was written by another version of this example ({error})") from error


def _expected(config: Config) -> dict[str, Kind]:
    """Shape and type of every weight; nothing is allocated."""
    with torch.device("meta"):
        return _kinds(Aligner(config, loaded=True).state_dict())


def _kinds(weights: Mapping[str, Tensor]) -> dict[str, Kind]:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in weights.items()}


def _check_fit(found: Mapping[str, Kind], expected: Mapping[str, Kind], path: Path) -> None:
    """Raise ValueError unless names, shapes and types are the same."""
    reasons = [f"{name} is missing" for name in expected if name not in found]
    reasons += [f"unknown weight {clip(visible(name))}" for name in found if name not in expected]
    for name, (shape, dtype) in expected.items():
        if name in found and found[name] != (shape, dtype):
            kind = "size" if found[name][0] != shape else "type"
            reasons.append(f"{kind} mismatch of {name}: {clip(str(found[name]))} is not {(shape, dtype)}")
    if reasons:
        raise ValueError(f"the weights of {shown(path)} do not fit the model of its settings ({reasons[0]})")


def _model(config: Config, weights: Any, path: Path) -> Aligner:
    if not (isinstance(weights, Mapping) and all(isinstance(tensor, Tensor) for tensor in weights.values())):
        raise ValueError(f"the weights of {shown(path)} are not tensors by their names")
    _check_fit(_kinds(weights), _expected(config), path)
    broken = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ValueError(f"weights of {shown(path)} are not finite, as of a run that diverged: {', '.join(broken)}")
    model = Aligner(config, loaded=True)
    model.load_state_dict(weights)
    return model.eval()
