"""Which layers of a transformers model are Sinkhorn attention, which are softmax, and how one gets to know."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from torch_sinkhorn_attn import choose_layers, register_transformers, sinkhorn_attention, transformers_report
from torch_sinkhorn_attn.integrations.transformers.masks import sinkhorn_mask

D = torch.float64
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TEXT = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIDES = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in
         (("layers", 2), ("attention_heads", 4), ("ffn_dim", 64))} | {"d_model": 32}  # fmt: skip
IDS = torch.arange(14).view(2, 7) + 4
PADDING = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    register_transformers("sinkhorn")
    register_transformers("sinkhorn_mixed", causal="softmax")
    register_transformers("sinkhorn_nowhere", layers=lambda module: False)
    yield


def build(cls: Any, config: Any, implementation: str) -> Any:
    torch.manual_seed(0)
    model = cls._from_config(copy.deepcopy(config), attn_implementation=implementation).to(D).eval()
    for p in model.parameters():
        if p.dim() > 1:
            p.data = torch.randn(p.shape, dtype=D) * 0.2
    return model


LLAMA = hf.LlamaConfig(num_key_value_heads=2, **TEXT, **SIZES)
BERT = hf.BertConfig(**TEXT, **SIZES)
GEMMA = hf.Gemma2Config(num_key_value_heads=2, head_dim=8, sliding_window=4, **TEXT, **SIZES)
SEQ2SEQ: dict[str, tuple[Any, Any, dict[str, Tensor]]] = {
    "bart": (hf.BartForConditionalGeneration, hf.BartConfig(**SIDES, **TEXT, decoder_start_token_id=1),
             {"input_ids": IDS, "attention_mask": PADDING}),
    "t5": (hf.T5ForConditionalGeneration,
           hf.T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=1),
           {"input_ids": IDS, "attention_mask": PADDING}),
    "whisper": (hf.WhisperForConditionalGeneration,
                hf.WhisperConfig(**SIDES, **TEXT, num_mel_bins=4, max_source_positions=6, max_target_positions=20,
                                 decoder_start_token_id=1),
                {"input_features": torch.randn(2, 4, 12, dtype=D, generator=torch.Generator().manual_seed(0))}),
}  # fmt: skip


class Decoder(nn.Module):
    is_causal = True


def attend(module: nn.Module, *args: Any, name: str = "sinkhorn", **kwargs: Any) -> Tensor:
    out: Tensor = hf.AttentionInterface()[name](module, *args, **kwargs)[0].transpose(1, 2)
    return out


SHOWN = torch.ones(1, 1, 6, 6, dtype=torch.bool)
PADDED = SHOWN.clone()
PADDED[..., 4:] = False
BAND = SHOWN.tril(1).triu(-1)
SYMMETRIC = {"everything": SHOWN, "padding": PADDED, "band": BAND, "band and padding": BAND & PADDED}


@pytest.mark.parametrize(
    ("name", "kind"),  # -10000 for single pairs is a bias, which the potentials of a narrow band may take up
    [*((name, kind) for name in SYMMETRIC for kind in ("bool", "float", "-inf")), ("padding", "-1e4")],
)
def test_a_decoder_whose_mask_hides_nothing_of_the_future_is_not_causal(name: str, kind: str) -> None:
    q, k, v = torch.randn(3, 2, 4, 6, 8, dtype=D)
    keep = SYMMETRIC[name]
    low = {"float": torch.finfo(D).min, "-inf": -torch.inf, "-1e4": -1e4}
    mask = keep if kind == "bool" else torch.zeros(keep.shape, dtype=D).masked_fill(~keep, low[kind])
    active = keep.any(-2, keepdim=True)
    truth = sinkhorn_attention(q, k, v, keep & active.transpose(-1, -2))
    for implementation in ("sinkhorn", "sinkhorn_mixed"):
        found = attend(Decoder(), q, k, v, mask, name=implementation)
        assert isinstance(truth, Tensor) and torch.allclose(found, truth, atol=1e-12)


CAUSAL = {
    "flag": (None, {}),
    "mask": (SHOWN.tril(), {}),
    "mask without a flag": (SHOWN.tril(), {"is_causal": False}),
    "window of the past": (SHOWN.tril().triu(-2), {}),
    "prefix": (SHOWN.tril() | (torch.arange(6) < 3), {}),
    "left padding": (SHOWN.tril() & (torch.arange(6) >= 2), {}),
    "right padding": (SHOWN.tril() & (torch.arange(6) < 4), {}),
}


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("name", CAUSAL)
def test_a_causal_mask_is_refused_or_softmax(name: str, kind: str) -> None:
    q, k, v = torch.randn(3, 2, 4, 6, 8, dtype=D)
    keep, flag = CAUSAL[name]
    lowest = torch.finfo(D).min
    mask = keep if keep is None or kind == "bool" else torch.zeros(keep.shape, dtype=D).masked_fill(~keep, lowest)
    with pytest.raises(ValueError, match=r"Decoder is causal.*causal=\"softmax\""):
        attend(Decoder(), q, k, v, mask, **flag)
    truth = nn.functional.scaled_dot_product_attention(q, k, v, SHOWN.tril() if keep is None else keep)
    real = slice(None) if keep is None else keep.any(-1)[0, 0]
    found = attend(Decoder(), q, k, v, mask, name="sinkhorn_mixed", **flag)
    assert torch.allclose(found[:, :, real], truth[:, :, real], atol=1e-12)


def test_steps_beside_a_cache_are_causal() -> None:
    k, v = torch.randn(2, 2, 4, 6, 8, dtype=D)
    for length in (1, 2):
        q = torch.randn(2, 4, length, 8, dtype=D)
        mask = SHOWN.tril()[..., -length:, :]
        with pytest.raises(ValueError, match="Decoder is causal"):
            attend(Decoder(), q, k, v, mask)
        truth = nn.functional.scaled_dot_product_attention(q, k, v, mask)
        assert torch.allclose(attend(Decoder(), q, k, v, mask, name="sinkhorn_mixed"), truth, atol=1e-12)
    one = torch.randn(3, 2, 4, 1, 8, dtype=D)
    for name in ("sinkhorn", "sinkhorn_mixed"):  # the first token of all: itself
        assert torch.allclose(attend(Decoder(), *one, SHOWN[..., :1, :1], name=name), one[2], atol=1e-12)


def test_causal_decoders_are_softmax_on_request() -> None:
    soft_capped = (hf.Gemma2ForCausalLM, GEMMA, "eager")  # which SDPA does not do
    for cls, config, kind in ((hf.LlamaForCausalLM, LLAMA, "sdpa"), soft_capped):
        mixed, own = build(cls, config, "sinkhorn_mixed").float(), build(cls, config, kind).float()
        given = {"input_ids": IDS, "attention_mask": PADDING}
        assert torch.allclose(mixed(**given)[0][PADDING == 1], own(**given)[0][PADDING == 1], atol=1e-6)
        found, truth = (
            m.generate(IDS.flip(1), attention_mask=PADDING.flip(1), max_new_tokens=6, do_sample=False)
            for m in (mixed, own)
        )
        assert torch.equal(found, truth) and found.shape[1] > IDS.shape[1]
    sdpa = build(hf.LlamaForCausalLM, LLAMA, "sdpa")
    llama = build(hf.LlamaForCausalLM, LLAMA, "sinkhorn_mixed")
    assert torch.allclose(llama(IDS, attention_mask=PADDING)[0], sdpa(IDS, attention_mask=PADDING)[0], atol=1e-12)
    padded = build(hf.Gemma2ForCausalLM, GEMMA, "sinkhorn_mixed")(IDS.flip(1), attention_mask=PADDING.flip(1))[0]
    assert padded.isfinite().all()  # also in float64, where Gemma2's own eager attention ends in NaN
    weights = llama(IDS, output_attentions=True).attentions[0]
    eager = build(hf.LlamaForCausalLM, LLAMA, "eager")(IDS, output_attentions=True).attentions[0]
    assert torch.allclose(weights, eager, atol=1e-6)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_caches_of_a_softmax_decoder(cache: str) -> None:
    given = {"attention_mask": PADDING.flip(1), "max_new_tokens": 5, "do_sample": False, "cache_implementation": cache}
    found, truth = (
        build(hf.LlamaForCausalLM, LLAMA, kind).generate(IDS.flip(1), **given) for kind in ("sinkhorn_mixed", "sdpa")
    )
    assert torch.equal(found, truth)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_softmax_decoders_in_half_precision(dtype: torch.dtype) -> None:
    found, truth = (
        build(hf.LlamaForCausalLM, LLAMA, kind).to(dtype)(IDS, attention_mask=PADDING).logits
        for kind in ("sinkhorn_mixed", "sdpa")
    )
    assert torch.equal(found, truth)


@pytest.mark.slow
def test_softmax_decoders_compile_without_graph_breaks() -> None:
    model = build(hf.LlamaForCausalLM, LLAMA, "sinkhorn_mixed")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        found, truth = (m(IDS, attention_mask=PADDING, use_cache=False).logits for m in (compiled, model))
    assert torch.allclose(found, truth, atol=1e-12)


def test_a_decoder_used_in_both_directions_is_sinkhorn() -> None:
    model = build(hf.LlamaModel, LLAMA, "sinkhorn")
    shown = ((PADDING[:, None, :, None] & PADDING[:, None, None, :]) == 1).expand(2, 1, 7, 7)
    out = model(IDS, attention_mask=shown)[0]
    alone = model(IDS[1:, :5], attention_mask=shown[1:, :, :5, :5])[0]
    assert torch.allclose(out[1, :5], alone[0], atol=1e-12)
    assert len(transformers_report(model, IDS, attention_mask=shown).sinkhorn) == 2


def test_fewer_keys_of_the_same_tokens_are_no_cross_attention() -> None:
    """SegFormer's."""

    class Reducing(nn.Module):
        def forward(self, hidden_states: Tensor, height: int, width: int) -> None: ...

    class Either(nn.Module):
        def forward(self, hidden_states: Tensor, key_value_states: Tensor) -> None: ...

    q, (k, v) = torch.randn(2, 4, 6, 8, dtype=D), torch.randn(2, 2, 4, 3, 8, dtype=D)
    truth = {Reducing: sinkhorn_attention(q, k, v), Either: nn.functional.scaled_dot_product_attention(q, k, v)}
    for kind, out in truth.items():
        assert torch.allclose(attend(kind(), q, k, v, name="sinkhorn_mixed"), out, atol=1e-12)


def test_finite_minus_infinities_are_biases_on_request() -> None:
    q, k, v = torch.randn(3, 2, 4, 6, 8, dtype=D)
    mask = torch.zeros(1, 1, 6, 6, dtype=D).masked_fill(~PADDED, -1e4)
    register_transformers("sinkhorn_biased", mask_floor=None)
    truth = sinkhorn_attention(q, k, v)  # the potentials take them up
    assert isinstance(truth, Tensor)
    assert torch.allclose(attend(nn.Module(), q, k, v, mask, name="sinkhorn_biased"), truth, atol=1e-9)
    assert (attend(nn.Module(), q, k, v, mask)[:, :, 4:] == 0).all()


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_encoders_are_sinkhorn_beside_softmax_decoders(name: str) -> None:
    cls, config, inputs = SEQ2SEQ[name]
    mixed, sdpa = (build(cls, config, kind) for kind in ("sinkhorn_mixed", "sdpa"))
    encoded = mixed.get_encoder()(**inputs)
    alone = build(cls, config, "sinkhorn").get_encoder()(**inputs)
    assert torch.equal(encoded[0], alone[0])
    assert (encoded[0] - sdpa.get_encoder()(**inputs)[0]).abs().max() > 1e-3
    mask = {"attention_mask": PADDING} if "attention_mask" in inputs else {}
    given = {"encoder_outputs": encoded, "decoder_input_ids": IDS[:, :4], **mask}
    assert torch.allclose(mixed(**given).logits, sdpa(**given).logits, atol=1e-12)
    found = [mixed.generate(**inputs, max_new_tokens=6, do_sample=False, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*found) and found[0].shape[1] > 2
    report = transformers_report(mixed, **inputs, decoder_input_ids=IDS[:, :4])
    assert len(report.sinkhorn) == 2 and all("encoder" in layer for layer in report.sinkhorn)
    assert sorted(report.softmax.values()) == ["causal"] * 2 + ["cross-attention"] * 2
    assert not report.refused and not report.own and not report.idle


def test_cross_attention_can_be_sinkhorn_but_not_step_by_step() -> None:
    register_transformers("sinkhorn_cross", causal="softmax", cross_attention="sinkhorn")
    cls, config, inputs = SEQ2SEQ["bart"]
    model = build(cls, config, "sinkhorn_cross")
    report = transformers_report(model, **inputs, decoder_input_ids=IDS)
    assert len(report.sinkhorn) == 4 and set(report.softmax.values()) == {"causal"}
    with pytest.raises(ValueError, match=r"one query of a decoder for 7 keys.*cross_attention=\"softmax\""):
        model.generate(**inputs, max_new_tokens=3, do_sample=False)


def test_layers_that_are_not_chosen_are_sdpa() -> None:
    given = {"input_ids": IDS, "attention_mask": PADDING}
    sdpa = build(hf.BertModel, BERT, "sdpa")(**given)[0]
    assert torch.equal(build(hf.BertModel, BERT, "sinkhorn_nowhere")(**given)[0], sdpa)
    second = build(hf.BertModel, BERT, "sinkhorn_nowhere")
    register_transformers("sinkhorn_second", layers=lambda module: module.layer_idx == 1)
    truth = build(hf.BertModel, BERT, "sinkhorn_second")(**given)[0]
    assert (truth - sdpa).abs().max() > 1e-3
    names = choose_layers(second, r"layer\.1\.")  # and this decides before layers=
    assert names == ("encoder.layer.1.attention.self",)
    assert torch.equal(second(**given)[0], truth) and torch.equal(copy.deepcopy(second)(**given)[0], truth)
    report = transformers_report(second)
    assert report.sinkhorn == {names[0]: 1}
    assert report.softmax == {"encoder.layer.0.attention.self": "not chosen by choose_layers"}
    assert choose_layers(second, lambda name, module: isinstance(module, nn.Module))[0].startswith("encoder.layer.0")
    assert choose_layers(second, None) == ()
    assert set(transformers_report(second).softmax.values()) == {"layers says no"}


@pytest.mark.parametrize(
    ("error", "message", "given"),
    [
        (TypeError, "choose_layers needs a model", (3, "a")),
        (TypeError, "layers must be a regular expression", (nn.Linear(1, 1), 3)),
        (ValueError, "is no regular expression", (nn.Linear(1, 1), "(")),
        (ValueError, "chooses no attention of Linear", (nn.Linear(1, 1), "a")),
    ],
)
def test_bad_choices(error: type[Exception], message: str, given: tuple[Any, Any]) -> None:
    with pytest.raises(error, match=message):
        choose_layers(*given)


def test_report_tells_what_each_layer_did() -> None:
    report = transformers_report(build(hf.BertModel, BERT, "sinkhorn"))
    assert report.sinkhorn == {f"encoder.layer.{i}.attention.self": 1 for i in range(2)}
    assert str(report).splitlines()[0] == "encoder.layer.0.attention.self  sinkhorn, 1 call"
    report = transformers_report(build(hf.LlamaForCausalLM, LLAMA, "sinkhorn"))
    assert list(report.refused) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert "refused: LlamaAttention is causal: the only balanced causal plan is the identity" in str(report)
    report = transformers_report(build(hf.BertModel, BERT, "sdpa"))
    assert report.own == {f"encoder.layer.{i}.attention.self": "scaled_dot_product_attention" for i in range(2)}
    assert "never calls it: scaled_dot_product_attention" in str(report)
    config = hf.ViTConfig(**SIZES, image_size=16, patch_size=4)
    assert len(transformers_report(build(hf.ViTModel, config, "sinkhorn").float()).sinkhorn) == 2
    clip = hf.CLIPConfig(text_config={**TEXT, **SIZES}, vision_config={**SIZES, "image_size": 16, "patch_size": 4})
    report = transformers_report(build(hf.CLIPModel, clip, "sinkhorn").text_model, input_ids=IDS)
    assert len(report.refused) == 2
    layers = nn.ModuleList([nn.MultiheadAttention(8, 2), nn.Linear(2, 2)])
    assert str(transformers_report(nn.Sequential(layers[1]), torch.ones(1, 2))) == "Sequential has no attention."
    report = transformers_report(layers[0], *(torch.ones(3, 1, 8),) * 3)
    assert "(the model itself)" in str(report) and list(report.own) == [""]


def test_report_puts_everything_back() -> None:
    model = build(hf.BertModel, BERT, "sinkhorn").train()
    model.encoder.layer[0].eval()
    before = {name: dict(m.__dict__) for name, m in model.named_modules()}
    state, seed = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    compiled = torch.compile(model, backend="eager")
    transformers_report(compiled)
    for name, module in model.named_modules():
        assert module.__dict__ == before[name]
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), seed) and all(p.grad is None for p in model.parameters())
    assert torch.is_grad_enabled()

    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen = nn.Buffer(torch.zeros(()))
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.seen += 1
            self.calls += 1
            raise RuntimeError("stopped")

    counts = Counts()
    with pytest.raises(RuntimeError, match="stopped"):
        transformers_report(counts, torch.ones(1))
    assert counts.seen == 0 and counts.calls == 0 and counts.training and not counts._forward_hooks


def test_report_of_a_model_without_data() -> None:
    with torch.device("meta"):
        model = hf.BertModel(hf.BertConfig(**TEXT, **SIZES, attn_implementation="sinkhorn"))
        report = transformers_report(model, input_ids=torch.zeros(2, 5, dtype=torch.long))
    assert len(report.sinkhorn) == SIZES["num_hidden_layers"]


def test_report_needs_inputs_it_cannot_make_up() -> None:
    with pytest.raises(TypeError, match="transformers_report needs a model, got int"):
        transformers_report(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"WhisperModel needs inputs that cannot be made up.*input_features"):
        transformers_report(build(hf.WhisperModel, SEQ2SEQ["whisper"][1], "sinkhorn"))
    with pytest.raises(ValueError, match="BertModel does not take input_ids alone"):
        transformers_report(build(hf.BertModel, hf.BertConfig(**TEXT, **SIZES, max_position_embeddings=2), "sinkhorn"))


def test_masks_are_eager_s_masks() -> None:
    from transformers.masking_utils import bidirectional_mask_function, eager_mask

    for dtype in (torch.float16, torch.bfloat16, torch.float32, D):
        given = {"batch_size": 2, "q_length": 7, "kv_length": 7, "dtype": dtype, "attention_mask": PADDING == 1}
        for more in ({}, {"mask_function": bidirectional_mask_function, "allow_is_bidirectional_skip": True}):
            found, truth = sinkhorn_mask(**given, **more), eager_mask(**given, **more)
            assert found is not None and found.dtype == dtype and torch.equal(found, truth)
    assert found.stride(-2) == 0  # and takes no L x S memory


def test_a_mask_that_the_model_changes_is_read_again() -> None:
    from transformers.masking_utils import bidirectional_mask_function

    skip = {"mask_function": bidirectional_mask_function, "allow_is_bidirectional_skip": True}
    mask = sinkhorn_mask(batch_size=2, q_length=7, kv_length=7, dtype=D, attention_mask=PADDING == 1, **skip)
    assert mask is not None
    bias = torch.randn(2, 1, 1, 7, dtype=D)
    q, k, v = torch.randn(3, 2, 4, 7, 8, dtype=D)
    register_transformers("sinkhorn_relaxed", relaxation=1.0)
    row = mask[:, :, :1]
    row += bias
    keep = (PADDING == 1)[:, None, None]
    truth = sinkhorn_attention(
        q, k, v, (bias + torch.zeros(7, 1, dtype=D)).masked_fill(~(keep & keep.mT), -torch.inf), relaxation=1.0
    )
    assert isinstance(truth, Tensor)
    assert torch.allclose(attend(nn.Module(), q, k, v, mask, name="sinkhorn_relaxed"), truth, atol=1e-12)
