"""Partial attention and merge as small fixed cases (see conformance.py).

What is expected is a plain softmax over all that a row sees, in float64, rounded to float32. So it
depends on no kernel, no order of sums and no library. How near an answer has to come is a bound on
what rounding does to it, not on what this implementation happens to give.
"""

import math
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from conformance_cases import Case, Draws, Kind, column  # noqa: E402
from kernels import merge, partial_attention  # noqa: E402
from work import KVSpans, QueryRows, Work  # noqa: E402

# Unit roundoff.
SINGLE = 2.0**-24
HALF = 2.0**-8  # of bfloat16
BLOCK = 16  # rows, of the cases that are `paged`


def tensor(values, dtype=torch.float32) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(dtype)


def rounded_up(tolerance: float) -> float:
    """In two digits: so the last bit of how it was computed does not matter."""
    return float(f"{tolerance * 1.05:.1e}")


# ── partial attention ────────────────────────────────────────────────────────────────────────────


def answer_partial_attention(given: dict) -> dict:
    """Attention of query rows over spans of a slab, and its log-sum-exp. Rows of one *reader* read
    the same spans; a row sees the keys of its reader's spans at positions up to its own. With
    scores s_j = scale · q·k_j of the keys that it sees, lse = ln Σ exp(s_j) (the natural one) and
    o = Σ exp(s_j - lse)·v_j. Head h of q sees KV head floor(h · Hkv / H). A row that sees no key
    has o = 0 and lse = -inf, never NaN. Slab rows outside the spans are never used: they are NaN
    here. Those inside are finite, also where no row sees them: a kernel may read and mask them.

    Cases that are `paged` are for kernels over paged blocks: heads of 64 or 128 values in bfloat16;
    a reader's spans are whole blocks of 16 slab rows, in the order of its block table, from
    position 0 on; its rows of q follow each other; and they see all of these, or as in a causal
    mask that is aligned at the end. Such a kernel may skip all others (`--case` compares with these
    alone), but has to give lse.

    - input: `q` [T, H, D]; `slab` [rows, 2, Hkv, D], of each row key and value; `scale`; `rows`,
      a table with an entry for each query row: `reader`, `row` of q (in any order), `position`, by
      reader and then position; `spans`, a table: `reader`, `first_row` of the slab, `length` (never
      0), `position` of the first row. Spans of a reader do not overlap in position, and a slab row
      has one position for all
    - output: `o` [T, H, D] and `lse` [T, H], computed in float32 at least (o may be rounded to the
      type of q)"""
    q = given["q"]
    slab = given["slab"]
    rows = QueryRows(*(column(given["rows"][name]) for name in QueryRows._fields))
    spans = KVSpans(*(column(given["spans"][name]) for name in KVSpans._fields))
    work = Work(rows, spans, q.shape[1], slab.shape[2], q.dtype)
    o, lse = partial_attention(q, slab, work, given["scale"])
    return dict(o=o, lse=lse)


def attend(q, kv, scale) -> tuple[torch.Tensor, torch.Tensor]:
    """One row in float64: q [H, D], kv [n, 2, Hkv, D] → o [H, D], lse [H]."""
    H, _ = q.shape
    n, _, Hkv, _ = kv.shape
    if not n:
        return torch.zeros_like(q).double(), torch.full((H,), -math.inf).double()
    keys, values = kv.double().repeat_interleave(H // Hkv, 2).unbind(1)
    s = torch.einsum("hd,nhd->hn", q.double(), keys) * scale
    lse = s.logsumexp(1)
    return torch.einsum("hn,nhd->hd", (s - lse[:, None]).exp(), values), lse


def expect_partial_attention(given: dict) -> dict:
    q = given["q"]
    o = torch.zeros(q.shape)
    lse = torch.zeros(q.shape[:2])
    spans = list(zip(*(given["spans"][name] for name in KVSpans._fields)))
    for reader, row, position in zip(
        *(given["rows"][name] for name in QueryRows._fields)
    ):
        seen = [
            first_row + i
            for its_reader, first_row, length, first in spans
            for i in range(length)
            if its_reader == reader and first + i <= position
        ]
        o[row], lse[row] = attend(q[row], given["slab"][seen], given["scale"])
    return dict(o=o, lse=lse)


BOUND = (
    "rounding to float32, u = 2^-24: a score is off by s = (D + 2)·u·scale·Σ|q·k| at most, lse by "
    "s + (keys + parts + 8)·u + 4·u·scale·Σ|q·k|, o by (2·s + (2·keys + 2·parts + 20)·u)·max|v|"
)
BOUND_16 = f"{BOUND}; weights and o may be rounded to bfloat16: 3·2^-8·max|v| more"


def attention_tolerance(q, kv, scale, parts=1) -> tuple[float, float]:
    """Of o and lse of rows q [T, H, D], none of which sees other KV than kv [n, 2, Hkv, D], in so
    many parts: BOUND."""
    n, _, Hkv, D = kv.shape
    if not len(q) or not n:
        return 0.0, 0.0
    keys, values = kv.double().unbind(1)
    largest = keys.abs().repeat_interleave(q.shape[1] // Hkv, 1).amax(0)
    size = torch.einsum("thd,hd->th", q.abs().double(), largest).max().item() * scale
    score = (D + 2) * SINGLE * size
    lse = score + (n + parts + 8) * SINGLE + 4 * SINGLE * size
    o = 2 * score + (2 * n + 2 * parts + 20) * SINGLE
    o += 3 * HALF * (q.dtype == torch.bfloat16)
    return rounded_up(o * values.abs().max().item()), rounded_up(lse)


def attention_case(
    name,
    shows,
    rows,
    spans,
    heads=(2, 1, 4),
    dtype=torch.float32,
    size=2.0,
    scale=None,
    order=None,
):
    """rows: (reader, position); spans: (reader, first row, length, position); heads: H, Hkv, D;
    size: of q's entries, at most; scale: D^-0.5 if not said otherwise; order: the row of q of each
    of `rows`."""
    q, slab, is_used = draw_attention(len(rows), spans, heads, dtype, size)
    scale = heads[-1] ** -0.5 if scale is None else scale
    o, lse = attention_tolerance(q, slab[is_used], scale)
    slab[~is_used] = math.nan
    order = order or range(len(rows))
    rows = [(reader, row, position) for row, (reader, position) in zip(order, rows)]
    given = dict(q=q, slab=slab, scale=scale)
    given |= dict(rows=table_of(QueryRows, rows), spans=table_of(KVSpans, spans))
    because = BOUND_16 if dtype == torch.bfloat16 else BOUND
    return Case(name, shows, given, dict(o=dict(within=o), lse=dict(within=lse)), because)


def draw_attention(T, spans, heads, dtype, size):
    """q, a slab, and which of its rows are in spans. Behind these it has two rows, but not if they
    end at a block's end."""
    H, Hkv, D = heads
    end = max((first + length for _, first, length, _ in spans), default=0)
    is_used = np.zeros(end + 2 if end % BLOCK else end, bool)
    for _, first, length, _ in spans:
        is_used[first : first + length] = True
    draws = Draws(1)
    q = tensor(draws.uniform(T, H, D) * size, dtype)
    slab = tensor(draws.uniform(len(is_used), 2, Hkv, D), dtype)
    return q, slab, is_used


def table_of(kind, entries) -> dict:
    """Columns of a table."""
    return {name: [entry[i] for entry in entries] for i, name in enumerate(kind._fields)}


# Six rows, and what they read: two spans before them, and their own.
PIECE = [(0, position) for position in range(8, 14)]
THREE_SPANS = [(0, 10, 4, 0), (0, 2, 4, 4), (0, 16, 6, 8)]


def partial_attention_cases() -> list[Case]:
    return [*visible_cases(), *precision_cases(), *paged_cases()]


def visible_cases():
    """Which keys a row sees."""
    said = "Softmax over one key: o is its value, lse its score."
    yield attention_case("one key", said, [(0, 0)], [(0, 1, 1, 0)])
    said = "Rows at positions 8 to 13 over three spans, the last one their own: each sees up to "
    said += "itself. Spans do not lie in order of position."
    yield attention_case("causal inside a piece", said, PIECE, THREE_SPANS)
    said = "8 query heads share 2 of KV: heads 0 to 3 see the first."
    yield attention_case("grouped heads", said, PIECE[:3], THREE_SPANS, (8, 2, 8))
    said = "Rows at 0 and 1 over keys from 2 on see none: o = 0, lse = -inf. Those at 2 and 5 see "
    said += "one and four."
    rows = [(0, position) for position in (0, 1, 2, 5)]
    yield attention_case("no visible keys", said, rows, [(0, 3, 4, 2)])
    said = "Reader 1 has no spans: o = 0 and lse = -inf are written all the same."
    yield attention_case("no spans", said, [(0, 3), (1, 3)], [(0, 0, 4, 0)])
    said = "Three readers of two rows see 20 keys together, and two of their own each: to read "
    said += "them once for all is the same as to read them thrice."
    rows = [(reader, position) for reader in range(3) for position in (20, 21)]
    spans = [(reader, 0, 20, 0) for reader in range(3)]
    spans += [(reader, 22 + 3 * reader, 2, 20) for reader in range(3)]
    yield attention_case("a shared prefix", said, rows, spans, (4, 2, 8))
    said = "No query row, T = 0: o has the shape [0, 2, 4], lse [0, 2]."
    yield attention_case("no rows", said, [], [])
    said = "Rows of q are not in order of their positions: o and lse stand where q does."
    rows = [(0, 5), (0, 7), (1, 6), (1, 8)]
    spans = [(0, 1, 8, 0), (1, 1, 4, 0), (1, 12, 5, 4)]
    yield attention_case("rows in another order", said, rows, spans, order=[2, 0, 3, 1])
    said = "`causal inside a piece` with a scale of 0.3, where D^-0.5 would be 0.5."
    yield attention_case("another scale", said, PIECE, THREE_SPANS, scale=0.3)
    said = "150 keys, three heads of 6 values: sizes need be no power of two."
    yield attention_case(
        "odd sizes", said, [(0, 100), (0, 150)], [(0, 1, 150, 0)], (3, 1, 6)
    )


def precision_cases():
    """Scores in the hundreds, and 16 bits."""
    said = "exp of such scores has no float32: a maximum has to be taken off first."
    yield attention_case("large scores", said, PIECE, THREE_SPANS, size=400.0)
    heads = 8, 2, 8
    said = "`causal inside a piece` in bfloat16, with grouped heads."
    bf16 = torch.bfloat16
    yield attention_case("bf16", said, PIECE, THREE_SPANS, heads, bf16)
    said = "The same with scores in the hundreds."
    yield attention_case(
        "large scores in bf16", said, PIECE, THREE_SPANS, heads, bf16, 400.0
    )


def paged_cases():
    """Two readers of two blocks, of which they share the first. Slab rows 32 to 47 are nobody's."""
    spans = [(0, 48, 16, 0), (0, 0, 16, 16), (1, 48, 16, 0), (1, 16, 16, 16)]
    said = "Rows behind all 32 keys see all of them: no mask. Block tables [3, 0] and [3, 1]."
    rows = [(0, 40), (1, 50), (1, 51)]
    bf16 = torch.bfloat16
    case = attention_case("paged and no mask", said, rows, spans, (4, 2, 64), bf16)
    yield case._replace(paged=True)
    said = "The last two and three rows of 32 tokens: causal, aligned at the end. Block tables as "
    said += "before."
    rows = [(0, 30), (0, 31), (1, 29), (1, 30), (1, 31)]
    case = attention_case("paged and causal", said, rows, spans, (2, 1, 128), bf16)
    yield case._replace(paged=True)


# ── merge ────────────────────────────────────────────────────────────────────────────────────────


def answer_merge(given: dict) -> dict:
    """Joins partial results (o_p, lse_p) of each row, per head: lse = ln Σ exp(lse_p), o = Σ
    exp(lse_p - lse)·o_p. A part with lse_p = -inf is empty, and its o_p is not used, even if it is
    NaN. A row whose parts are all empty, or that has none, comes out as o = 0 and lse = -inf.

    - input: `o` [P, H, D] and `lse` [P, H] of all parts; `parts` [rows][the most that one has], the
      parts of each row, -1 where it has fewer; [] if there are no rows
    - output: `o` [rows, H, D], `lse` [rows, H], computed in float32 at least. (lse is float32 even
      where o is bfloat16, as results travel.)"""
    lse = given["lse"]
    parts = torch.from_numpy(column(given["parts"]))
    parts = parts if len(parts) else parts[:, None]
    o, lse = merge(given["o"].to(lse.dtype), lse, parts)
    return dict(o=o, lse=lse)


def expect_merge(given: dict) -> dict:
    """In float64, row by row."""
    _, H, D = given["o"].shape
    o = torch.zeros(len(given["parts"]), H, D)
    lse = torch.full((len(given["parts"]), H), -math.inf)
    for row, parts in enumerate(given["parts"]):
        used = [part for part in parts if part >= 0]
        if used:
            part_lse = given["lse"][used].double()
            total = part_lse.logsumexp(0)
            weight = (part_lse - total).exp().nan_to_num(0)[..., None]
            part_o = given["o"][used].double().masked_fill(weight == 0, 0)
            o[row] = (weight * part_o).sum(0)
            lse[row] = total
    return dict(o=o, lse=lse)


def merge_case(name, shows, lse, parts, dtype=torch.float32, nan=()) -> Case:
    """lse: of each part, one for each head; nan: parts whose o is."""
    lse = tensor(np.array(lse))
    o = tensor(Draws(3).uniform(*lse.shape, 4), dtype)
    largest = lse.where(lse.isfinite(), 0).abs().max().item()
    P = len(parts[0]) if parts else 0
    o_within = (2 * P + 10) * SINGLE + HALF * (dtype == torch.bfloat16)
    lse_within = (P + 6 + 2 * largest) * SINGLE
    compare = dict(o=o_within * o.abs().max().item(), lse=lse_within)
    compare = {
        field: dict(within=rounded_up(within)) for field, within in compare.items()
    }
    o[list(nan)] = math.nan
    because = "rounding to float32, u = 2^-24: o by (2·parts + 10)·u·max|o|, lse by (parts + 6 + "
    because += "2·max|lse|)·u"
    if dtype == torch.bfloat16:
        because += "; o may be rounded to bfloat16: 2^-8·max|o| more"
    return Case(name, shows, dict(o=o, lse=lse, parts=parts), compare, because)


def merge_cases() -> list[Case]:
    return [*number_of_parts_cases(), *empty_part_cases(), *size_of_lse_cases()]


THREE_PARTS = [[0.5, -1.0], [2.0, 0.0], [-3.0, 1.5]]


def number_of_parts_cases():
    """Of two heads."""
    yield merge_case(
        "two parts", "A mean, weighted by exp(lse).", THREE_PARTS[:2], [[0, 1]]
    )
    said = "Both weigh a half, and lse is ln 2 more."
    yield merge_case("equal parts", said, [[1.0], [1.0]], [[0, 1]])
    orders = [[0, 1, 2], [2, 1, 0], [1, 2, 0]]
    said = "The parts of a row in three orders come to the same."
    yield merge_case("any order", said, THREE_PARTS, orders)
    said = "The same with o in bfloat16."
    yield merge_case("any order in bf16", said, THREE_PARTS, orders, torch.bfloat16)
    yield merge_case("one part", "It comes out as it went in.", THREE_PARTS, [[1]])
    said = "-1 where a row has fewer parts than another."
    fewer = [[0, 1, 2], [1, -1, -1], [2, 0, -1]]
    yield merge_case("fewer parts", said, THREE_PARTS, fewer)


def empty_part_cases():
    """Parts that have seen no key."""
    none = -math.inf
    said = "No row: o has the shape [0, 2, 4], lse [0, 2]."
    yield merge_case("no rows", said, THREE_PARTS[:1], [])
    said = "A row without a part: o = 0, lse = -inf."
    yield merge_case("no part", said, THREE_PARTS[:1], [[-1, -1], [0, -1]])
    said = "A part with lse = -inf weighs nothing, though its o is NaN."
    lse = [[0.5, 1.0], [none, none]]
    yield merge_case("one is empty", said, lse, [[0, 1], [1, 0]], nan=[1])
    said = "Head 0 of the second part is empty, head 1 is not."
    yield merge_case("empty in one head", said, [[0.5, 1.0], [none, 2.0]], [[0, 1]])
    said = "o = 0 and lse = -inf, not NaN, whatever their o is."
    yield merge_case("both are empty", said, [[none], [none]], [[0, 1]], nan=[0, 1])


def size_of_lse_cases():
    """Of one head."""
    said = "exp(10,000) overflows: the larger one has to be taken off first."
    yield merge_case("very large", said, [[10_000.0], [10_001.0]], [[0, 1]])
    said = "exp(-10,000) is 0: the larger one has to be taken off first."
    yield merge_case("very small", said, [[-10_000.0], [-10_001.0]], [[0, 1]])
    said = "One weighs e^-20,000 or e^-10,000 of the other, which is nothing."
    lse = [[-10_000.0], [10_000.0], [0.0]]
    yield merge_case("far apart", said, lse, [[0, 1, -1], [0, 2, -1], [2, 1, 0]])
    said = "lse of ±3e38, whose difference is infinite: the larger one counts alone."
    yield merge_case("as large as there is", said, [[3e38], [-3e38]], [[0, 1]])


KINDS = dict(
    partial_attention=Kind(
        partial_attention_cases, answer_partial_attention, expect_partial_attention
    ),
    merge=Kind(merge_cases, answer_merge, expect_merge),
)


if __name__ == "__main__":
    print(__doc__)
