"""What small calls cost, beside softmax: the functional, the module, and whole models, in one run.

    python benchmarks/small.py [--repeat 30] [--only functional --only module --only batch --only models]

One thread, float32, T = 20, R = 2. "functional" is `sinkhorn_attention` beside `F.scaled_dot_product_attention` at
1 x 4 x 16 x 16, with the same mask in every call or one of the last 1000 ("new"), so that nothing is known of it;
"module" is `SinkhornMultiheadAttention` beside `nn.MultiheadAttention` at that size, need_weights=False; "batch" is
8 x 12 x 50 x 64; "models" are two layers of 768 features and 12 heads as BERT (64 tokens, padded) and ViT (197 tokens)
have them, by Hugging Face transformers beside attn_implementation="sdpa" where it is installed, and torch's encoder
layer after `replace_attention` beside itself. All take turns; times are the best of the rounds, of CPU time, on which
others on the machine have less influence.

For a table from before a change put the tree of another revision, with its engine, on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from lib.measure import best_times, leaves, print_rows
from torch import Tensor, nn

from torch_sinkhorn_attn import (
    SinkhornMultiheadAttention,
    register_transformers,
    replace_attention,
    sinkhorn_attention,
)

SMALL, BATCH = (1, 4, 16, 16), (8, 12, 50, 64)
LAYERS, WIDTH, HEADS = 2, 768, 12
Call = Callable[[], object]
Line = tuple[str, Call, Call, str]  # what, ours, softmax, the target


def inference(output: Callable[[], Tensor]) -> Call:
    def run() -> None:
        with torch.no_grad():
            output()

    return run


def training(output: Callable[[], Tensor]) -> Call:
    def run() -> None:
        out = output()
        out.backward(torch.ones_like(out))

    return run


def functional() -> Iterator[Line]:
    inputs, length = leaves(SMALL), SMALL[-2]

    def both(**options: Tensor) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
        return (
            lambda: sinkhorn_attention(*inputs, **options),  # type: ignore[arg-type, return-value]
            lambda: F.scaled_dot_product_attention(*inputs, **options),
        )

    plain, softmax = both()
    yield "functional, forward", inference(plain), inference(softmax), "<= 0.25 ms"
    g = torch.Generator().manual_seed(0)
    square = torch.ones(1, 1, length, length, dtype=torch.bool)
    some = square.clone()
    some[..., -3:] = False
    masks = {
        "all True": square,
        "bool, keys out": some,
        "bool, pairs out": square & (torch.arange(length) - torch.arange(length)[:, None]).abs().lt(9),
        "float": torch.randn(square.shape, generator=g),
        "float, keys out": torch.zeros(square.shape).masked_fill(~some, -torch.inf),
    }
    for name, mask in masks.items():
        plain, softmax = both(attn_mask=mask)
        yield f"mask: {name}", inference(plain), inference(softmax), ""
    new = [torch.rand(square.shape, generator=g) < 0.9 for _ in range(1000)]
    for mask in new:
        mask.diagonal(dim1=-2, dim2=-1)[:] = True
        mask[..., 0, :], mask[..., 0] = True, True
    ours, theirs = itertools.cycle(new), itertools.cycle(new)
    yield (
        "mask: bool, pairs out, new",
        inference(lambda: sinkhorn_attention(*inputs, next(ours))),  # type: ignore[arg-type, return-value]
        inference(lambda: F.scaled_dot_product_attention(*inputs, next(theirs))),
        "",
    )
    plain, softmax = both()
    yield "functional, forward + backward", training(plain), training(softmax), ""


def module() -> Iterator[Line]:
    (num, heads, length, width), x = SMALL, leaves((SMALL[0], SMALL[2], SMALL[1] * SMALL[3]))[0].detach()
    own = SinkhornMultiheadAttention(heads * width, heads, batch_first=True)
    softmax = nn.MultiheadAttention(heads * width, heads, batch_first=True)
    padding = torch.zeros(num, length, dtype=torch.bool)
    padding[:, -3:] = True
    for name, mask in (("", None), (", padded", padding)):

        def call(attention: nn.Module, mask: Tensor | None = mask) -> Callable[[], Tensor]:
            return lambda: attention(x, x, x, mask, need_weights=False)[0]

        target = "" if mask is not None else "<= 3 x"
        yield f"module, forward{name}", call(own), call(softmax), target
        evaluated = [copy.deepcopy(y).eval() for y in (own, softmax)]
        yield f"module, eval and no_grad{name}", *(inference(call(y)) for y in evaluated), target
        yield f"module, forward + backward{name}", training(call(own)), training(call(softmax)), ""


def batch() -> Iterator[Line]:
    inputs = leaves(BATCH)
    calls = (
        lambda: sinkhorn_attention(*inputs),  # type: ignore[arg-type, return-value]
        lambda: F.scaled_dot_product_attention(*inputs),
    )
    shape = "x".join(map(str, BATCH))
    yield f"{shape}, forward", *map(inference, calls), ""
    yield f"{shape}, forward + backward", *map(training, calls), "<= 1.8 x"


def models() -> Iterator[Line]:
    lengths = torch.tensor([64, 40, 64, 51])
    present = torch.arange(64) < lengths[:, None]
    x = torch.randn(4, 64, WIDTH, generator=torch.Generator().manual_seed(0))
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, 0.0, batch_first=True, activation="gelu")
    softmax = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
    own = copy.deepcopy(softmax)
    replace_attention(own)

    def encoder(model: nn.Module) -> Callable[[], Tensor]:
        return lambda: model(x, src_key_padding_mask=~present)

    for name, how in (("forward", inference), ("forward + backward", training)):
        yield f"nn.TransformerEncoder 4 x 64, {name}", how(encoder(own)), how(encoder(softmax)), "<= 1.15 x"
    try:
        import transformers
    except ImportError:
        print("transformers is not installed: BERT and ViT are left out")
        return
    register_transformers("sinkhorn")
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    ids, pixels = torch.randint(0, 1000, (4, 64)), torch.randn(2, 3, 224, 224)
    text = {"input_ids": ids, "attention_mask": present.long()}
    kinds = {
        "BERT 4 x 64": (transformers.BertConfig(vocab_size=1000, **sizes, **still), text),
        "ViT 2 x 197": (transformers.ViTConfig(**sizes, **still), {"pixel_values": pixels}),
    }
    for kind, (config, given) in kinds.items():
        built = []
        for implementation in ("sinkhorn", "sdpa"):
            torch.manual_seed(0)
            built.append(transformers.AutoModel.from_config(config, attn_implementation=implementation))

        def call(model: nn.Module, given: dict[str, Tensor] = given) -> Callable[[], Tensor]:
            return lambda: model(**given).last_hidden_state

        for name, how in (("forward", inference), ("forward + backward", training)):
            yield f"{kind}, {name}", *(how(call(model)) for model in built), "<= 1.15 x"


PARTS = {"functional": functional, "module": module, "batch": batch, "models": models}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=30)
    parser.add_argument("--only", action="append", choices=list(PARTS))
    arguments, _ = parser.parse_known_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, 1 thread, float32, T = 20, R = 2")
    widths = [-44, 9, 10, 7, 12]
    print_rows([["", "ms", "softmax", "ratio", "target"]], widths)
    for name, part in PARTS.items():
        if arguments.only and name not in arguments.only:
            continue
        rounds = arguments.repeat * {"functional": 20, "module": 20, "batch": 1, "models": 0.3}[name]
        for what, ours, softmax, target in part():
            best = best_times({"ours": ours, "softmax": softmax}, max(3, int(rounds)), clock=time.process_time)
            cells = (f"{1e3 * best[x]:.3f}" for x in best)
            print_rows([[what, *cells, f"{best['ours'] / best['softmax']:.2f}", target]], widths)


if __name__ == "__main__":
    main()
