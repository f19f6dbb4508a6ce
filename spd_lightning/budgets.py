"""Limits of memory, in one place, each with its unit.

Work that grows with prompts, positions or components is done in pieces. A limit here says how large
a piece may be, which does not change a result. The exception is `MAX_EDGES`: a graph with more
edges loses its weakest ones, with a warning. The numbers suit a computer with 16 GB of memory.
"""

# ---- attribution: numbers of a piece -------------------------------------------------------------

MAX_VJP_NUMBERS = 1 << 20
"""Floating-point numbers in one batched vector-Jacobian product, few enough for the processor's
cache.
"""

MAX_ATTENTION_EDGES = 1 << 17
"""Edges through attention that are computed at once, few enough for the processor's cache."""

MAX_SPREAD_NUMBERS = 1 << 22
"""Floating-point numbers of tangents that have spread to other positions."""

MAX_TRIAL_NUMBERS = 1 << 24
"""Floating-point numbers in one forward pass of interventions that check a graph."""

MAX_EDGES = 1 << 25
"""Edges of one prompt's graph."""

# ---- harvest: what is in memory until it is written ----------------------------------------------

MAX_TOTAL_EDGES = 1 << 27
"""Edges of the graphs of all prompts that are harvested together."""

MAX_COMPONENT_NUMBERS = 1 << 25
"""Entries of one array over all prompts, positions and components that are harvested together."""

MAX_POSITION_PAIRS = 1 << 16
"""Pairs of positions, over all prompts whose edges are in memory together."""

MAX_SUM_ROWS = 1 << 23
"""Rows of sums in memory above which rows with the same keys are added up."""

MAX_FIRING_PAIRS = 1 << 27
"""Pairs of units that fire at the same positions, counted in one sparse product."""

MAX_STATISTICS_ROWS = 1 << 25
"""Counts of pairs and tokens in memory above which a group of prompts is written early."""

MAX_UNCOMMITTED_SECONDS = 300.0
"""Seconds of work that a killed harvest can lose, apart from the last batch."""

# ---- estimates of memory, in multiples of one array ----------------------------------------------

LOGIT_ARRAYS = 4
"""Arrays of logits in memory during a harvest."""

CIRCUIT_ARRAYS = 4
"""Arrays over all components in memory during a step of a circuit search."""

HEAD_ROWS = 8
"""Rows of edges through attention by head, relative to rows without heads."""

# ---- estimates of memory, in bytes ---------------------------------------------------------------

GRAPH_EDGE_BYTES = 40
"""Bytes of one edge of a prompt's graph until it is written: as arrays, and as rows."""

SUM_ROW_BYTES = 100
"""Bytes of one row of sums over prompts: as rows, and while rows with the same keys are added."""

FIRING_SHARE = 0.1
"""The assumed share of components that fire at a position, at most."""

FIRING_BYTES = 200
"""Bytes of one firing of a batch: its place and values, and its keys as an example of each kind."""

EXAMPLE_BYTES = 200
"""Bytes of one example: as rows, and while they are sorted."""

COUNT_BYTES = 120
"""Bytes of one count: in the sum so far, in the next sum, and as rows while they are sorted."""

LIBRARY_BYTES = 600 << 20
"""Bytes of Python with torch and the other libraries."""
