"""Which alignments are of one family: the one place where that is decided.

What is known of a record is its accession, version aside; a Pfam accession within its ID is one too; and its ID, case
aside. Two records are

- *one family* if they share an accession, whatever their IDs: Pfam's seed and its full alignment;
- *different families* if both have accessions and share none, whatever their IDs;
- *perhaps one family* if they share their ID, and one or both have no accession. A seed and a full alignment without
  accessions look so, and so do ten clusters that somebody called "Cluster".

What may be one family never stands on both sides of a split, and is never called unseen (``related``, ``Known``). What
may be two is never scored as one (``labels``). So neither mistake makes a result look better than it is.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Protocol

_PFAM = re.compile(r"(?<![A-Za-z0-9])PF\d{5}(?!\d)", re.IGNORECASE)


class Named(Protocol):
    """A record's ID, its accession or '', and both as shown."""

    @property
    def name(self) -> str: ...

    @property
    def accession(self) -> str: ...

    @property
    def key(self) -> str: ...


def identities(record: Named) -> set[str]:
    """Its ID, its accession without the version, and Pfam accessions inside the ID, all in lower case: what a
    checkpoint records of a family that it was trained on."""
    return {_name(record), *_accessions(record)} - {""}


def related(records: Sequence[Named]) -> list[int]:
    """For each record the number of its group, numbered in order of appearance: records in different groups are
    certainly of different families. Those linked by a third one are in one group."""
    bare = {_name(record) for record in records if not _accessions(record)}
    return _groups([_accessions(record) | ({_name(record)} & bare) for record in records])


def labels(records: Sequence[Named]) -> list[str]:
    """What each record is scored under: its ``key``, the first one's where several are certainly one family; a number
    is added where different families, or perhaps different ones, would have the same."""
    groups = _groups([_accessions(record) for record in records])
    keys: dict[int, str] = {}
    for group, record in zip(groups, records, strict=True):
        keys.setdefault(group, record.key)
    distinct = _numbered(list(keys.values()))
    return [distinct[group] for group in groups]


class Known:
    """Families, given by their ``identities``, to ask whether others may be among them."""

    def __init__(self, families: Iterable[Iterable[str]]) -> None:
        self._any: set[str] = set()
        self._bare: set[str] = set()
        for family in families:
            names = {_folded(name) for name in family}
            self._any |= names
            if len(names) == 1:  # an ID, or an accession, and nothing that could tell it from others called so
                self._bare |= names

    def among(self, records: Iterable[Named]) -> list[str]:
        """The keys of those that are of one of the families, or perhaps of one."""
        return [record.key for record in records if self.may_hold(record)]

    def may_hold(self, record: Named) -> bool:
        """Whether ``record`` is one of the families, or perhaps one."""
        accessions = _accessions(record)
        return bool(accessions & self._any) or _name(record) in (self._bare if accessions else self._any)


def are_families(values: object) -> bool:
    """Whether these are lists of ``identities``, as files record them."""
    return isinstance(values, list) and all(
        isinstance(family, list) and all(isinstance(name, str) for name in family) for family in values
    )


def _name(record: Named) -> str:
    return _folded(record.name)


def _accessions(record: Named) -> set[str]:
    stated = re.sub(r"\.\d+$", "", record.accession.strip())
    # "-" or "?" stand for none.
    own = {stated} if any(c.isalnum() for c in stated) else set()
    return {_folded(accession) for accession in own | set(_PFAM.findall(record.name))}


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _groups(marks: Sequence[set[str]]) -> list[int]:
    """Numbers from 0, in order of appearance, of the groups that common marks make; without marks each is alone."""
    parents = list(range(len(marks)))
    owners: dict[str, int] = {}

    def root(index: int) -> int:
        while parents[index] != index:
            parents[index] = parents[parents[index]]
            index = parents[index]
        return index

    for index, own in enumerate(marks):
        for mark in own:
            one, other = root(owners.setdefault(mark, index)), root(index)
            parents[max(one, other)] = min(one, other)
    numbers: dict[int, int] = {}
    return [numbers.setdefault(root(index), len(numbers)) for index in range(len(marks))]


def _numbered(keys: Sequence[str]) -> list[str]:
    """The same where they differ; 'key #1', 'key #2' where they do not, or further numbers where that is taken."""
    repeated = {key for key, count in Counter(keys).items() if count > 1}
    taken, counts, found = set(keys), dict.fromkeys(repeated, 0), []
    for key in keys:
        label = key
        while key in repeated and label in taken:
            counts[key] += 1
            label = f"{key} #{counts[key]}"
        taken.add(label)
        found.append(label)
    return found
