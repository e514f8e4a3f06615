"""replace_attention and restore_attention: what changes, what must not, and what is refused."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from torch_sinkhorn_attn import SinkhornMultiheadAttention, replace_attention, restore_attention
from torch_sinkhorn_attn.modules import ModuleOptions

E, H = 16, 4
SOFTMAX = {"base_iters": 0, "tail_iters": 0}
X = torch.randn(2, 6, E, generator=torch.Generator().manual_seed(0))
PADDING = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])


def encoder(**options: Any) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(E, H, 32, dropout=0.0, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2)


def attention(model: nn.Module) -> list[nn.MultiheadAttention]:
    return [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]


def output(module: nn.Module) -> Tensor:
    return module(X, X, X, need_weights=False)[0]


def test_modules_and_everything_in_them_stay() -> None:
    model = encoder().double().train()
    model.layers[1].eval()
    model.layers[0].self_attn.in_proj_bias.requires_grad_(False)
    calls: list[str] = []
    model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append("hook"))
    before = attention(model)
    parameters, state = dict(model.named_parameters()), model.state_dict()
    report = replace_attention(model, epsilon=0.5, base_iters=7)
    assert report.replaced == ("layers.0.self_attn", "layers.1.self_attn") and report.skipped == {}
    assert report.encoders == ("",) and report.new_parameters == {} and report.options.epsilon == 0.5
    after = attention(model)
    assert all(a is b for a, b in zip(before, after, strict=True))
    assert all(type(m) is SinkhornMultiheadAttention and m.epsilon == 0.5 and m.base_iters == 7 for m in after)
    assert dict(model.named_parameters()).keys() == parameters.keys()
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert model.state_dict().keys() == state.keys() and [m.training for m in after] == [True, False]
    assert not after[0].in_proj_bias.requires_grad and after[0].in_proj_weight.dtype == torch.float64
    model(X.double())
    assert calls == ["hook"]


def test_an_existing_optimizer_keeps_training_them() -> None:
    model = encoder()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    replace_attention(model)
    weight = model.layers[0].self_attn.in_proj_weight
    before = weight.detach().clone()
    model(X).square().sum().backward()
    optimizer.step()
    assert not torch.equal(weight, before)


def test_it_computes_what_a_built_module_computes() -> None:
    module = encoder().layers[0].self_attn
    built = SinkhornMultiheadAttention(E, H, batch_first=True, epsilon=0.5, window=(3, 3))
    built.load_state_dict(module.state_dict())
    softmax = output(module)
    replace_attention(module, epsilon=0.5, window=(3, 3))
    assert torch.equal(output(module), output(built)) and not torch.allclose(output(module), softmax)
    assert module.extra_repr() == built.extra_repr() and "epsilon=0.5" in repr(module)


def test_the_model_itself_may_be_the_module() -> None:
    module = nn.MultiheadAttention(E, H, batch_first=True)
    truth = output(module)
    report = replace_attention(module)
    assert report.replaced == ("",) and "(the model itself)  replaced" in str(report)
    assert restore_attention(report) == ("",)
    assert type(module) is nn.MultiheadAttention and torch.equal(output(module), truth)


def test_restoring_is_exact() -> None:
    model, untouched = encoder().eval(), encoder().eval()
    dictionaries = [dict(m.__dict__) for m in (model, *attention(model))]
    replace_attention(model, dustbin=True, relaxation=1.0, **SOFTMAX)
    assert not model.use_nested_tensor
    assert restore_attention(model) == ("layers.0.self_attn", "layers.1.self_attn")
    for module, before in zip((model, *attention(model)), dictionaries, strict=True):
        assert module.__dict__.keys() == before.keys() and model.use_nested_tensor
    assert model.state_dict().keys() == untouched.state_dict().keys() and repr(model) == repr(untouched)
    with torch.no_grad():
        found, truth = (m(X, src_key_padding_mask=PADDING) for m in (model, untouched))
    assert torch.equal(found, truth) and restore_attention(model) == ()


def test_restored_modules_keep_what_they_learned() -> None:
    model = encoder()
    replace_attention(model)
    with torch.no_grad():
        model.layers[0].self_attn.in_proj_weight.add_(1.0)
    learned = model.layers[0].self_attn.in_proj_weight
    restore_attention(model)
    assert model.layers[0].self_attn.in_proj_weight is learned


def test_repeating_is_harmless_and_other_options_are_refused() -> None:
    model = encoder()
    replace_attention(model, epsilon=0.5)
    report = replace_attention(model, epsilon=0.5)
    assert report.replaced == () and set(report.skipped.values()) == {"was replaced before, with these options"}
    with pytest.raises(ValueError, match=r"layers.0.self_attn was replaced before with other options.*epsilon=0.5"):
        replace_attention(model, epsilon=0.25)
    restore_attention(model)
    replace_attention(model, epsilon=0.25)
    assert attention(model)[0].epsilon == 0.25


def test_filter_and_native_modules() -> None:
    model = nn.ModuleDict({"a": encoder(), "b": SinkhornMultiheadAttention(E, H)})
    seen = []
    report = replace_attention(model, filter=lambda name, module: seen.append(module) or name.endswith("0.self_attn"))
    assert report.replaced == ("a.layers.0.self_attn",) and seen == attention(model)
    assert report.skipped == {"a.layers.1.self_attn": "filter says no", "b": "filter says no"}
    assert report.encoders == ("a",) and "a  " in str(report)
    assert replace_attention(model).skipped["b"] == "was built as SinkhornMultiheadAttention"
    restore_attention(report)
    assert [type(m) is SinkhornMultiheadAttention for m in attention(model)] == [False, True, True]
    assert not model["a"].use_nested_tensor  # one of its layers is Sinkhorn attention still
    restore_attention(model)
    assert model["a"].use_nested_tensor and isinstance(model["b"], SinkhornMultiheadAttention)


def test_shared_modules_stay_shared() -> None:
    module = nn.MultiheadAttention(E, H)
    model = nn.ModuleDict({"one": module, "two": module})
    report = replace_attention(model)
    assert report.replaced == ("one", "two") and model["one"] is model["two"]
    with pytest.raises(ValueError, match="filter says both yes and no to one shared module, one, two"):
        restore_attention(model)
        replace_attention(model, filter=lambda name, _: name == "one")
    assert type(module) is nn.MultiheadAttention
    assert replace_attention(model, filter=lambda *_: False).skipped.keys() == {"one", "two"}


def test_a_copy_is_restored_by_itself() -> None:
    model = encoder()
    replace_attention(model)
    other = copy.deepcopy(model)
    restore_attention(other)
    assert type(attention(other)[0]) is nn.MultiheadAttention and other.use_nested_tensor
    assert type(attention(model)[0]) is SinkhornMultiheadAttention and not model.use_nested_tensor


def test_dustbin_scores_are_reported_and_follow_the_module() -> None:
    model = encoder().to(torch.float64)
    report = replace_attention(model, dustbin=True)
    names = [f"layers.{i}.self_attn.dustbin_{side}_score" for i in (0, 1) for side in ("row", "col")]
    assert list(report.new_parameters) == names and "new parameter: add it to the optimizer" in str(report)
    for name, p in report.new_parameters.items():
        assert p is model.get_parameter(name) and p.shape == (H, 1) and p.dtype == torch.float64 and p.requires_grad
    model(X.double()).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in report.new_parameters.values())
    meta = nn.MultiheadAttention(E, H, device="meta")
    replace_attention(meta, dustbin=True)
    assert meta.dustbin_row_score.is_meta


@pytest.mark.parametrize("name", ["in_proj_weight", "out_proj.weight"])
@pytest.mark.parametrize("late", [False, True])
def test_parametrised_projections_work(name: str, late: bool) -> None:
    """Parametrised before or after the replacement; removed after or before the restoration."""
    module = encoder().layers[0].self_attn
    owner = module if name == "in_proj_weight" else module.out_proj
    if late:
        replace_attention(module, **SOFTMAX)
        parametrizations.weight_norm(owner, name.split(".")[-1])
    else:
        parametrizations.weight_norm(owner, name.split(".")[-1])
        truth = output(module)
        replace_attention(module, **SOFTMAX)
        assert torch.allclose(output(module), truth, atol=1e-6)
    assert isinstance(module, SinkhornMultiheadAttention) and parametrize.is_parametrized(owner)
    output(module).square().sum().backward()
    assert all(p.grad is not None for p in owner.parametrizations.parameters())
    before = output(module)
    assert torch.allclose(output(copy.deepcopy(module)), before)
    if late:
        parametrize.remove_parametrizations(owner, name.split(".")[-1])
        assert type(module) is SinkhornMultiheadAttention
    restore_attention(module)
    assert not isinstance(module, SinkhornMultiheadAttention) and torch.allclose(output(module), before, atol=1e-6)
    if not late:
        assert parametrize.is_parametrized(owner)
        parametrize.remove_parametrizations(owner, name.split(".")[-1])
    assert type(module) is nn.MultiheadAttention and torch.allclose(output(module), before, atol=1e-6)


def test_pruned_and_old_style_weight_norm_projections_work() -> None:
    for change in (
        lambda m: prune.l1_unstructured(m, "in_proj_weight", amount=0.5),
        lambda m: nn.utils.weight_norm(m, "in_proj_weight"),
    ):
        module = encoder().layers[0].self_attn
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # weight_norm is deprecated, and still there
            change(module)
        truth = output(module)
        replace_attention(module, **SOFTMAX)
        assert torch.allclose(output(module), truth, atol=1e-6)


def test_lora_adapters_keep_working_and_training() -> None:
    import peft

    model = encoder()
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["self_attn"], r=2, init_lora_weights=False))
    truth = adapted(X)
    report = replace_attention(adapted, **SOFTMAX)
    assert len(report.replaced) == 2 and torch.allclose(adapted(X), truth, atol=1e-5)
    restore_attention(adapted)
    replace_attention(adapted)
    lora = [p for name, p in adapted.named_parameters() if "lora_A" in name]
    before = [p.detach().clone() for p in lora]
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    sinkhorn = adapted(X)
    sinkhorn.square().sum().backward()
    optimizer.step()
    assert not torch.allclose(sinkhorn, truth, atol=1e-3)
    assert all(not torch.equal(a, b) for a, b in zip(lora, before, strict=True))
    adapted.eval()
    with torch.no_grad():
        found = adapted(X, src_key_padding_mask=PADDING)
    merged = adapted.merge_and_unload()
    assert len([m for m in merged.modules() if type(m) is SinkhornMultiheadAttention]) == 2
    with torch.no_grad():
        assert torch.allclose(merged(X, src_key_padding_mask=PADDING), found, atol=1e-5)


def test_subclasses_and_scripted_modules_are_skipped_and_said_why() -> None:
    class Own(nn.MultiheadAttention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.MultiheadAttention(E, H))
    report = replace_attention(nn.ModuleDict({"own": Own(E, H), "scripted": scripted}))
    assert report.replaced == ()
    assert report.skipped["own"].startswith("Own is a subclass of nn.MultiheadAttention")
    assert report.skipped["scripted"] == "scripted: replace before torch.jit.script"


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (TypeError, "unknown option 'eps'; it takes epsilon", {"eps": 1.0}),
        (TypeError, "filter must be a function", {"filter": "self_attn"}),
        (ValueError, r"layers.0.self_attn: epsilon=0\b.*leave the module out with filter", {"epsilon": 0}),
        (TypeError, "dustbin must be True or False", {"dustbin": 1.0}),
        (ValueError, "engine='nope' is unknown", {"engine": "nope"}),
    ],
)
def test_bad_options_change_nothing(error: type[Exception], message: str, options: dict[str, Any]) -> None:
    model = encoder()
    with pytest.raises(error, match=message):
        replace_attention(model, **options)
    assert all(type(m) is nn.MultiheadAttention for m in attention(model)) and model.use_nested_tensor


def test_nothing_changes_if_one_module_cannot_have_a_dustbin() -> None:
    model = nn.ModuleList([nn.MultiheadAttention(E, H), nn.MultiheadAttention(E, H)])
    model[1].out_proj.weight = nn.Parameter(torch.zeros(E, E, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"^1: dustbin=True needs floating.*out_proj is torch.int8"):
        replace_attention(model, dustbin=True)
    assert all(type(m) is nn.MultiheadAttention for m in model)


def test_dustbin_scores_made_in_inference_mode_can_be_trained() -> None:
    model = encoder()
    with torch.inference_mode():
        replace_attention(model, dustbin=True)
    model(X).square().sum().backward()
    assert model.layers[0].self_attn.dustbin_row_score.grad is not None


def test_attributes_of_the_user_s_come_back() -> None:
    module = nn.MultiheadAttention(E, H)
    module.window = 7
    replace_attention(module, window=(2, 2))
    assert module.window == (2, 2)
    restore_attention(module)
    assert module.window == 7 and not hasattr(module, "epsilon")


def test_a_report_restores_what_its_own_call_replaced() -> None:
    model = encoder()
    first = replace_attention(model)
    restore_attention(model)
    second = replace_attention(model, epsilon=0.5)
    assert restore_attention(first) == () and len(restore_attention(second)) == 2


def test_an_encoder_with_attention_of_its_own_gets_its_flag_back() -> None:
    model = encoder()
    model.layers[1].self_attn = SinkhornMultiheadAttention(E, H, batch_first=True)
    replace_attention(model)
    assert not model.use_nested_tensor
    restore_attention(model)
    assert model.use_nested_tensor and "_nested_tensors_before_sinkhorn" not in model.__dict__


def test_equivalent_options_are_no_other_options() -> None:
    model = encoder()
    replace_attention(model, window=[2, 2], relaxation=(1.0, 1.0))
    assert replace_attention(model, window=(2, 2), relaxation=1.0).replaced == ()


def test_a_module_that_cannot_take_the_options_stops_all() -> None:
    model = nn.ModuleList([nn.MultiheadAttention(E, H), nn.MultiheadAttention(E, H, add_zero_attn=True)])
    with pytest.raises(ValueError, match=r"^1: window=\(2, 2\) cannot be combined.*filter"):
        replace_attention(model, window=(2, 2))
    assert all(type(m) is nn.MultiheadAttention for m in model)
    assert replace_attention(model, window=(2, 2), filter=lambda _, m: not m.add_zero_attn).replaced == ("0",)


def test_models_without_attention_and_other_objects_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Linear holds no nn.MultiheadAttention.*register_transformers"):
        replace_attention(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"replace_attention needs an nn.Module, got str"):
        replace_attention("model")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="restore_attention needs a model or a ReplacementReport, got str"):
        restore_attention("model")  # type: ignore[arg-type]


def test_options_are_those_of_the_constructor() -> None:
    import inspect

    given = inspect.signature(SinkhornMultiheadAttention).parameters
    keyword = {name: p.default for name, p in given.items() if p.kind is p.KEYWORD_ONLY}
    assert keyword == ModuleOptions()._asdict()


@pytest.mark.slow
def test_a_compiled_model_notices() -> None:
    model = encoder()
    compiled = torch.compile(model, backend="aot_eager")
    softmax = compiled(X)
    replace_attention(compiled)
    sinkhorn = compiled(X)
    assert torch.allclose(sinkhorn, model(X), atol=1e-6) and not torch.allclose(sinkhorn, softmax, atol=1e-3)
    restore_attention(compiled)
    assert torch.allclose(compiled(X), softmax, atol=1e-6)
