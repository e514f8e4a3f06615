"""Whether some plan with given marginals is positive on a whole support, decided by a maximum flow in integers.

Rows i hold mass a_i, columns j have room for b_j, and mass moves along the pairs of the support. A plan that is
positive on all pairs exists iff in every connected component the totals agree, a flow moves everything, and the
residual graph of that flow (row i to column j for every pair, column j back to row i where the flow f_ij > 0) is
strongly connected: then every pair lies on a cycle along which its flow can grow. What fails instead is a cut: rows R
and the columns N(R) that they reach, with

    slack(R) = b(N(R)) - a(R) <= 0        though other rows reach N(R) too

Integers have any size, so nothing is rounded here. Masses come from floating-point sums, however, and a cut that is
meant to be tight may miss by their rounding: a slack of at most 2^-46 of the masses on the lighter side of a cut counts
as none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch_sinkhorn_attn.problem.bits import from_members, members

SLACK_BITS = 46  # 64 units in the last place of float64


class Cut(NamedTuple):
    """Rows that hold as much as the columns they reach, or more; `apart`: the columns are reached by no other rows."""

    rows: list[int]
    cols: list[int]
    apart: bool = False


class Graph(NamedTuple):
    """A support: bit j of `rows[i]` and bit i of `cols[j]` say that (i, j) is in it."""

    rows: list[int]
    cols: list[int]


def dyadic(*groups: Sequence[float]) -> list[list[int]]:
    """Floats as integers in one common ratio, as small as they get.

    >>> dyadic([1.0, 1.0], [0.5])
    [[2, 2], [1]]
    """
    pairs = [[math.frexp(x) for x in group] for group in groups]
    lowest = min((e for group in pairs for m, e in group if m), default=0)
    found = [[int(m * 2**53) << (e - lowest) if m else 0 for m, e in group] for group in pairs]
    common = math.gcd(*(x for group in found for x in group)) or 1
    return [[x // common for x in group] for group in found]


def blocking_cut(
    graph: Graph, a: Sequence[int], b: Sequence[int], totals: Sequence[tuple[int, int]], tolerance: float
) -> Cut | None:
    """A cut that leaves no plan positive on the support, or None if there is such a plan.

    a, b: integer masses, in any two units; lines of the graph without entries are ignored. totals: of the problem that
    each row belongs to, (row mass, column mass). They are taken to be equal, whatever the units; those of a component
    must agree by that to a relative `tolerance`.
    """
    slack_unit = round(tolerance * 2**60)
    for rows, cols in components(graph):
        held, room = sum(a[i] for i in rows), sum(b[j] for j in cols)
        whole_held, whole_room = totals[rows[0]]
        left, right = held * whole_room, room * whole_held
        if abs(left - right) << 60 > slack_unit * max(left, right):
            return Cut(rows, cols, apart=True)
        if all(graph.rows[i].bit_count() == len(cols) for i in rows):  # every pair: the product of the masses is a plan
            continue
        common = math.gcd(held, room)
        flow = Flow(graph, {i: a[i] * (room // common) for i in rows}, {j: b[j] * (held // common) for j in cols})
        cut = flow.run() or flow.tight_cut()
        if cut is not None:
            return cut
    return None


def left_over(graph: Graph, a: Sequence[int], b: Sequence[int]) -> list[tuple[list[int], int]]:
    """What a largest flow leaves in the rows: for each component its rows and the mass. Masses in one unit."""
    found = []
    for rows, cols in components(graph):
        flow = Flow(graph, {i: a[i] for i in rows}, {j: b[j] for j in cols})
        flow.run()
        found.append((rows, sum(flow.excess.values())))
    return found


def components(graph: Graph) -> list[tuple[list[int], list[int]]]:
    """Rows and columns of each connected component with an entry."""
    unseen = from_members([i for i, row in enumerate(graph.rows) if row])
    found = []
    while unseen:
        new_rows, rows, cols = unseen & -unseen, 0, 0
        while new_rows:
            rows |= new_rows
            reached = 0
            for i in members(new_rows):
                reached |= graph.rows[i]
            new_rows = 0
            for j in members(reached & ~cols):
                new_rows |= graph.cols[j]
            cols |= reached
            new_rows &= ~rows
        unseen &= ~rows
        found.append((list(members(rows)), list(members(cols))))
    return found


class Flow:
    """A flow in one connected component, and what is left to move: Dinic's algorithm on sets of bits."""

    def __init__(self, graph: Graph, excess: dict[int, int], room: dict[int, int]):
        self.graph, self.excess, self.room = graph, excess, room
        self.rows, self.cols = from_members(list(excess)), from_members(list(room))
        self.total = sum(excess.values())
        self.mass = dict(excess), dict(room)
        self.open = from_members([j for j, x in room.items() if x])  # columns with room left
        self.flow: dict[int, dict[int, int]] = {j: {} for j in room}  # by column, then row
        for i in sorted(excess, key=lambda i: graph.rows[i].bit_count()):
            self._fill(i)

    def run(self) -> Cut | None:
        """Move as much as goes; the cut that stops it, if something is left."""
        while left := [i for i, x in self.excess.items() if x]:
            layers, depth = self._layers(left)
            if not layers[-1] & self.open:
                return self._stuck(left)
            layers[-1] &= self.open
            heirs: dict[int, list[int]] = {}
            for i in left:
                while self.excess[i] and self._augment(i, layers, depth, heirs):
                    pass
        return None

    def tight_cut(self) -> Cut | None:
        """Once everything is moved: rows that fill the columns they reach, leaving them to no other row."""
        start = 1 << min(self.excess, key=lambda i: self.graph.rows[i].bit_count())  # for a small cut
        return self._closed(start, forward=True) or self._closed(start, forward=False)

    def _fill(self, i: int) -> None:
        """Move from a row straight to what it reaches."""
        left, full = self.excess[i], 0
        for j in members(self.graph.rows[i] & self.open) if left else ():
            amount = min(left, self.room[j])
            self.flow[j][i] = amount
            left -= amount
            self.room[j] -= amount
            if not self.room[j]:
                full |= 1 << j
            if not left:
                break
        self.excess[i] = left
        self.open &= ~full

    def _reach(self, rows: Sequence[int]) -> int:
        found = 0
        for i in rows:
            found |= self.graph.rows[i]
        return found

    def _stuck(self, left: list[int]) -> Cut:
        """Rows that hold more than what they reach, all filled by them: as few as found from one row with excess."""
        found = min((self._layers([i])[1] for i in left[:16]), key=len)
        return Cut(list(found), list(members(self._reach(list(found)))))

    def _layers(self, frontier: list[int]) -> tuple[list[int], dict[int, int]]:
        """Columns by their distance from these rows, up to the first with room, and each row's distance."""
        depth, fresh, layers = dict.fromkeys(frontier, 0), self.cols, []
        while frontier:
            reached = self._reach(frontier) & fresh
            fresh &= ~reached
            layers.append(reached)
            if reached & self.open:
                break
            frontier = []
            for j in members(reached):
                for i in self.flow[j]:
                    if i not in depth:
                        depth[i] = len(layers)
                        frontier.append(i)
        return layers, depth

    def _augment(self, start: int, layers: list[int], depth: dict[int, int], heirs: dict[int, list[int]]) -> bool:
        """Move mass along one shortest path from `start` to a column with room; False if none is left.

        `layers` loses columns from which no path goes on; `heirs` are the rows that a column may still go on to.
        """
        rows: list[int] = [start]
        cols: list[int] = []
        while True:
            if len(cols) < len(rows):  # at a row
                choices = self.graph.rows[rows[-1]] & layers[len(cols)]
                if choices:
                    cols.append((choices & -choices).bit_length() - 1)
                    if len(cols) == len(layers):
                        break
                    continue
                rows.pop()
                if not rows:
                    return False
                heirs[cols[-1]].pop()
                continue
            j = cols[-1]
            if j not in heirs:
                heirs[j] = [i for i in self.flow[j] if depth.get(i) == len(cols)]
            while heirs[j] and heirs[j][-1] not in self.flow[j]:
                heirs[j].pop()
            if heirs[j]:
                rows.append(heirs[j][-1])
            else:
                layers[len(cols) - 1] &= ~(1 << j)
                cols.pop()
        self._move(rows, cols)
        layers[-1] &= self.open
        return True

    def _move(self, rows: list[int], cols: list[int]) -> None:
        """As much as goes along rows[0], cols[0], rows[1], ..., cols[-1]."""
        back = list(zip(cols, rows[1:], strict=False))
        amount = min([self.excess[rows[0]], self.room[cols[-1]], *(self.flow[j][i] for j, i in back)])
        for i, j in zip(rows, cols, strict=True):
            self.flow[j][i] = self.flow[j].get(i, 0) + amount
        for j, i in back:
            self.flow[j][i] -= amount
            if not self.flow[j][i]:
                del self.flow[j][i]
        self.excess[rows[0]] -= amount
        self.room[cols[-1]] -= amount
        if not self.room[cols[-1]]:
            self.open &= ~(1 << cols[-1])

    def _closed(self, start: int, forward: bool) -> Cut | None:
        """What the rows `start` reach (or, backward, what reaches them) in the residual graph, if that leaves a cut
        without slack."""
        least = self.total >> SLACK_BITS
        by_row: dict[int, list[int]] = {i: [] for i in self.excess}  # columns whose flow from the row counts
        for j, sent in self.flow.items():
            for i, x in sent.items():
                if x > least:
                    by_row[i].append(j)
        rows, cols, new_rows = 0, 0, start
        while True:
            while new_rows:
                rows |= new_rows
                if forward:
                    reached = self._reach(list(members(new_rows))) & ~cols
                    new = {i for j in members(reached) for i, x in self.flow[j].items() if x > least}
                    new_rows = from_members(list(new))
                else:
                    reached = from_members([j for i in members(new_rows) for j in by_row[i]]) & ~cols
                    new_rows = 0
                    for j in members(reached):
                        new_rows |= self.graph.cols[j]
                cols |= reached
                new_rows &= ~rows
            if rows == self.rows:
                return None  # then all columns are reached, or reach: each has an entry, and flow
            new_rows, cut = self._across(rows, cols, forward)
            if cut is not None:
                return cut

    def _across(self, rows: int, cols: int, forward: bool) -> tuple[int, Cut | None]:
        """The rows that flow across the border of a closed set leads to, or the set's cut where that is no more than
        rounding."""
        inner_rows, inner_cols = (rows, cols) if forward else (self.rows & ~rows, self.cols & ~cols)
        crossing, outside = 0, 0
        for j in members(inner_cols):
            for i, x in self.flow[j].items():
                if not inner_rows >> i & 1:
                    crossing += x
                    outside |= 1 << i
        held, room = self.mass
        inside = sum(held[i] for i in members(inner_rows)) + sum(room[j] for j in members(inner_cols))
        if crossing << SLACK_BITS <= min(inside, 2 * self.total - inside):
            return 0, Cut(list(members(inner_rows)), list(members(inner_cols)))
        if forward:
            return outside, None
        # Backward, those columns reach the set: so do the rows that can move mass to them.
        new_rows = 0
        for j in members(inner_cols):
            if any(not inner_rows >> i & 1 for i in self.flow[j]):
                new_rows |= self.graph.cols[j]
        return new_rows & ~rows, None
