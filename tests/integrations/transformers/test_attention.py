"""Hugging Face transformers: real architectures built from small configs, with `attn_implementation` as registered."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from torch_sinkhorn_attn import Dustbin, register_transformers, sinkhorn_attention
from torch_sinkhorn_attn.integrations.transformers import attention as integration
from torch_sinkhorn_attn.integrations.transformers.layers import is_self_attention
from torch_sinkhorn_attn.integrations.transformers.masks import sinkhorn_mask

D = torch.float64
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TEXT = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
T5 = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
BART = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in
        (("layers", 2), ("attention_heads", 4), ("ffn_dim", 64))} | {"d_model": 32, **TEXT}  # fmt: skip
MODELS: dict[str, tuple[Any, Callable[[], Any]]] = {
    "bert": (hf.BertModel, lambda: hf.BertConfig(initializer_range=0.2, **TEXT, **SIZES)),
    "grouped queries": (
        hf.EuroBertModel,
        lambda: hf.EuroBertConfig(mask_token_id=3, num_key_value_heads=2, **TEXT, **SIZES),
    ),
    "sliding windows": (
        hf.ModernBertModel,
        lambda: hf.ModernBertConfig(local_attention=4, cls_token_id=1, sep_token_id=2, **TEXT, **SIZES),
    ),
    "position bias": (hf.T5EncoderModel, lambda: hf.T5Config(**T5)),
    "position bias in every layer": (hf.UMT5EncoderModel, lambda: hf.UMT5Config(**T5)),
    "proteins": (
        hf.EsmModel,
        lambda: hf.EsmConfig(position_embedding_type="rotary", mask_token_id=3, initializer_range=0.2, **TEXT, **SIZES),
    ),
}
ENCODERS = pytest.mark.parametrize("name", MODELS)
IDS = torch.arange(14).view(2, 7) + 4
PADDING = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    register_transformers("sinkhorn")
    register_transformers("sinkhorn_softmax", base_iters=0, tail_iters=0)
    register_transformers("sinkhorn_dustbin", dustbin=Dustbin(0.5, 0.0))
    yield


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The queries of every call that reached Sinkhorn attention."""
    seen: list[Tensor] = []
    monkeypatch.setattr(
        integration, "sinkhorn_attention", lambda *a, **k: seen.append(a[0]) or sinkhorn_attention(*a, **k)
    )
    return seen


def build(cls: Any, config: Any, implementation: str) -> Any:
    torch.manual_seed(0)
    config._attn_implementation = implementation
    return cls(config).to(D).eval()


def encoder(name: str, implementation: str) -> Any:
    cls, config = MODELS[name]
    return build(cls, config(), implementation)


@ENCODERS
def test_softmax_is_sdpa(name: str, calls: list[Tensor]) -> None:
    inputs = {"input_ids": IDS, "attention_mask": PADDING}
    truth = encoder(name, "sdpa")(**inputs)[0]
    assert not calls
    found = encoder(name, "sinkhorn_softmax")(**inputs)[0]
    assert len(calls) == 2 and torch.allclose(found, truth, atol=1e-12)


LEFT = [(name, True) for name in ("grouped queries", "sliding windows")]  # these are told their positions


@pytest.mark.parametrize(("name", "left"), [*((name, False) for name in MODELS), *LEFT])
def test_padded_is_unpadded(name: str, left: bool, calls: list[Tensor]) -> None:
    model = encoder(name, "sinkhorn")
    ids, padding = (IDS.flip(1), PADDING.flip(1)) if left else (IDS, PADDING)
    positions = {"position_ids": torch.tensor([[0, 1, 2, 3, 4, 5, 6], [0, 0, 0, 1, 2, 3, 4]])} if left else {}
    out = model(input_ids=ids, attention_mask=padding, **positions)[0]
    own = ids[1, 2:] if left else ids[1, :5]
    alone = model(input_ids=own[None])[0]
    assert len(calls) == 4
    assert torch.allclose(out[1, 2:] if left else out[1, :5], alone[0], atol=1e-12)
    sdpa = encoder(name, "sdpa")(input_ids=own[None])[0]
    assert (alone - sdpa).abs().max() > 1e-4  # and it is not softmax


@ENCODERS
def test_padding_takes_no_mass(name: str) -> None:
    model = encoder(name, "sinkhorn")
    other = IDS.clone()
    other[1, 5:] = 40
    out, changed = (model(input_ids=x, attention_mask=PADDING)[0] for x in (IDS, other))
    assert torch.equal(out[0], changed[0]) and torch.allclose(out[1, :5], changed[1, :5], atol=1e-13)


def test_padding_alone_takes_no_square_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    masks: list[Any] = []
    monkeypatch.setattr(
        integration, "sinkhorn_attention", lambda *a, **k: masks.append(a[3]) or sinkhorn_attention(*a, **k)
    )
    encoder("bert", "sinkhorn")(input_ids=IDS, attention_mask=PADDING)
    assert masks == [None, None]


@pytest.mark.parametrize("name", ["bert", "sliding windows", "position bias"])
def test_inference_mode_changes_nothing(name: str) -> None:
    model = encoder(name, "sinkhorn")
    with torch.no_grad():
        truth = model(input_ids=IDS, attention_mask=PADDING)[0]
    with torch.inference_mode():
        assert torch.equal(model(input_ids=IDS, attention_mask=PADDING)[0], truth)


def test_bert_trains() -> None:
    torch.manual_seed(0)
    config = hf.BertConfig(**TEXT, **SIZES, attn_implementation="sinkhorn")
    model = hf.BertForMaskedLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = model(input_ids=IDS, attention_mask=PADDING, labels=IDS.masked_fill(PADDING == 0, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert model.bert.encoder.layer[0].attention.self.query.weight.grad.abs().max() > 0
    assert losses[-1] < 0.7 * losses[0]


def test_position_biases_and_a_dustbin_of_parameters_learn() -> None:
    score = nn.Parameter(torch.zeros(4, 1, dtype=D))
    register_transformers("sinkhorn_learned", dustbin=Dustbin(score, score))
    model = encoder("position bias", "sinkhorn_learned")
    model(input_ids=IDS, attention_mask=PADDING)[0].sin().sum().backward()
    bias = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    assert score.grad is not None and score.grad.abs().min() > 0
    assert bias.grad.isfinite().all() and bias.grad.abs().max() > 0


def test_gradient_checkpointing() -> None:
    gradients = []
    for checkpointed in (False, True):
        model = encoder("bert", "sinkhorn").train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if checkpointed:
            model.gradient_checkpointing_enable()
        model(input_ids=IDS, attention_mask=PADDING)[0][PADDING == 1].sin().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*gradients, strict=True))


def test_vision_encoder_runs_and_trains(calls: list[Tensor]) -> None:
    config = {"image_size": 16, "patch_size": 4, **SIZES}
    images = torch.rand(4, 3, 16, 16, dtype=D)
    sdpa, softmax, sinkhorn = (
        build(hf.ViTModel, hf.ViTConfig(**config), kind)(images)[0] for kind in ("sdpa", "sinkhorn_softmax", "sinkhorn")
    )
    assert torch.allclose(softmax, sdpa, atol=1e-12) and (sinkhorn - sdpa).abs().max() > 1e-5
    labels, rate, predicted = torch.tensor([0, 1, 1, 0]), 1e-3, 0.0
    config |= {"num_labels": 2, "attn_implementation": "sinkhorn"}
    model = hf.ViTForImageClassification(hf.ViTConfig(**config)).train().to(D)
    calls.clear()
    losses = []
    for step in range(10):  # each lowers the loss by what its gradient foretells, to first order
        loss = model(images, labels=labels).loss
        losses.append(loss.item())
        if step:
            assert losses[-2] - losses[-1] == pytest.approx(predicted, rel=0.1)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        predicted = rate * sum(float(g.square().sum()) for g in gradients)
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter -= rate * gradient
    assert len(calls) == 20


def test_models_that_do_not_say_whether_they_are_causal_are_not() -> None:
    config = {**TEXT, **SIZES, "initializer_range": 0.2}
    eager = build(hf.SplinterModel, hf.SplinterConfig(**config), "eager")
    assert not hasattr(eager.encoder.layer[0].attention.self, "is_causal")
    for mask in (None, torch.ones_like(IDS), PADDING):
        truth = eager(input_ids=IDS, attention_mask=mask)[0]
        softmax = build(hf.SplinterModel, hf.SplinterConfig(**config), "sinkhorn_softmax")
        assert torch.allclose(softmax(input_ids=IDS, attention_mask=mask)[0], truth, atol=1e-5)  # eager is in float32
    sinkhorn = build(hf.SplinterModel, hf.SplinterConfig(**config), "sinkhorn")
    assert (sinkhorn(input_ids=IDS)[0] - eager(input_ids=IDS)[0]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["bert", "position bias"])
@pytest.mark.parametrize(
    ("dtype", "low"),
    [(D, -torch.inf), (D, torch.finfo(D).min), (D, torch.finfo(torch.float32).min),
     (torch.float32, torch.finfo(torch.float32).min), (torch.float16, torch.finfo(torch.float16).min)],
    ids=str,
)  # fmt: skip
def test_float_masks_forbid_as_bool_masks_do(name: str, dtype: torch.dtype, low: float) -> None:
    model = encoder(name, "sinkhorn").float()
    keep = (PADDING == 1)[:, None, None, :].expand(2, 1, 7, 7)
    mask = torch.zeros(keep.shape, dtype=dtype).masked_fill(~keep, low)
    truth, found = (model(input_ids=IDS, attention_mask=m)[0] for m in (PADDING, mask))
    assert torch.allclose(found[PADDING == 1], truth[PADDING == 1], atol=1e-5)


def test_float_masks_are_added() -> None:
    mask = torch.randn(2, 1, 7, 7, dtype=D, generator=torch.Generator().manual_seed(0))
    for name in ("bert", "position bias"):
        found, truth = (
            encoder(name, kind)(input_ids=IDS, attention_mask=mask)[0] for kind in ("sinkhorn_softmax", "sdpa")
        )
        assert torch.allclose(found, truth, atol=1e-12)


def test_dropout_in_training_only() -> None:
    cls, config = MODELS["bert"]
    given = config()
    given.attention_probs_dropout_prob, given.hidden_dropout_prob = 0.5, 0.0
    model = build(cls, given, "sinkhorn")
    first, second = (model(input_ids=IDS)[0] for _ in range(2))
    assert torch.equal(first, second)
    model.train()
    first, second = (model(input_ids=IDS)[0] for _ in range(2))
    assert (first - second).abs().max() > 1e-2


def test_an_existing_model_can_be_switched_and_switched_back() -> None:
    model = encoder("bert", "sdpa")
    truth = model(input_ids=IDS)[0]
    model.set_attn_implementation("sinkhorn")
    assert torch.allclose(model(input_ids=IDS)[0], encoder("bert", "sinkhorn")(input_ids=IDS)[0])
    model.set_attn_implementation("sdpa")
    assert torch.equal(model(input_ids=IDS)[0], truth)


def test_weights_on_request() -> None:
    weights = encoder("bert", "sinkhorn")(input_ids=IDS, attention_mask=PADDING, output_attentions=True).attentions
    assert len(weights) == 2 and weights[0].shape == (2, 4, 7, 7)
    assert torch.allclose(weights[0][1, :, :5].sum(-1), torch.ones(4, 5, dtype=D)) and (weights[0][1, :, 5:] == 0).all()
    assert (weights[0][1, :, :, 5:] == 0).all() and (weights[0][0].sum(-2) - 1).abs().max() < 1e-6


def test_a_mask_of_the_user_s_is_kept() -> None:
    band = (torch.arange(7)[:, None] - torch.arange(7)).abs() <= 2
    mask = band.expand(2, 1, 7, 7)
    model = encoder("bert", "sinkhorn")
    weights = model(input_ids=IDS, attention_mask=mask, output_attentions=True).attentions[0]
    assert (weights[:, :, ~band] == 0).all() and (weights[:, :, band] > 0).all()


def llama(implementation: str) -> Any:
    return build(hf.LlamaForCausalLM, hf.LlamaConfig(num_key_value_heads=2, **TEXT, **SIZES), implementation)


def test_causal_decoders_are_refused_unless_softmax_or_relaxed() -> None:
    with pytest.raises(ValueError, match=r"LlamaAttention is causal: the only balanced causal plan is the identity"):
        llama("sinkhorn")(IDS)
    softmax, sdpa = llama("sinkhorn_softmax"), llama("sdpa")
    assert torch.allclose(softmax(IDS, attention_mask=PADDING)[0], sdpa(IDS, attention_mask=PADDING)[0], atol=1e-12)
    found, truth = (m.generate(IDS[:1], max_new_tokens=5, do_sample=False) for m in (softmax, sdpa))
    assert torch.equal(found, truth) and found.shape[1] > IDS.shape[1]
    register_transformers("sinkhorn_relaxed", relaxation=(None, 1.0))
    for kind in ("sinkhorn_dustbin", "sinkhorn_relaxed"):
        model = llama(kind)
        weights = model(IDS, attention_mask=PADDING, use_cache=False, output_attentions=True).attentions[0]
        assert (weights.triu(1) == 0).all() and (weights[1, :, 5:] == 0).all() and weights[0].tril().sum() > 0
        with pytest.raises(ValueError, match=r"1 queries for 8 keys.*use_cache=False"):
            model.generate(IDS[:1], max_new_tokens=3, do_sample=False)
        model(IDS, use_cache=False)[0].sum().backward()


def test_a_causal_model_may_leave_the_mask_to_the_flag() -> None:
    """Ours never does: its mask function gives the mask that SDPA's leaves out."""
    mask = sinkhorn_mask(batch_size=2, q_length=5, kv_length=5, dtype=D)
    lowest = torch.full((5, 5), torch.finfo(D).min, dtype=D)
    assert mask is not None and torch.equal(mask[0, 0], lowest.triu(1))

    class Causal(nn.Module):
        is_causal = True

    q, k, v = torch.randn(3, 2, 4, 5, 8, dtype=D)
    found = hf.AttentionInterface()["sinkhorn_softmax"](Causal(), q, k, v)[0]
    truth = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.allclose(found, truth.transpose(1, 2), atol=1e-12)


def test_cross_attention_does_not_take_decoder_queries_for_padding() -> None:
    """As many decoder tokens as padded encoder tokens."""
    model = build(hf.BartModel, hf.BartConfig(**BART), "sinkhorn_dustbin")
    out = model(input_ids=IDS, attention_mask=PADDING, decoder_input_ids=IDS, use_cache=False)
    alone = model(input_ids=IDS[1:, :5], decoder_input_ids=IDS[1:], use_cache=False)
    assert torch.allclose(out.encoder_last_hidden_state[1:, :5], alone.encoder_last_hidden_state, atol=1e-12)
    assert torch.allclose(out.last_hidden_state[1:], alone.last_hidden_state, atol=1e-12)

    config = hf.BertConfig(is_decoder=True, add_cross_attention=True, **TEXT, **SIZES)
    bert = build(hf.BertModel, config, "sinkhorn_dustbin")
    states = torch.randn(2, 7, 32, dtype=D)
    given = {"input_ids": IDS, "use_cache": False}
    out = bert(encoder_hidden_states=states, encoder_attention_mask=PADDING, **given)[0]
    alone = bert(encoder_hidden_states=states[:, :5], encoder_attention_mask=PADDING[:, :5], **given)[0]
    assert torch.allclose(out[1], alone[1], atol=1e-12)


def test_modules_that_may_be_cross_attention_are_not_self_attention() -> None:
    class Plain(nn.Module):
        def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> None: ...

    class Perceiver(nn.Module):
        def forward(self, latents: Tensor, context: Tensor) -> None: ...

    class CrossAttention(Plain): ...

    class Decoder(Perceiver):
        is_decoder = True

    class Encoder(Perceiver):
        is_decoder = False

    class Either(nn.Module):
        def __init__(self, is_cross_attention: bool):
            super().__init__()
            self.is_cross_attention = is_cross_attention

        def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> None: ...

    modules = {Plain(): True, CrossAttention(): False, Either(False): True, Either(True): False, Encoder(): True,
               Decoder(): False, Perceiver(): None}  # fmt: skip
    for module, same in modules.items():
        assert is_self_attention(module) is same
    attend, x = hf.AttentionInterface()["sinkhorn"], torch.randn(1, 2, 5, 4)
    attend(Perceiver(), x, x, x)
    mask = torch.tensor([True, True, True, False, False]).expand(1, 1, 5, 5)
    with pytest.warns(UserWarning, match="Perceiver may be self-attention or not, so its padded queries"):
        out, _ = attend(Perceiver(), x, x, x, mask)
    assert out.abs().amin((0, 2, 3)).min() > 0
    out, _ = attend(Plain(), x, x, x, mask)
    assert (out[:, 3:] == 0).all() and (out[:, :3] != 0).all()


def test_what_is_not_computed_is_refused() -> None:
    heads = {"num_key_value_heads": 2, "head_dim": 8}
    gemma = build(hf.Gemma2ForCausalLM, hf.Gemma2Config(**heads, **TEXT, **SIZES), "sinkhorn_dustbin")
    with pytest.raises(ValueError, match="Gemma2Attention asks for softcap"):
        gemma(IDS, use_cache=False)


@pytest.mark.parametrize(
    ("error", "message", "name", "options"),
    [
        (ValueError, "name='sdpa' is an attention of transformers itself", "sdpa", {}),
        (ValueError, "name='my_flash_attention' is an attention of transformers", "my_flash_attention", {}),
        (ValueError, "Dustbin row_score holds NaN", "mine", {"dustbin": Dustbin(torch.tensor(torch.nan), 0.0)}),
        (TypeError, "needs a name", "", {}),
        (TypeError, "needs a name", "a|b", {}),
        (
            TypeError,
            "unknown option 'scale'; it takes causal, cross_attention, layers, epsilon",
            "mine",
            {"scale": 1.0},
        ),
        (ValueError, "epsilon=-1.0", "mine", {"epsilon": -1.0}),
        (TypeError, "dustbin must be a Dustbin", "mine", {"dustbin": True}),
        (ValueError, "base_iters=-1", "mine", {"base_iters": -1}),
        (ValueError, "engine='nope' is unknown", "mine", {"engine": "nope"}),
    ],
)
def test_bad_registrations(error: type[Exception], message: str, name: str, options: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        register_transformers(name, **options)
    assert name == "sdpa" or name not in hf.AttentionInterface()


def test_causal_means_what_relaxation_says() -> None:
    register_transformers("sinkhorn_balanced_after_all", relaxation=(None, float("inf")))
    with pytest.raises(ValueError, match="LlamaAttention is causal"):
        llama("sinkhorn_balanced_after_all")(IDS)


def test_transformers_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="pip install transformers"):
        register_transformers()


def test_transformers_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.57.6")
    with pytest.raises(ImportError, match=r"transformers 5 or newer, found 4\.57\.6"):
        register_transformers()


def test_models_that_keep_their_own_attention_can_be_told() -> None:
    """As the docstring says."""
    own = [name for name in ("DebertaModel", "XLNetModel", "LongformerModel", "BertModel", "ViTModel", "T5EncoderModel")
           if not getattr(hf, name)._can_set_attn_implementation()]  # fmt: skip
    assert own == ["DebertaModel", "XLNetModel", "LongformerModel"]


@pytest.mark.slow
def test_compiles_without_graph_breaks() -> None:
    model = encoder("bert", "sinkhorn")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        found, truth = (m(input_ids=IDS, attention_mask=PADDING)[0] for m in (compiled, model))
    assert torch.allclose(found, truth, atol=1e-12)
