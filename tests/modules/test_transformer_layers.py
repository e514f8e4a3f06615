"""Never the softmax fast path: our forward runs in torch's transformer layers, in every mode, however it got there."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from conformance import ENGINES
from marks import slow_after
from torch import Tensor, nn

from torch_sinkhorn_attn import SinkhornMultiheadAttention, replace_attention, restore_attention
from torch_sinkhorn_attn.engines import REFERENCE

E, H, LAYERS = 16, 4, 2
G = torch.Generator().manual_seed(0)
SRC, TGT = torch.randn(3, 6, E, generator=G), torch.randn(3, 5, E, generator=G)
SRC_PADDING = torch.tensor([[False] * 6, [False] * 4 + [True] * 2, [False] * 5 + [True]])
TGT_PADDING = torch.tensor([[False] * 5, [False] * 4 + [True], [False] * 3 + [True] * 2])
MODES: dict[str, tuple[bool, Callable[[], AbstractContextManager[Any]]]] = {
    "train": (True, torch.enable_grad),
    "train, no_grad": (True, torch.no_grad),
    "eval": (False, torch.enable_grad),
    "eval, no_grad": (False, torch.no_grad),
    "eval, inference_mode": (False, torch.inference_mode),
}
FORMS = ("none", "bool", "float")
OPTIONS: dict[str, Any] = {"epsilon": 0.5, "dustbin": True}  # a decoder's causal mask needs the dustbin


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nn.TransformerEncoder says that its fast path is closed
        yield


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """One entry per call of our forward: whether the query is nested."""
    seen: list[bool] = []
    original = SinkhornMultiheadAttention.forward

    def forward(self: SinkhornMultiheadAttention, *args: Any, **kwargs: Any) -> Any:
        seen.append((args[0] if args else kwargs["query"]).is_nested)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(SinkhornMultiheadAttention, "forward", forward)
    return seen


def by_hand(module: nn.Module) -> None:
    """What a user writes who does not know replace_attention."""
    for child in list(module.modules()):
        for name, attention in list(child.named_children()):
            if type(attention) is nn.MultiheadAttention:
                own = SinkhornMultiheadAttention(E, H, batch_first=attention.batch_first, **OPTIONS)
                own.load_state_dict(attention.state_dict())
                setattr(child, name, own)


def by_replacement(module: nn.Module) -> None:
    replace_attention(module, **OPTIONS)


def unchanged(module: nn.Module) -> None:
    pass


def make(kind: str, swap: Callable[[nn.Module], None], early: bool) -> nn.Module:
    """The model with its attention swapped in the layers it is made from, or after its construction."""
    torch.manual_seed(0)
    before, after = (swap, unchanged) if early else (unchanged, swap)
    sizes = {"d_model": E, "nhead": H, "dim_feedforward": 32, "dropout": 0.0, "batch_first": True}
    parts = []
    for layer_type, stack in (
        (nn.TransformerEncoderLayer, nn.TransformerEncoder),
        (nn.TransformerDecoderLayer, nn.TransformerDecoder),
    ):
        layer = layer_type(**sizes)  # type: ignore[arg-type]
        before(layer)
        parts.append(stack(layer, LAYERS, nn.LayerNorm(E)))  # type: ignore[arg-type]
    model = {
        "encoder": lambda: parts[0],
        "decoder": lambda: parts[1],
        "transformer": lambda: nn.Transformer(E, H, custom_encoder=parts[0], custom_decoder=parts[1], batch_first=True),
    }[kind]()
    after(model)
    return model


COUNTS = {"encoder": LAYERS, "decoder": 2 * LAYERS, "transformer": 3 * LAYERS}


def run(model: nn.Module, kind: str, form: str) -> Tensor:
    """Output at the real tokens."""

    def padding(mask: Tensor) -> Tensor | None:
        if form == "none":
            return None
        return mask if form == "bool" else torch.zeros(mask.shape).masked_fill(mask, -torch.inf)

    src, tgt = padding(SRC_PADDING), padding(TGT_PADDING)
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    if kind == "encoder":
        out = model(SRC, src_key_padding_mask=src)
    elif kind == "decoder":
        out = model(TGT, SRC, tgt_mask=causal, tgt_key_padding_mask=tgt, memory_key_padding_mask=src)
    else:
        out = model(
            SRC, TGT, tgt_mask=causal, src_key_padding_mask=src, tgt_key_padding_mask=tgt, memory_key_padding_mask=src
        )
    if form == "none":
        return out
    return out[~(SRC_PADDING if kind == "encoder" else TGT_PADDING)]


@pytest.mark.parametrize("early", slow_after(1, [True, False]), ids=["before construction", "after construction"])
@pytest.mark.parametrize("swap", slow_after(1, [by_hand, by_replacement]))
@pytest.mark.parametrize("kind", COUNTS)
def test_our_forward_runs_in_every_mode(
    kind: str, swap: Callable[[nn.Module], None], early: bool, calls: list[bool]
) -> None:
    model = make(kind, swap, early)
    softmax = make(kind, unchanged, early)
    for form in FORMS:
        truth = run(model.train(), kind, form)
        assert (run(softmax.train(), kind, form) - truth).abs().max() > 1e-2
        for training, context in MODES.values():
            calls.clear()
            with context():
                found = run(model.train(training), kind, form)
            assert len(calls) == COUNTS[kind] and torch.allclose(found, truth, atol=1e-5)
            assert not any(calls) or swap is by_hand  # replace_attention leaves nothing nested


def test_an_encoder_that_makes_nested_tensors_is_served_too(calls: list[bool]) -> None:
    """Swapped by hand after construction: the encoder still believes in its fast path."""
    model = make("encoder", by_hand, early=False).eval()
    with torch.no_grad():
        run(model, "encoder", "bool")
    assert calls == [True] * LAYERS
    calls.clear()
    replace_attention(model, **OPTIONS)  # finds nothing to replace, and still closes it
    with torch.no_grad():
        run(model, "encoder", "bool")
    assert calls == [False] * LAYERS


def test_the_softmax_original_does_take_the_fast_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the tests above would prove nothing."""
    calls: list[int] = []
    original = nn.MultiheadAttention.forward
    monkeypatch.setattr(nn.MultiheadAttention, "forward", lambda *a, **k: calls.append(1) or original(*a, **k))
    model = make("encoder", unchanged, early=False).eval()
    with torch.no_grad():
        run(model, "encoder", "bool")
    assert not calls


@pytest.mark.slow
@pytest.mark.parametrize("kind", slow_after(0, COUNTS, {"transformer", "decoder"}))
def test_compiled_models_hold_our_op(kind: str) -> None:
    for (training, context), form in itertools.product((MODES["train"], MODES["eval, no_grad"]), ("none", "bool")):
        model = make(kind, by_replacement, early=False).train(training)
        seen: list[str] = []
        torch._dynamo.reset()

        def backend(graph: torch.fx.GraphModule, _: Any, seen: list[str] = seen) -> Any:
            seen += [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
            for name, child in graph.named_modules():
                if name and isinstance(child, torch.fx.GraphModule):
                    seen += [str(node.target) for node in child.graph.nodes if node.op == "call_function"]
            return graph.forward

        compiled = torch.compile(model, backend=backend)
        with context():
            found, truth = run(compiled, kind, form), run(model, kind, form)
        assert torch.allclose(found, truth, atol=1e-5)
        count = seen.count("torch_sinkhorn_attn.forward")
        # torch looks at a decoder's mask (is it causal?), which breaks the graph into pieces that layers share
        assert count == COUNTS[kind] if kind == "encoder" else count >= 1
        assert not [name for name in seen if "scaled_dot_product" in name or "transformer_encoder_layer" in name]


@pytest.mark.parametrize("norm_first", [True, False])
def test_layers_agree_with_softmax_ones_in_softmax_mode(norm_first: bool) -> None:
    """The layers around are torch's own: the whole model equals the original."""
    sizes = {"d_model": E, "nhead": H, "dim_feedforward": 32, "dropout": 0.0, "batch_first": True}
    torch.manual_seed(0)
    model = nn.Transformer(
        num_encoder_layers=2, num_decoder_layers=2, norm_first=norm_first, activation="gelu", **sizes
    ).double()  # type: ignore[arg-type]
    causal = nn.Transformer.generate_square_subsequent_mask(5).double()
    src, tgt = SRC.double(), TGT.double()
    masks = {"src_key_padding_mask": SRC_PADDING, "memory_key_padding_mask": SRC_PADDING, "tgt_is_causal": True}
    for training in (True, False):
        model.train(training)
        with torch.set_grad_enabled(training):
            truth = model(src, tgt, tgt_mask=causal, **masks)
            replace_attention(model, base_iters=0, tail_iters=0)
            found = model(src, tgt, tgt_mask=causal, **masks)
        assert torch.allclose(found, truth, atol=1e-10)
        restore_attention(model)


def test_a_causal_decoder_without_dustbin_says_why() -> None:
    model = make("decoder", unchanged, early=False)
    replace_attention(model)
    with pytest.raises(ValueError, match="the only balanced causal plan is the identity"):
        run(model, "decoder", "none")
    model = make("decoder", unchanged, early=False)
    report = replace_attention(model, filter=lambda name, _: not name.endswith("self_attn"))
    assert len(report.replaced) == LAYERS and run(model, "decoder", "bool").isfinite().all()


@pytest.mark.parametrize("engine", slow_after(1, [*ENGINES, REFERENCE]))
def test_thirty_two_training_steps_are_the_same_on_every_engine(engine: str) -> None:
    """Mini encoder, float32, against float64 of the definition."""
    losses = {}
    for name, dtype in (("reference", torch.float64), (engine, torch.float32)):
        torch.manual_seed(0)
        model = make("encoder", unchanged, early=False).to(dtype)
        replace_attention(model, engine=name, window=(4, 4), dustbin=True)
        head = nn.Linear(E, 3).to(dtype)
        optimizer = torch.optim.SGD([*model.parameters(), *head.parameters()], lr=0.1, momentum=0.5)
        labels = torch.tensor([0, 1, 2])
        losses[dtype] = []
        for _ in range(32):
            out = model(SRC.to(dtype), src_key_padding_mask=SRC_PADDING)
            pooled = out.masked_fill(SRC_PADDING[..., None], 0).sum(1)
            loss = nn.functional.cross_entropy(head(pooled), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[dtype].append(loss.item())
    found, truth = losses[torch.float32], losses[torch.float64]
    assert truth[-1] < 0.1 * truth[0]
    assert max(abs(x - y) for x, y in zip(found, truth, strict=True)) < 1e-4
