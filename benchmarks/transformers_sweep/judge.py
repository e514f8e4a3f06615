"""What one small model does with Sinkhorn attention."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.transformers_sweep.shrink import PATCH
from torch_sinkhorn_attn import register_transformers, transformers_report

LENGTH, REAL = 7, 5
FIRST_ID = 10  # of ordinary tokens
PLAIN, MIXED, SOFTMAX, NONE = "sinkhorn", "sinkhorn_mixed", "sinkhorn_softmax", "sinkhorn_none"
_NEITHER = ("input_features", "input_values", "audio_mel", "codebook_idx", "past_values", "noise_embeds", "spectrogram",
            "state", "states", "token_index", "audio_values")  # fmt: skip
_BY_TOKEN = {  # by the mask that pads
    "attention_mask": ("input_ids", "attention_mask", "bbox"),
    "pixel_attention_mask": ("pixel_values", "pixel_attention_mask"),
}
_OUTPUTS = ("last_hidden_state", "encoder_last_hidden_state", "text_embeds", "image_embeds")
Inputs = dict[str, Tensor]


def register() -> None:
    register_transformers(PLAIN)
    register_transformers(MIXED, causal="softmax")
    register_transformers(SOFTMAX, base_iters=0, tail_iters=0)
    register_transformers(NONE, layers=lambda module: False)


def judge(model_class: Any, config: Callable[[], Any]) -> dict[str, Any]:
    """The row of one model: what was measured, or the reason why not, under "error"."""
    row: dict[str, Any] = {"model": model_class.__name__}
    main = getattr(model_class, "main_input_name", "")
    if main in _NEITHER:
        return row | {"error": f"takes {main}: neither text nor pictures"}
    for dtype in (torch.float64, torch.float32):
        try:
            eager = built(model_class, config(), "eager", dtype)
        except Exception as error:
            return row | {"error": f"not built small: {_sentence(error)}"}
        inputs, tried = _accepted(eager, dtype)
        if inputs is not None:
            truth = _outputs(eager, inputs)
            if all(x.isfinite().all() for x in truth.values()):
                break
    if inputs is None:
        return row | {"error": f"no inputs found: {tried}"}
    row |= {"inputs": sorted(inputs), "dtype": str(dtype)}
    row["padded"] = {"eager": _padded_minus_unpadded(eager, inputs, truth)}
    for kind in (PLAIN, MIXED, SOFTMAX, NONE):
        try:
            model = built(model_class, config(), kind, dtype)
        except Exception as error:
            row.setdefault("refused", {})[kind] = _sentence(error)
            continue
        if kind in (PLAIN, MIXED):
            report = transformers_report(model, **inputs)
            row[f"layers {kind}"] = {
                "sinkhorn": len(report.sinkhorn), "softmax": len(report.softmax), "refused": len(report.refused),
                "own": len(report.own), "idle": len(report.idle),
            }  # fmt: skip
            sentences = dict.fromkeys([*report.refused.values()])
            row[f"sentences {kind}"] = list(sentences)
            row[f"own {kind}"] = sorted(set(report.own.values()))
        try:
            found = _outputs(model, inputs)
            if kind != PLAIN:
                row.setdefault("minus eager", {})[kind] = _distance(found, truth, inputs)
            if kind in (PLAIN, MIXED):
                row["padded"][kind] = _padded_minus_unpadded(model, inputs, found)
        except Exception as error:
            row.setdefault("refused", {})[kind] = _sentence(error)
    return row


def built(model_class: Any, config: Any, implementation: str, dtype: torch.dtype) -> Any:
    """The same weights for the same config, whatever the attention."""
    torch.manual_seed(0)
    config._experts_implementation = "eager"  # the default takes no float64
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = model_class._from_config(config, attn_implementation=implementation).to(dtype).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.2
    return model


def _accepted(model: Any, dtype: torch.dtype) -> tuple[Inputs | None, str]:
    """The first of a few sets of inputs that the model runs with, text first."""
    tried: list[str] = []
    for inputs in _candidates(model, model.config, dtype):
        try:
            _outputs(model, inputs)
        except Exception as error:
            tried.append(_sentence(error))
        else:
            return inputs, ""
    return None, " / ".join(dict.fromkeys(x[:120] for x in tried))


def _candidates(model: nn.Module, config: Any, dtype: torch.dtype) -> list[Inputs]:
    takes = inspect.signature(model.forward).parameters
    main = getattr(model, "main_input_name", "")
    ids = torch.arange(2 * LENGTH).view(2, LENGTH) + FIRST_ID
    padding = torch.ones(2, LENGTH, dtype=torch.long)
    padding[1, REAL:] = 0
    text: Inputs = {"input_ids": ids}
    if "attention_mask" in takes:
        text["attention_mask"] = padding
    if "bbox" in takes:
        text["bbox"] = (torch.arange(2 * LENGTH * 4) % 20).view(2, LENGTH, 4).sort(-1).values
    if "visual_feats" in takes:
        text |= {
            "visual_feats": torch.ones(2, 3, config.visual_feat_dim, dtype=dtype),
            "visual_pos": torch.rand(2, 3, 4),
        }
    decoder = {"decoder_input_ids": ids[:, :4] + 20} if "decoder_input_ids" in takes else {}
    pictures = []
    if "pixel_values" in takes:
        pictures = [{"pixel_values": x} for x in _pictures(config, dtype)]
    found: list[Inputs] = []
    if "input_ids" in takes:
        if main != "pixel_values":
            found += [text | decoder, text] if decoder else [text]
        found += [text | decoder | picture for picture in pictures]
    found += [picture | decoder for picture in pictures]
    if "spatial_shapes" in takes and "pixel_attention_mask" in takes:  # of 4 x 4 and of 3 x 4 patches
        patches = torch.rand(2, 16, 3 * getattr(config, "vision_config", config).patch_size ** 2, dtype=dtype)
        mask = (torch.arange(16) < torch.tensor([[16], [12]])).long()
        shapes = torch.tensor([[4, 4], [3, 4]])
        found.append({"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shapes})
    if "grid_thw" in takes:  # two pictures of 4 x 4 patches, one after the other
        size = getattr(config, "patch_size", PATCH) ** 2 * getattr(config, "temporal_patch_size", 1)
        patches = torch.rand(32, size * (getattr(config, "in_channels", None) or 3), dtype=dtype)
        name = "hidden_states" if "hidden_states" in takes else "pixel_values"
        found.append({name: patches, "grid_thw": torch.tensor([[1, 4, 4]] * 2)})
    return found


def _pictures(config: Any, dtype: torch.dtype) -> list[Tensor]:
    visual = getattr(config, "vision_config", None) or getattr(config, "backbone_config", None) or config
    visual = visual if not isinstance(visual, dict) else config
    size = getattr(visual, "image_size", None) or getattr(config, "image_size", None) or 32
    if getattr(config, "backbone_config", None) is not None:
        size = max(size, 256) if isinstance(size, int) else 256  # a backbone leaves a 64th of it
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    channels = getattr(visual, "num_channels", None) or getattr(visual, "in_channels", None) or 3
    channels = channels if isinstance(channels, int) else 3
    generator = torch.Generator().manual_seed(2)
    shapes = [(2, channels, height, width), (2, channels, 64, 64), (2, 2, channels, height, width)]
    return [torch.rand(shape, generator=generator, dtype=dtype) for shape in shapes]


def _outputs(model: Any, inputs: Inputs) -> dict[str, Tensor]:
    torch.manual_seed(3)
    extra = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = model(**{k: v.clone() for k, v in inputs.items()}, **extra)
    named = dict(result.items()) if hasattr(result, "items") else dict(enumerate(result))
    tensors = {str(k): v for k, v in named.items() if isinstance(v, Tensor) and v.is_floating_point() and v.dim() > 1}
    wanted = {k: v for k, v in tensors.items() if k in _OUTPUTS}
    return wanted or dict(list(tensors.items())[:1])


def _alone(inputs: Inputs) -> Inputs:
    """The second element of the batch without its padding."""
    names, _, real = _padding(inputs)
    return {k: v[1:, :real] if k in names else v[len(v) // 2 :] for k, v in inputs.items()}


def _padding(inputs: Inputs) -> tuple[tuple[str, ...], int, int]:
    """The inputs that have a place for each token, of how many tokens, and of how many in the second element."""
    for name, names in _BY_TOKEN.items():
        if name in inputs:
            return names, inputs[name].shape[1], int(inputs[name][1].sum())
    return (), 0, 0


def _padded_minus_unpadded(model: nn.Module, inputs: Inputs, padded: dict[str, Tensor]) -> float:
    """Relative to the outputs' own size."""
    alone = _outputs(model, _alone(inputs))
    return max(
        (
            _relative(_real(padded[k][len(padded[k]) // 2 :], alone[k].shape[1], inputs), alone[k])
            for k in padded
            if k in alone
        ),
        default=0.0,
    )


def _real(x: Tensor, length: int, inputs: Inputs) -> Tensor:
    """Without the tokens that are padding, unless it has the `length` without: outputs have one place for each token,
    or more."""
    _, tokens, real = _padding(inputs)
    return x if x.shape[1] == length or not tokens else torch.cat([x[:, :real], x[:, tokens:]], 1)


def _distance(found: dict[str, Tensor], truth: dict[str, Tensor], inputs: Inputs) -> float:
    _, tokens, _ = _padding(inputs)
    worst = 0.0
    for key, x in truth.items():
        y = found[key]
        pairs = [(y, x)]
        if tokens and x.dim() > 2 and x.shape[1] >= tokens:
            pairs = [(y[:1], x[:1]), (_real(y[1:], 0, inputs), _real(x[1:], 0, inputs))]
        worst = max(worst, *(_relative(a, b) for a, b in pairs))
    return worst


def _relative(x: Tensor, y: Tensor) -> float:
    if x.shape != y.shape:
        return float("inf")
    if not y.numel():
        return 0.0
    return float((x - y).abs().max() / y.abs().max().clamp_min(1e-12))


def _sentence(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
