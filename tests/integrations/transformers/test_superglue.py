"""SuperGlue of transformers with our loop: the same matches, in every way one runs, copies and saves a model."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from transformers.models.superglue import modeling_superglue

from torch_sinkhorn_attn import replace_superglue, restore_superglue

ROOT = ("(the model itself)",)
DETECTOR = {"model_type": "superpoint", "encoder_hidden_sizes": [8] * 4, "decoder_hidden_size": 16,
            "descriptor_decoder_dim": 32, "keypoint_threshold": 0.0, "max_keypoints": 40,
            "border_removal_distance": 1}  # fmt: skip
SIZES = {"hidden_size": 32, "keypoint_encoder_sizes": [8, 16], "gnn_layers_types": ["self", "cross"]}
LOOP = modeling_superglue.log_optimal_transport


def superglue(**options: Any) -> Any:
    torch.manual_seed(0)
    config = hf.SuperGlueConfig(keypoint_detector_config=dict(DETECTOR), **SIZES, **options)
    model = hf.SuperGlueForKeypointMatching(config).eval()
    for p in model.parameters():
        if p.dim() > 1:
            p.data = torch.randn_like(p) * 0.1
    found: list[Tensor] = []
    with model.final_projection.register_forward_hook(lambda _, __, out: found.append(out)), torch.no_grad():
        model._match_image_pair(**keypoints(torch.float32, False))
    for p in model.final_projection.parameters():  # scores of the size that trained models have
        p.data *= 1.7 / found[0].std()
    return model


@pytest.fixture(autouse=True)
def _nothing_else_changed() -> Iterator[None]:
    yield
    assert modeling_superglue.log_optimal_transport is LOOP


def pictures(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(2, 2, 1, 48, 40, generator=torch.Generator().manual_seed(1)).to(dtype)


def keypoints(dtype: torch.dtype, padded: bool) -> dict[str, Any]:
    """What the matcher gets of 12 keypoints in two pairs of images."""
    g = torch.Generator().manual_seed(2)
    mask = torch.ones(2, 2, 12, dtype=torch.int)
    if padded:
        mask[0, 1, 9:] = mask[1, 0, 7:] = mask[1, 1, 11:] = 0
    found = {"keypoints": torch.rand(2, 2, 12, 2, generator=g) * 40, "scores": torch.rand(2, 2, 12, generator=g),
             "descriptors": torch.randn(2, 2, 12, 32, generator=g)}  # fmt: skip
    return {k: x.to(dtype) for k, x in found.items()} | {"height": 48, "width": 40, "mask": mask}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("iterations", [2, 100])
@pytest.mark.parametrize("padded", [False, True])
def test_matches_and_their_scores_are_the_model_s_own(padded: bool, iterations: int, dtype: torch.dtype) -> None:
    model = superglue(sinkhorn_iterations=iterations).to(dtype)
    given = keypoints(dtype, padded)
    with torch.no_grad():
        before = model._match_image_pair(**given)
        assert replace_superglue(model) == ROOT
        after = model._match_image_pair(**given)
    assert (before[0] >= 0).any() and torch.equal(after[0], before[0])
    assert after[1].dtype == dtype
    assert torch.allclose(after[1], before[1], atol=1e-10 if dtype == torch.float64 else 1e-5)


def test_the_whole_model_and_back() -> None:
    model, given = superglue(), pictures()
    with torch.no_grad():
        before = model(given, output_attentions=True, output_hidden_states=True)
        replace_superglue(model)
        after = model(given, output_attentions=True, output_hidden_states=True)
        assert restore_superglue(model) == ROOT
        again = model(given)
    assert type(model) is hf.SuperGlueForKeypointMatching and torch.equal(again.matches, before.matches)
    assert torch.equal(after.matches, before.matches) and (before.matches >= 0).sum() > 20
    assert torch.allclose(after.matching_scores, before.matching_scores, atol=1e-5)
    assert len(after.attentions) == len(before.attentions) and len(after.hidden_states) == len(before.hidden_states)


def test_gradients_are_those_of_the_loop() -> None:
    model = superglue(sinkhorn_iterations=20).double()
    given = keypoints(torch.float64, True)

    def gradients() -> list[Tensor]:
        total = model._match_image_pair(**given)[1].square().sum()
        leaves = [model.bin_score, *model.final_projection.parameters(), *model.gnn.parameters()]
        return [x for x in torch.autograd.grad(total, leaves, allow_unused=True) if x is not None]

    before = gradients()
    replace_superglue(model)
    assert len(before) > 10 and before[0].abs() > 1e-6
    for found, wanted in zip(gradients(), before, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-8, atol=1e-10)


def test_copies_files_and_saved_models(tmp_path: Path) -> None:
    model, given = superglue(), pictures()
    replace_superglue(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    with torch.no_grad():
        truth = model(given).matches
        for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
            assert replace_superglue(other) == () and torch.equal(other(given).matches, truth)
            assert restore_superglue(other) == ROOT
    model.save_pretrained(tmp_path)
    assert '"SuperGlueForKeypointMatching"' in (tmp_path / "config.json").read_text()
    fresh = hf.SuperGlueForKeypointMatching.from_pretrained(tmp_path).eval()
    assert type(fresh) is hf.SuperGlueForKeypointMatching and replace_superglue(fresh) == ROOT
    with torch.no_grad():
        assert torch.equal(fresh(given).matches, truth)


@pytest.mark.slow
def test_torch_compile_takes_the_matcher() -> None:
    model, given = superglue(), keypoints(torch.float32, True)
    with torch.no_grad():
        before = model._match_image_pair(**given)
        replace_superglue(model)
        after = torch.compile(model._match_image_pair, backend="eager")(**given)
    assert torch.equal(after[0], before[0]) and torch.allclose(after[1], before[1], atol=1e-5)


def test_lightglue_has_no_such_loop() -> None:
    config = hf.LightGlueConfig(keypoint_detector_config=dict(DETECTOR), descriptor_dim=32, num_hidden_layers=1,
                                num_attention_heads=4)  # fmt: skip
    with pytest.raises(ValueError, match="LightGlueForKeypointMatching has no SuperGlue loop"):
        replace_superglue(hf.LightGlueForKeypointMatching(config))
