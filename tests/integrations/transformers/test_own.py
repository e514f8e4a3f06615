"""Models of transformers that keep their own attention, wholly or in part; and a few of every kind, as in the sweep."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers as hf
from marks import slow_after
from torch import Tensor

from benchmarks.transformers_sweep import judge, table
from benchmarks.transformers_sweep.__main__ import models
from benchmarks.transformers_sweep.shrink import small
from torch_sinkhorn_attn import register_transformers, transformers_report

D = torch.float64
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TEXT = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
OWN: dict[str, tuple[Any, Any]] = {
    "mpnet": (hf.MPNetModel, hf.MPNetConfig(**TEXT, **SIZES)),
    "rembert": (hf.RemBertModel, hf.RemBertConfig(**TEXT, **SIZES)),
    "roformer": (hf.RoFormerModel, hf.RoFormerConfig(embedding_size=32, **TEXT, **SIZES)),
    "megatron-bert": (hf.MegatronBertModel, hf.MegatronBertConfig(**TEXT, **SIZES)),
    "i-bert": (hf.IBertModel, hf.IBertConfig(**TEXT, **SIZES)),
    "squeezebert": (hf.SqueezeBertModel, hf.SqueezeBertConfig(embedding_size=32, **TEXT, **SIZES)),
    "longformer": (hf.LongformerModel, hf.LongformerConfig(attention_window=4, **TEXT, **SIZES)),
    "luke": (hf.LukeModel, hf.LukeConfig(entity_vocab_size=9, entity_emb_size=32, **TEXT, **SIZES)),
    "tapas": (hf.TapasModel, hf.TapasConfig(**TEXT, **SIZES)),
    "convbert": (hf.ConvBertModel, hf.ConvBertConfig(embedding_size=32, **TEXT, **SIZES)),
    "deberta": (hf.DebertaModel, hf.DebertaConfig(**TEXT, **SIZES)),
    "falcon": (hf.FalconModel, hf.FalconConfig(**TEXT, **SIZES)),
    "gpt-j": (hf.GPTJModel, hf.GPTJConfig(vocab_size=50, n_embd=32, n_layer=2, n_head=4, rotary_dim=4)),
}
IDS = torch.arange(14).view(2, 7) + 4
PADDING = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    judge.register()
    yield


def build(cls: Any, config: Any, implementation: str) -> Any:
    return judge.built(cls, copy.deepcopy(config), implementation, D)


def outputs(model: Any) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return model(IDS, attention_mask=PADDING)[0][1, :5], model(IDS[1:, :5], attention_mask=PADDING[1:, :5])[0][0]


@pytest.mark.parametrize("name", OWN)
def test_models_with_their_own_attention_compute_what_they_did(name: str) -> None:
    cls, config = OWN[name]
    eager = build(cls, config, "eager")
    padded, alone = outputs(eager)
    assert padded.isfinite().all()
    with pytest.warns(UserWarning, match=rf"{cls.__name__} keeps its own attention: it cannot use 'sinkhorn'"):
        model = cls._from_config(copy.deepcopy(config), attn_implementation="sinkhorn")
    assert model.config._attn_implementation in ("eager", "sdpa")
    model.to(D).eval().load_state_dict(eager.state_dict())
    report = transformers_report(model, IDS, attention_mask=PADDING)
    assert report.own and not report.sinkhorn and not report.softmax
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(outputs(model), (padded, alone), strict=True))
    eager.config._attn_implementation_internal = "sinkhorn"  # and if nothing had told the model's config
    assert all(torch.equal(a, b) for a, b in zip(outputs(eager), (padded, alone), strict=True))


def test_vilt_reads_the_mask_as_before() -> None:
    config = hf.ViltConfig(**TEXT, **SIZES, image_size=16, patch_size=8, max_image_length=-1)
    model = build(hf.ViltModel, config, "eager")
    inputs = {"input_ids": IDS, "attention_mask": PADDING, "pixel_values": torch.rand(2, 3, 16, 16, dtype=D)}
    found = []
    for kind in ("eager", "sinkhorn"):
        model.config._attn_implementation_internal = kind
        torch.manual_seed(0)  # it samples patches
        found.append(model(**inputs)[0])
    assert torch.equal(*found)


def test_transformers_own_names_are_as_before() -> None:
    cls, config = OWN["mpnet"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind in ("eager", None):
            assert (
                cls._from_config(copy.deepcopy(config), attn_implementation=kind).config._attn_implementation == "eager"
            )
        with pytest.raises(ValueError, match="nonsense"):
            cls._from_config(copy.deepcopy(config), attn_implementation="nonsense")
        with pytest.raises(ValueError, match="scaled_dot_product_attention"):
            cls._from_config(copy.deepcopy(config), attn_implementation="sdpa")
        hook = hf.PreTrainedModel.get_correct_attn_implementation
        register_transformers("sinkhorn_again")
        assert hf.PreTrainedModel.get_correct_attn_implementation is hook  # wrapped once, however often one registers


SAM = {
    "vision_config": {**SIZES, "output_channels": 32, "image_size": 32, "patch_size": 8, "mlp_dim": 64,
                      "global_attn_indexes": [1], "window_size": 2, "num_pos_feats": 16},
    "prompt_encoder_config": {"hidden_size": 32, "image_size": 32, "patch_size": 8, "mask_input_channels": 4},
    "mask_decoder_config": {"hidden_size": 32, "num_hidden_layers": 2, "mlp_dim": 64, "num_attention_heads": 4,
                            "iou_head_hidden_dim": 32},
}  # fmt: skip


def test_sam_is_built_and_the_report_tells_that_its_encoder_never_asks() -> None:
    """Its vision encoder looks for its attention in a table of its own classes."""
    config = hf.SamConfig(**copy.deepcopy(SAM))
    with pytest.warns(
        UserWarning, match=r"SAM_VISION_ATTENTION_CLASSES has no class for 'sinkhorn_told'.*transformers_report"
    ):
        register_transformers("sinkhorn_told")
        hf.SamModel._from_config(copy.deepcopy(config), attn_implementation="sinkhorn_told")
    model, sdpa = (build(hf.SamModel, config, kind) for kind in ("sinkhorn", "sdpa"))
    inputs = {"pixel_values": torch.rand(1, 3, 32, 32, dtype=D), "input_points": torch.rand(1, 1, 2, 2, dtype=D) * 32}
    report = transformers_report(model, **inputs)
    assert list(report.own) == [f"vision_encoder.layers.{i}.attn" for i in range(2)]
    assert len(report.sinkhorn) == 7 and all(name.startswith("mask_decoder") for name in report.sinkhorn)
    encode = [m.get_image_embeddings(inputs["pixel_values"]) for m in (model, sdpa)]
    assert torch.equal(*encode)
    sdpa.set_attn_implementation("sinkhorn")  # says so, and changes the decoder only
    assert transformers_report(sdpa, **inputs).own.keys() == report.own.keys()


FAMILIES = {  # layers that are Sinkhorn attention, softmax on request, and their own
    "AlbertModel": (1, 0, 0), "BartModel": (2, 4, 0), "BertModel": (2, 0, 0), "BigBirdPegasusModel": (0, 4, 2),
    "CLIPTextModel": (0, 2, 0), "ConditionalDetrModel": (4, 2, 0), "DeiTModel": (2, 0, 0), "EsmModel": (2, 0, 0),
    "GPT2Model": (0, 2, 0), "LayoutLMModel": (2, 0, 0), "MarkupLMModel": (2, 0, 0), "MPNetModel": (0, 0, 2),
    "ModernBertModel": (2, 0, 0), "SiglipVisionModel": (2, 0, 1), "SplinterModel": (2, 0, 0), "SwinModel": (4, 0, 0),
    "T5EncoderModel": (2, 0, 0), "ViTModel": (2, 0, 0), "XLNetModel": (0, 0, 2), "YolosModel": (2, 0, 0),
}  # fmt: skip
CONFIGS = {model: config for _, config, model in models()}


@pytest.mark.parametrize("name", slow_after(6, FAMILIES))
def test_padded_is_unpadded_wherever_eager_attention_says_so(name: str) -> None:
    """All of them: python -m benchmarks.transformers_sweep."""
    row = judge.judge(getattr(hf, name), lambda: small(getattr(hf, CONFIGS[name])))
    layers = row[f"layers {judge.MIXED}"]
    assert (layers["sinkhorn"], layers["softmax"], layers["own"]) == FAMILIES[name]
    assert row["padded"]["eager"] < table.EQUAL and row["padded"][judge.MIXED] < table.EQUAL
    assert not table.faults(row)
    assert (row["minus eager"][judge.MIXED] > 1e-3) == (layers["sinkhorn"] > 0)  # where it is used it is not softmax
    if layers["softmax"] and "Detr" not in name:  # a decoder of objects, where all see all
        assert "is causal" in row["refused"][judge.PLAIN]
    else:
        assert "refused" not in row and row["padded"][judge.PLAIN] < table.EQUAL
