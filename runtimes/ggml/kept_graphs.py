"""Graphs built on the memory of one cache, kept for the next pass of the same shape."""

from __future__ import annotations

from collections import OrderedDict
from typing import Protocol

# Graphs of few tokens kept for reuse; of those of many, whose inputs are large, only the last is.
# As many as five draft settings use over three blocks of context: building one of a small model
# takes as long as three tokens.
SMALL_GRAPHS, SMALL_GRAPH_BYTES = 48, 24 << 20
LARGE_INPUT_BYTES = 512 << 10


class PassShape(Protocol):
    """What a graph depends on; hashable. Inputs of a `large` one take much memory."""

    @property
    def large(self) -> bool: ...


class Reusable(Protocol):
    """A graph kept for reuse. `current`: whether its scratch addresses are still valid."""

    @property
    def current(self) -> bool: ...

    @property
    def nbytes(self) -> int: ...

    def close(self) -> None: ...


class KeptGraphs:
    """Graphs by shape, the one used longest ago first."""

    def __init__(self) -> None:
        self._graphs: OrderedDict[PassShape, Reusable] = OrderedDict()

    def __len__(self) -> int:
        return len(self._graphs)

    @property
    def nbytes(self) -> int:
        """Bytes of all of them, inputs included."""
        return sum(graph.nbytes for graph in self._graphs.values())

    def find(self, shape: PassShape) -> Reusable | None:
        """The graph of a shape, if it is still valid."""
        found = self._graphs.get(shape)
        if found is None:
            return None
        if not found.current:
            self._graphs.pop(shape).close()
            return None
        self._graphs.move_to_end(shape)
        return found

    def drop_large(self) -> None:
        """Free the graph of many tokens: before another one is built, or to have its memory."""
        for shape in [shape for shape in self._graphs if shape.large]:
            self._graphs.pop(shape).close()

    def keep(self, shape: PassShape, graph: Reusable) -> None:
        """Keep `graph`; those used longest ago go when there are too many."""
        if shape.large:
            self.drop_large()
        self._graphs[shape] = graph
        small = [shape for shape in self._graphs if not shape.large]
        nbytes = sum(self._graphs[shape].nbytes for shape in small)
        while len(small) > SMALL_GRAPHS or (len(small) > 1 and nbytes > SMALL_GRAPH_BYTES):
            old = self._graphs.pop(small.pop(0))
            nbytes -= old.nbytes
            old.close()

    def close(self) -> None:
        """Free all."""
        for graph in self._graphs.values():
            graph.close()
        self._graphs.clear()
