"""`prepare`, once for calls that differ in nothing but the numbers in query, key, value and mask.

What `prepare` makes of a call beside its inputs depends on the shapes, the dtype, the options, and on what tensors such
as lengths and a mask hold. Small calls spend most of their time in making it, so it is kept, for the calls used last,
by all of that: small tensors by their contents (a digest, never by identity: memory is used again), masks that forbid
nothing by that alone. Errors are not kept, nor is any tensor of a caller's; nothing kept is ever handed out to be
written to. Calls that are traced, transformed, autocast or not of plain CPU tensors prepare as ever.

Kept are two generations of entries. A lookup is one of a dict, without a lock, which a fork could leave locked; what
two threads make at once is made twice.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from torch_sinkhorn_attn.compat.releases import plain, undisturbed
from torch_sinkhorn_attn.distributed.context import refuse_local
from torch_sinkhorn_attn.engines import cpu
from torch_sinkhorn_attn.engines.base import each_tensor
from torch_sinkhorn_attn.options import Options
from torch_sinkhorn_attn.problem import arguments, bits, per_head, shapes
from torch_sinkhorn_attn.problem.argument_checks import DTYPES
from torch_sinkhorn_attn.problem.arguments import Keywords, Prepared, prepare, without_inactive
from torch_sinkhorn_attn.problem.feasibility.existence import Existence
from torch_sinkhorn_attn.problem.looking import checks
from torch_sinkhorn_attn.problem.masks.scan import keeps_all
from torch_sinkhorn_attn.problem.problem import Inputs, Problem, compute_dtype
from torch_sinkhorn_attn.problem.scores import scaled, tokens_of

MOST_ENTRIES = 128  # of a generation
MOST_BYTES = 16 << 20
_LARGEST_INPUT = 1 << 22  # elements of query or key; a larger call takes long anyway
_LARGEST_CONTENT = 1 << 18  # bytes of a tensor that is known by its contents: they take a quarter of a millisecond
_BY_CONTENT = ("query_lengths", "key_lengths", "query_segment_ids", "key_segment_ids")
_NUMBERS = frozenset({type(None), bool, int, float})
_SCALARS = _NUMBERS | {str, tuple}  # what options may be
_IN_TUPLES = _NUMBERS | {torch.dtype, torch.Size, bytes}  # pairs of numbers, and what `_content` gives


def prepared(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    attn_mask: Tensor | None = None,
    **keywords: Unpack[Keywords],
) -> Prepared:
    """As `prepare`, from what is remembered if it is."""
    refuse_local()
    if key is None:
        given = _as_tokens(query, value, attn_mask, keywords)
        signature = None if given is None else _signature(*given, {**keywords, "mask_floor": None}, True)
    else:
        given = query, key, value, attn_mask
        signature = _signature(query, key, value, attn_mask, keywords)
    if given is None or signature is None:
        return prepare(query, key, value, attn_mask, **keywords)
    entry, seed = _entries.find(signature), None
    if entry is None:
        # Tensors made in inference mode could not take part in training later.
        with torch.inference_mode(False), torch.no_grad():
            made = prepare(query, key, value, attn_mask, **keywords)
            entry = _Entry.of(made)
        seed = made.problem.dropout_seed
        _entries.keep(signature, entry)
    return entry.prepared(*given, seed)


def _as_tokens(
    scores: Tensor, value: Tensor | None, mask: Tensor | None, keywords: Keywords
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None] | None:
    """Query, key, value and mask that scores come to, where that is one multiplication; else None."""
    scale, epsilon = keywords.get("scale"), keywords.get("epsilon", Options.epsilon)
    numbers = type(scale) in (float, int, type(None)) and type(epsilon) in (float, int) and epsilon > 0
    if mask is not None or not numbers or not (undisturbed() and plain(scores)) or scores.ndim < 3:
        return None
    if scores.dtype not in (torch.float32, torch.float64) or (value is not None and not _fits(value, scores)):
        return None
    query, key, value = tokens_of(scores, value, keywords.get("enable_gqa", False))
    return query, key, value, scaled(scores, scale, epsilon)


def _fits(value: Any, scores: Tensor) -> bool:
    return plain(value) and value.dtype == scores.dtype


@dataclass(frozen=True)
class _Entry:
    """What calls of one signature share."""

    problem: Problem  # without a dropout seed
    existence: Existence | None  # without a mask
    masked: bool  # whether it needs the call's
    engine: str | None
    active: tuple[Tensor, Tensor, bool] | None  # of `without_inactive`; None: features are taken as they are
    look: bool
    constants: cpu.Constants

    @classmethod
    def of(cls, made: Prepared) -> _Entry:
        look, active, existence = checks() != "never", made.active, made.existence
        if look and active is not None and bool(active[0].all()) and bool(active[1].all()):
            active = None
        problem = replace(made.problem, dropout_seed=None)
        masked = existence is not None and existence.mask is not None
        return cls(
            problem, None if existence is None else existence._replace(mask=None), masked, made.engine, active, look,
            cpu.constants(problem, made.dtype),
        )  # fmt: skip

    def prepared(
        self, query: Tensor, key: Tensor, value: Tensor | None, mask: Tensor | None, seed: Tensor | None
    ) -> Prepared:
        batch, problem, existence = query.shape[:-3], self.problem, self.existence
        flat: list[Tensor | None] = [query, key, value]
        if len(batch) != 1:
            num = math.prod(batch)
            flat = [None if x is None else x.reshape(num, *x.shape[len(batch) :]) for x in flat]
        if mask is not None:
            scores = (*query.shape[:-1], key.shape[-2])
            if not (len(scores) == 4 and mask.ndim == 4 and mask.shape[0] in (1, scores[0])):
                mask = shapes.score_mask(mask, scores, (torch.bool, *DTYPES))
            assert mask is not None
            if existence is not None and self.masked:
                existence = existence._replace(mask=mask)
        if self.active is not None:
            flat = without_inactive(flat, *self.active, self.look)
        if problem.solver.dropout_p:
            if seed is None:
                seed = arguments.dropout_seed(problem.solver.dropout_p, query.device)
            problem = replace(problem, dropout_seed=seed)
        inputs = Inputs(*flat, mask)  # type: ignore[arg-type, call-arg]
        return Prepared(
            inputs, problem, batch, query.dtype, self.engine, existence, active=self.active, constants=self.constants
        )


class _Entries:
    """Those used last, up to twice `most_entries` and `most_bytes`."""

    def __init__(self, most_entries: int, most_bytes: int):
        self.most_entries, self.most_bytes = most_entries, most_bytes
        self.forget()

    def forget(self) -> None:
        self.young: dict[Hashable, _Entry] = {}
        self.old: dict[Hashable, _Entry] = {}
        self.num_bytes = 0  # of the young

    def find(self, signature: Hashable) -> _Entry | None:
        entry = self.young.get(signature)
        if entry is None:
            entry = self.old.get(signature)
            if entry is not None:
                self.keep(signature, entry)
        return entry

    def keep(self, signature: Hashable, entry: _Entry) -> None:
        size = num_bytes(entry)
        if 4 * size > self.most_bytes:
            return
        if len(self.young) >= self.most_entries or self.num_bytes + size > self.most_bytes:
            self.old, self.young, self.num_bytes = self.young, {}, 0
        self.young[signature] = entry
        self.num_bytes += size

    def __len__(self) -> int:
        return len(self.young) + len(self.old)


_entries = _Entries(MOST_ENTRIES, MOST_BYTES)


def with_own_existence(prepared: Prepared) -> Existence | None:
    """The existence of a call, for whoever may write to it: what is remembered is copied."""
    existence = prepared.existence
    if existence is None or prepared.constants is None:
        return existence
    own: Existence = each_tensor(existence._replace(mask=None), torch.clone)
    return own._replace(mask=existence.mask)


def forget() -> None:
    """Keep nothing of the calls so far."""
    _entries.forget()


def tensors_of(tree: Any) -> Iterator[Tensor]:
    """All tensors in tuples, lists and dataclasses."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for x in tree:
            yield from tensors_of(x)
    elif is_dataclass(tree) and not isinstance(tree, type):
        for field in fields(tree):
            yield from tensors_of(getattr(tree, field.name))


def num_bytes(tree: Any) -> int:
    """The memory of its tensors."""
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors_of(tree)}
    return sum(storages.values())


def _signature(query: Any, key: Any, value: Any, mask: Any, keywords: Any, of_scores: bool = False) -> Hashable | None:
    """By what a call is remembered; None: it is not."""
    if not (undisturbed() and plain(query) and plain(key) and (value is None or plain(value))):
        return None
    if query.numel() > _LARGEST_INPUT or key.numel() > _LARGEST_INPUT:
        return None
    values = tuple(keywords.values())
    types = tuple(map(type, values))
    if not _SCALARS.issuperset(types):
        if query.ndim < 3 or per_head.wanted(query.shape[:-3], query.shape[-3], keywords):
            return None
        given = [_content(x) if name in _BY_CONTENT else x for name, x in keywords.items()]
        values = tuple(given)
        types = tuple(map(type, values))
        if not _SCALARS.issuperset(types):
            return None
    if tuple in types:
        inner = tuple(type(x) for pair in values if type(pair) is tuple for x in pair)
        if not _IN_TUPLES.issuperset(inner):
            return None
        types += inner
    of_mask = None
    if mask is not None:
        floor = keywords.get("mask_floor", Options.mask_floor)
        of_mask = _of_mask(mask, compute_dtype(query.dtype), keywords.get("window"), floor)
        if of_mask is None:
            return None
    of_value = None if value is None else (value.shape, value.dtype)
    return (
        checks(), query.shape, key.shape, query.dtype, key.dtype, of_value, of_mask, tuple(keywords), values, types,
        of_scores,
    )  # fmt: skip


def _content(x: Any) -> Any:
    """A tensor by what it holds; itself if it is none to be known so."""
    if x is None or not plain(x) or x.numel() * x.element_size() > _LARGEST_CONTENT:
        return x
    return (x.dtype, x.shape, _digest(bits.raw(x)))


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def _of_mask(mask: Any, dtype: torch.dtype, window: Any, floor: Any) -> Hashable | None:
    """A mask by all that `prepare` reads of it: its contents, or that it forbids nothing."""
    if not plain(mask) or mask.numel() == 0 or mask.dtype not in (torch.bool, *DTYPES):
        return None
    small = mask.numel() * mask.element_size() <= _LARGEST_CONTENT
    data = None
    if mask.dtype == torch.bool:
        data = bits.raw(mask) if small else None
        free = b"\0" not in data if data is not None else bool(mask.all())
    else:  # within a window a float mask may be read with other roundings
        free = window is None and type(floor) in (float, int, type(None)) and keeps_all(mask, dtype, floor)
    if free:
        return mask.dtype, mask.shape
    if not small:
        return None
    return mask.dtype, mask.shape, _digest(bits.raw(mask) if data is None else data)
