"""Tokens of sequences that were encoded before: of all against all each is encoded once, not once for every pair."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

RESIDUES = 200_000
"""Most residues whose tokens are kept, 70 MB of them; what was asked for longest ago goes first."""


class Encodings:
    """Of one aligner, whose weights stay, without gradients, on the CPU.

    Args:
        most: residues that are kept.
    """

    def __init__(self, most: int = RESIDUES) -> None:
        self.most = most
        self._tokens: OrderedDict[bytes, Tensor] = OrderedDict()
        self._kept = 0

    def tokens(self, residues: Tensor, lengths: Tensor, encode: Callable[[Tensor], Tensor], padding: int) -> Tensor:
        """What ``encode`` makes, [N, L, d], of residues [N, L] with ``lengths`` [N], zeros on padding. Only sequences
        that are not known yet are encoded."""
        rows = [row[:length] for row, length in zip(residues, lengths.tolist(), strict=True)]
        names = [row.numpy().tobytes() for row in rows]
        found = {name: self._tokens[name] for name in names if name in self._tokens}
        if missing := {name: row for name, row in zip(names, rows, strict=True) if name not in found}:
            made = encode(pad_sequence(list(missing.values()), batch_first=True, padding_value=padding))
            for (name, row), tokens in zip(missing.items(), made, strict=True):
                found[name] = tokens[: len(row)].clone()
        for name, tokens in found.items():
            self._keep(name, tokens)
        first = next(iter(found.values()))
        filled = first.new_zeros(*residues.shape, first.shape[1])
        for index, name in enumerate(names):
            filled[index, : len(found[name])] = found[name]
        return filled

    def _keep(self, name: bytes, tokens: Tensor) -> None:
        if name in self._tokens:
            self._tokens.move_to_end(name)
            return
        self._tokens[name] = tokens
        self._kept += len(tokens)
        while self._kept > self.most:
            _, gone = self._tokens.popitem(last=False)
            self._kept -= len(gone)
