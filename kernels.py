"""Partial attention and merge: how can a softmax be computed in pieces?

For one query row and a set S of keys, with scores s_j = q·k_j·scale, the textbook has

    o(S) = Σ_j exp(s_j)·v_j / Σ_j exp(s_j)          lse(S) = ln Σ_j exp(s_j)

and for any partition of S into parts (each wherever it likes)

    lse = ln Σ_p exp(lse_p)                          o = Σ_p exp(lse_p − lse)·o_p

so a row's attention over a cache in pieces is a weighted mean of what the pieces return: the one
fact the pool rests on. `partial_attention` gives (o, lse) of rows over spans of a slab, `merge`
joins parts. Both subtract a maximum before exp (the textbook form overflows). An empty part is
written, too: as o = 0 and lse = −inf, never as NaN.

work.py cuts what is to be done into pieces. What a piece gives for a row is the row's *result*, if
that has no other part. Else it is a *partial row*, and `merge` joins those of one row, whether they
come from pieces, from groups, or from another GPU. `Outputs` has both:

    0 … T − 1      results of the rows of q, in the model's type ◀──────┐ merge
    T … T + P − 1  partial rows, in float32 at least ───────────────────┘

Two implementations: Triton, and PyTorch for CPUs and float64. A slab has a token's key and value
side by side, as one row. Left out: Hopper's copy engine (TMA).

Notation: T rows · H query heads · Hkv KV heads · G = H / Hkv · D head dim · P partial rows.
"""

import math
import os
from typing import NamedTuple

import numpy as np
import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this platform: PyTorch serves
    triton = None

from work import (
    MAX_LANES,
    MIN_LANES,
    TILE,
    AtOnce,
    Column,
    KVSpans,
    Members,
    Pieces,
    QueryRows,
    Tiles,
    Work,
    is_cuda,
    next_power_of_2,
    ranges,
    rows_of_a_block,
    run_lesson,
    split_lengths,
    tables_to_device,
)

# A program merges eight heads of a row where rows are at least so many, else one: so few rows keep
# a GPU busy, too.
MANY_MERGED_ROWS = 128
# Registers of a multiprocessor hold so many attention programs with few lanes; one with many takes
# them all.
FEW_LANES_IN_REGISTERS = 3


# ── outputs: results and partial rows ────────────────────────────────────────────────────────────


class MergeTable(NamedTuple):
    """An entry is a row whose result `merge` makes."""
    rows: Column | torch.Tensor
    # [entries, the most that one has] its partial rows, counted from 0; −1 where it has fewer.
    parts: Column | torch.Tensor


def number_outputs(output_rows, num_came, num_rows):
    """Where each output goes: below num_rows it is the result of its row, which has no other;
    else, less num_rows, a partial row. output_rows: [outputs] the row of q of each; the last
    num_came come from elsewhere, and are partial rows always. → [outputs] its number; [P] the row
    of q of each partial row; the rows that have no result yet, ascending."""
    is_result = np.bincount(output_rows, minlength=num_rows)[output_rows] == 1
    is_result[len(output_rows) - num_came :] = False
    number = num_rows + np.cumsum(~is_result) - 1
    is_missing = np.ones(num_rows, bool)
    is_missing[output_rows[is_result]] = False
    number = np.where(is_result, output_rows, number)
    return number, output_rows[~is_result], np.flatnonzero(is_missing)


def list_parts(partial_rows, rows) -> MergeTable:
    """The merge of some rows, ascending; partial_rows: [P] the row of each. One with a single part
    may be among them: it came from elsewhere; one without a part comes out empty."""
    if not len(rows):
        return MergeTable(rows, np.zeros((0, 0), np.int64))
    order = np.argsort(partial_rows, kind="stable")
    in_order = partial_rows[order]
    first = np.searchsorted(in_order, rows)
    count = np.searchsorted(in_order, rows, side="right") - first
    parts = np.full((len(rows), count.max(initial=0)), -1, np.int64)
    entry, number, _ = split_lengths(count, 1)
    parts[entry, number] = order[ranges(first, count)]
    return MergeTable(rows, parts)


class Outputs:
    """What Works give for the rows of q: their results, [T, H, D] with log-sum-exps [T, H], and the
    partial rows behind them, [P, H, D] and [P, H]. Every layer uses the same.

    works: all that write here. sections: lengths of sections of rows, whose results are completed
    at different times. came_rows: the row of each partial row that comes from elsewhere, once for
    each holder; these are the last ones. dtype: of the results."""
    def __init__(
        self,
        works,
        sections,
        came_rows,
        num_heads,
        head_dim,
        dtype,
        device,
        use_triton,
    ):
        self.use_triton = use_triton
        self.num_rows = sum(sections)
        self.dtype = dtype
        self.num_came = len(came_rows)
        came_rows = np.asarray(came_rows, np.int64)
        rows = [*(work.output_rows for work in works), came_rows]
        number, partial_rows, missing = number_outputs(
            np.concatenate(rows), len(came_rows), self.num_rows
        )
        ends = np.cumsum(sections)
        by_section = np.split(missing, np.searchsorted(missing, ends[:-1]))
        merges = [list_parts(partial_rows, rows) for rows in by_section]
        self.is_complete = [not len(rows) for rows in by_section]
        num_outputs = self.num_rows + len(partial_rows)
        numbers = np.split(number, np.cumsum(list(map(len, rows)))[:-1])
        tables = [work.number_outputs(its, num_outputs) for work, its in zip(works, numbers)]
        on_device = tables_to_device([*tables, *merges], device)
        self.merges = on_device[len(works) :]
        self._allocate(num_outputs, num_heads, head_dim, device)
        self.results = [*zip(self.o.split(sections), self.lse.split(sections))]
        for work, tables in zip(works, on_device):
            work.tables = tables
            work.launches = launches_of(work, head_dim) if use_triton else None

    def _allocate(self, num_outputs, H, D, device):
        wide = torch.promote_types(self.dtype, torch.float32)
        T = self.num_rows

        def empty(rows, dtype=wide):
            o = torch.empty(rows, H, D, dtype=dtype, device=device)
            return o, torch.empty(rows, H, dtype=wide, device=device)

        if self.use_triton:
            self.o, self.lse = empty(T, self.dtype)
            self.partial_o, self.partial_lse = empty(num_outputs - T)
            return
        # PyTorch writes results and partial rows alike, and one more: what padding gives.
        self.all_o, self.all_lse = empty(num_outputs + 1)
        self.o, self.lse = self.all_o[:T], self.all_lse[:T]
        self.partial_o, self.partial_lse = self.all_o[T:-1], self.all_lse[T:-1]

    def partial_attention(self, q, kv, work, scale):
        """What a Work gives, over its slab [slab rows, 2, Hkv, D]."""
        attend = _attend_with_triton if self.use_triton else _attend_with_torch
        attend(q, kv, work, scale, self)

    def take(self, o, lse):
        """Partial rows from elsewhere, in any type: those of came_rows."""
        first = len(self.partial_o) - self.num_came
        self.partial_o[first:].copy_(o)
        self.partial_lse[first:].copy_(lse)

    def merge(self, section=0):
        """Completes the results of a section → its o, lse."""
        if not self.is_complete[section]:
            merge = _merge_with_triton if self.use_triton else _merge_with_torch
            merge(self.partial_o, self.partial_lse, self.merges[section], self.o, self.lse)
        o, lse = self.results[section]
        return (o if o.dtype == self.dtype else o.to(self.dtype)), lse


def check_grid(x, y=1):
    """Raises ValueError for more programs than CUDA launches at once."""
    if x >= 2**31 or y >= 2**16:
        raise ValueError(f"{x:,} × {y:,} programs, a GPU takes 2**31 - 1 × 65,535")


def programs_at_once(device, head_dim, dtype) -> AtOnce:
    """Programs of `_partial_attention_kernel`. Those with few lanes are as many as shared memory
    and registers hold."""
    if not is_cuda(device):
        return AtOnce()
    properties = torch.cuda.get_device_properties(device)
    config = attention_config(MIN_LANES, 1, 1, head_dim, dtype.itemsize)
    tiles = 2 * (config["num_stages"] - 1)
    tile_bytes = TILE * config["DPAD"] * dtype.itemsize
    fit = properties.shared_memory_per_multiprocessor // (tiles * tile_bytes)
    processors = properties.multi_processor_count
    return AtOnce(processors * max(1, min(fit, FEW_LANES_IN_REGISTERS)), processors)


# ── partial attention ────────────────────────────────────────────────────────────────────────────


def suits_triton(device, dtype, head_dim) -> bool:
    """A GPU, but for float64, and for heads over 512 bytes, of which shared memory does not hold
    two tiles."""
    if triton is None or not is_cuda(device) or dtype == torch.float64:
        return False
    return head_dim * dtype.itemsize <= 512


def _chooses_triton(backend, x) -> bool:
    return backend == "triton" or (
        backend == "auto" and suits_triton(x.device, x.dtype, x.shape[-1])
    )


def partial_attention(q, kv, work, scale, backend: str = "auto"):
    """Attention of query rows over spans of a slab, and its log-sum-exp (natural log), of one Work.

    q [T, H, D], kv [slab rows, 2, Hkv, D] → o [T, H, D], lse [T, H], in float32 (float64 for
    float64 input). Every row is written; without a visible key it is o = 0, lse = −inf. What lies
    in slab rows outside the spans is never used, NaN included (one inside a reader's spans may
    reach all of its rows). backend: `torch`, `triton`, or `auto`: see `suits_triton`."""
    T, H, D = q.shape
    use_triton = _chooses_triton(backend, q)
    wide = torch.promote_types(q.dtype, torch.float32)
    outputs = Outputs([work], [T], [], H, D, wide, q.device, use_triton)
    outputs.partial_attention(q, kv, work, scale)
    return outputs.merge()


class Launch(NamedTuple):
    """Of `_partial_attention_kernel`."""
    grid: tuple[int, int]
    pieces: torch.Tensor  # [pieces, columns of Pieces]
    config: dict  # see `attention_config`


def launches_of(work, head_dim) -> list[Launch]:
    """Those of a Work: pieces with few lanes, and with many."""
    launches = []
    for lanes, pieces in (MIN_LANES, work.tables.few), (work.many_lanes, work.tables.many):
        if len(pieces):
            grid = len(pieces), work.num_kv_heads
            check_grid(*grid)
            heads = work.num_heads, work.num_kv_heads, head_dim
            config = attention_config(lanes, *heads, work.dtype.itemsize)
            launches.append(Launch(grid, pieces, config))
    return launches


def _attend_with_triton(q, kv, work, scale, outputs):
    _, H, D = q.shape
    row_heads = q.stride(0) // D
    if q.stride() != (row_heads * D, D, 1):
        q = q.contiguous()
        row_heads = H
    for launch in work.launches:
        _partial_attention_kernel[launch.grid](
            q,
            kv,
            work.tables.members,
            launch.pieces,
            work.tables.tiles,
            work.tables.numbers,
            outputs.o,
            outputs.lse,
            outputs.partial_o,
            outputs.partial_lse,
            outputs.num_rows,
            scale,
            Q_HEADS=row_heads,
            **launch.config,
        )


def _attend_with_torch(q, kv, work, scale, outputs):
    """A batch of padded pieces at a time, in float32 at least."""
    _, _, D = q.shape
    query = (q.to(outputs.all_o.dtype) * scale).reshape(-1, D)
    for batch in work.batches:
        rows = batch.target_rows.flatten()
        batch_o, batch_lse = _attend_batch(query, kv, batch)
        outputs.all_o.view(-1, D).index_copy_(0, rows, batch_o.view(-1, D))
        outputs.all_lse.view(-1).index_copy_(0, rows, batch_lse.flatten())


def _attend_batch(query, kv, batch):
    """→ o [Hkv · b, G · m, D], lse [Hkv · b, G · m, 1] of a padded batch; query [T · H, D] is
    scaled."""
    _, _, Hkv, D = kv.shape

    def read(which):  # 0: keys, 1: values → [Hkv · b, n, D]
        if isinstance(batch.kv_rows, slice):
            return kv[batch.kv_rows, which].transpose(0, 1).to(query.dtype)
        return gather(kv.view(-1, D)[which * Hkv :], batch.kv_rows).to(query.dtype)

    s = gather(query, batch.query_rows) @ read(0).mT  # [Hkv · b, G · m, n]
    if batch.hidden is not None:
        b, _, m, n = batch.hidden.shape
        s.view(Hkv, b, -1, m, n).masked_fill_(batch.hidden, -math.inf)
    # A row that sees nothing has a maximum of −inf, and p = 0.
    top = s.amax(-1, keepdim=True)
    p = s.sub_(top.clamp(min=torch.finfo(s.dtype).min)).exp_()
    # At least 1 with a visible key, as the maximum gives 1. Without one it is 0.
    total = p.sum(-1, keepdim=True)
    return (p @ read(1)).div_(total.clamp(min=1)), top + total.log()


def gather(x, rows):
    """Rows of x [n, D] by a table of their numbers [i, j] → [i, j, D]."""
    return x.index_select(0, rows.flatten()).view(*rows.shape, -1)


# ── merge ────────────────────────────────────────────────────────────────────────────────────────


def merge(o, lse, parts, backend: str = "auto"):
    """Joins the parts of each row in one pass (pairwise merging rounds more often).

    o [P, H, D], lse [P, H], parts [rows, max_parts], −1 where a row has fewer parts → o
    [rows, H, D], lse [rows, H], of the input's type. o is not read where its lse is −inf. Rows
    whose parts are all empty, or that have none, come out empty: o = 0, lse = −inf."""
    rows = torch.arange(len(parts), device=o.device)
    out = o.new_empty(len(parts), *o.shape[1:])
    out_lse = lse.new_empty(len(parts), lse.shape[1])
    table = MergeTable(rows, parts.contiguous())
    merge = _merge_with_triton if _chooses_triton(backend, o) else _merge_with_torch
    merge(o.contiguous(), lse.contiguous(), table, out, out_lse)
    return out, out_lse


def _merge_with_triton(o, lse, table, out, out_lse):
    """Writes the rows of the table."""
    entries, max_parts = table.parts.shape
    _, H, D = o.shape
    heads = 1 if entries < MANY_MERGED_ROWS else 8
    grid = entries, -(-H // heads)
    check_grid(*grid)
    if entries:
        _merge_kernel[grid](
            o,
            lse,
            table.rows,
            table.parts,
            out,
            out_lse,
            max_parts,
            H=H,
            D=D,
            HEADS=heads,
            PARTS=16 // heads,
            DPAD=next_power_of_2(D),
        )


def _merge_with_torch(o, lse, table, out, out_lse):
    """Writes the rows of the table."""
    rows, parts = table
    if not o.numel() or not parts.numel():
        out[rows] = 0
        out_lse[rows] = -math.inf
        return
    index = parts.clamp(min=0).long()
    absent = (parts < 0)[:, :, None]
    part_lse = lse[index].masked_fill(absent, -math.inf)  # [rows, max_parts, H]
    top = part_lse.amax(1, keepdim=True)
    weight = torch.exp(part_lse - torch.where(top == -math.inf, 0, top))
    total = weight.sum(1)  # [rows, H]; 0 without a part, else 1 at least
    part_o = o[index].masked_fill((part_lse == -math.inf)[..., None], 0)
    mean = (weight[..., None] * part_o).sum(1) / total.clamp(min=1)[..., None]
    out.index_copy_(0, rows, mean)
    out_lse.index_copy_(0, rows, top[:, 0] + total.log())


# ── the model's ──────────────────────────────────────────────────────────────────────────────────


def rotate(x, cos, sin):
    """RoPE in place, see model.rope: x [T, heads, D], its rows maybe a part of wider ones; cos and
    sin [T, D / 2]."""
    T, heads, D = x.shape
    if T:
        _rotate_kernel[(T,)](
            x,
            cos,
            sin,
            ROW=x.stride(0),
            HEADS=heads,
            HALF=D // 2,
            HEADSPAD=next_power_of_2(heads),
            HALFPAD=next_power_of_2(D // 2),
        )


def warm_up(num_heads, num_kv_heads, row_heads, head_dim, dtype, device):
    """Compiles all that can be launched for such heads: else a request waits for it, for seconds.
    Attention has a variant for each number of lanes, merge has two. row_heads: of a row of what q
    is a part of."""
    if not suits_triton(device, dtype, head_dim):
        return
    q = torch.zeros(MAX_LANES, row_heads, head_dim, dtype=dtype, device=device)[:, :num_heads]
    kv = torch.zeros(TILE, 2, num_kv_heads, head_dim, dtype=dtype, device=device)
    outputs_of = num_heads, head_dim, dtype, device, True
    rows = 1
    while rows <= rows_of_a_block(num_heads // num_kv_heads, MAX_LANES):
        number = np.arange(rows)
        work = Work(
            QueryRows(0 * number, number, number),
            KVSpans(*np.array([[0], [0], [1], [0]])),
            num_heads,
            num_kv_heads,
            dtype,
        )
        Outputs([work], [rows], [], *outputs_of).partial_attention(q, kv, work, 1.0)
        rows *= 2
    for rows in 1, MANY_MERGED_ROWS:  # which have no parts
        Outputs([], [rows], [], *outputs_of).merge()


# ── the kernels ──────────────────────────────────────────────────────────────────────────────────


if triton is not None:
    LOG2E = tl.constexpr(1.4426950408889634)
    LN2 = tl.constexpr(0.6931471805599453)

    def _column(table, name):
        """A column of a table, by the name that the host has for it."""
        return tl.constexpr(table._fields.index(name))

    TILE_COLUMNS = tl.constexpr(len(Tiles._fields))
    TILE_FIRST_ROW = _column(Tiles, "first_row")
    TILE_LENGTH = _column(Tiles, "length")
    TILE_POSITION = _column(Tiles, "position")
    MEMBER_COLUMNS = tl.constexpr(len(Members._fields))
    MEMBER_ROW = _column(Members, "row")
    MEMBER_POSITION = _column(Members, "position")
    PIECE_COLUMNS = tl.constexpr(len(Pieces._fields))
    PIECE_FIRST_MEMBER = _column(Pieces, "first_member")
    PIECE_ROWS = _column(Pieces, "rows")
    PIECE_FIRST_TILE = _column(Pieces, "first_tile")
    PIECE_END_TILE = _column(Pieces, "end_tile")
    PIECE_FIRST_MASKED = _column(Pieces, "first_masked")
    PIECE_FIRST_OUTPUT = _column(Pieces, "first_output")

    @triton.jit
    def _tile_column(Tiles, t, COLUMN: tl.constexpr):
        return tl.load(Tiles + t * TILE_COLUMNS + COLUMN)

    @triton.jit
    def _load_rows(X, at, mask, UPCAST: tl.constexpr):
        x = tl.load(X + at, mask=mask, other=0.0)
        if UPCAST:  # the interpreter has no 16-bit arithmetic
            x = x.to(tl.float32)
        return x

    @triton.jit
    def _load_kv(KV, at, mask, VALUES: tl.constexpr, UPCAST: tl.constexpr):
        """Keys, and values, which lie so far behind them."""
        k = _load_rows(KV, at, mask, UPCAST)
        return k, _load_rows(KV + VALUES, at, mask, UPCAST)

    @triton.jit
    def _hide(s, n, position, kv_position, length):
        """The causal rule: scores s [M, N] of a tile, −inf where a row does not see a key. Rows are
        at their positions [M], key n [N] at kv_position + n; the tile has `length` keys."""
        # As int32: counts of keys of this tile that a row sees.
        visible = tl.minimum(position + 1 - kv_position, length).to(tl.int32)
        return tl.where(n[None, :] < visible[:, None], s, -float("inf"))

    @triton.jit
    def _add_tile(s, v, top, total, acc):
        """Softmax, a tile at a time: sums so far shrink by what the maximum has grown. Scores are
        in powers of two: exp2 is the hardware's instruction."""
        new_top = tl.maximum(top, tl.max(s, 1))
        safe_top = tl.where(new_top == -float("inf"), 0.0, new_top)
        p = tl.exp2(s - safe_top[:, None])
        shrink = tl.exp2(top - safe_top)
        total = total * shrink + tl.sum(p, 1)
        pv = tl.dot(p.to(v.dtype), v, input_precision="ieee")
        return new_top, total, acc * shrink[:, None] + pv

    @triton.jit(do_not_specialize=["num_rows"])
    def _partial_attention_kernel(
        Q,
        KV,
        Members,
        Pieces,
        Tiles,
        Numbers,
        O,
        LSE,
        PartialO,
        PartialLSE,
        num_rows,
        scale,
        Q_HEADS: tl.constexpr,
        H: tl.constexpr,
        HKV: tl.constexpr,
        D: tl.constexpr,
        M: tl.constexpr,
        N: tl.constexpr,
        DPAD: tl.constexpr,
        UPCAST: tl.constexpr,
    ):
        """One program: a piece × one KV head. Its M lanes are (row, query head of that KV head)."""
        G: tl.constexpr = H // HKV
        piece = Pieces + tl.program_id(0) * PIECE_COLUMNS
        head = tl.program_id(1)
        lane = tl.arange(0, M)
        n = tl.arange(0, N)
        d = tl.arange(0, DPAD)[None, :]
        row = lane // G
        query_head = head * G + lane % G
        is_row = row < tl.load(piece + PIECE_ROWS)
        q_mask = is_row[:, None] & (d < D)
        member = Members + (tl.load(piece + PIECE_FIRST_MEMBER) + row) * MEMBER_COLUMNS
        # int64, as all offsets: slabs are long.
        q_row = tl.load(member + MEMBER_ROW, mask=is_row, other=0)
        q_at = (q_row * Q_HEADS + query_head)[:, None] * D + d
        q = _load_rows(Q, q_at, q_mask, UPCAST)
        top = tl.full([M], -float("inf"), tl.float32)
        total = tl.zeros([M], tl.float32)
        acc = tl.zeros([M, DPAD], tl.float32)
        # A slab row has the keys of all heads, then their values.
        ROW: tl.constexpr = 2 * HKV * D
        VALUES: tl.constexpr = HKV * D
        kv_at = n[:, None] * ROW + head * D + d
        d_mask = (n < N)[:, None] & (d < D)  # (n < N for the shape)
        # First those tiles that are whole, and that all rows see.
        first_tile = tl.load(piece + PIECE_FIRST_TILE)
        first_masked = tl.load(piece + PIECE_FIRST_MASKED)
        first_row = _tile_column(Tiles, first_tile, TILE_FIRST_ROW)
        for t in range(first_tile, first_masked):
            k, v = _load_kv(KV, first_row * ROW + kv_at, d_mask, VALUES, UPCAST)
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)
            top, total, acc = _add_tile(s, v, top, total, acc)
            # A tile ahead: addresses that wait for a load would cost K and V half their stages.
            first_row = _tile_column(Tiles, t + 1, TILE_FIRST_ROW)
        position = tl.load(member + MEMBER_POSITION, mask=is_row, other=0)
        length = _tile_column(Tiles, first_masked, TILE_LENGTH)
        kv_position = _tile_column(Tiles, first_masked, TILE_POSITION)
        for t in range(first_masked, tl.load(piece + PIECE_END_TILE)):
            kv_mask = d_mask & (n < length)[:, None]  # of V, too: 0 × NaN is NaN
            k, v = _load_kv(KV, first_row * ROW + kv_at, kv_mask, VALUES, UPCAST)
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)
            s = _hide(s, n, position, kv_position, length)
            top, total, acc = _add_tile(s, v, top, total, acc)
            first_row = _tile_column(Tiles, t + 1, TILE_FIRST_ROW)
            length = _tile_column(Tiles, t + 1, TILE_LENGTH)
            kv_position = _tile_column(Tiles, t + 1, TILE_POSITION)
        divisor = tl.where(total == 0.0, 1.0, total)
        o = acc / divisor[:, None]
        lse = (top + tl.log2(divisor)) * LN2  # an empty part: top is −inf, and so is this
        first_output = tl.load(piece + PIECE_FIRST_OUTPUT)
        output = tl.load(Numbers + first_output + row, mask=is_row, other=0)
        result = is_row & (output < num_rows)
        _store_rows(O, LSE, output, query_head, o, lse, result, H, D, DPAD)
        part = is_row & (output >= num_rows)
        output -= num_rows
        _store_rows(PartialO, PartialLSE, output, query_head, o, lse, part, H, D, DPAD)

    @triton.jit
    def _store_rows(
        O, LSE, row, head, o, lse, mask, H: tl.constexpr, D: tl.constexpr, DPAD: tl.constexpr
    ):
        """Those that the mask has: mostly all or none."""
        d = tl.arange(0, DPAD)[None, :]
        at = row * H + head
        if tl.max(mask.to(tl.int32), 0) > 0:
            tl.store(O + (at[:, None] * D + d), o, mask=mask[:, None] & (d < D))
            tl.store(LSE + at, lse, mask=mask)

    @triton.jit(do_not_specialize=["max_parts"])
    def _merge_kernel(
        O,
        LSE,
        Rows,
        Parts,
        Out,
        OutLSE,
        max_parts,
        H: tl.constexpr,
        D: tl.constexpr,
        HEADS: tl.constexpr,
        PARTS: tl.constexpr,
        DPAD: tl.constexpr,
    ):
        """One program: some heads of one row. The textbook's weighted mean: first the maximum of
        all parts, then their sum. So no load waits for another's result."""
        entry = tl.program_id(0).to(tl.int64)
        h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
        d = tl.arange(0, DPAD)
        top = tl.full([HEADS], -float("inf"), tl.float32)
        for first in range(0, max_parts, PARTS):
            _, lse = _load_parts(LSE, Parts, entry, first, max_parts, h, H, PARTS)
            top = tl.maximum(top, tl.max(lse, 0))
        safe_top = tl.where(top == -float("inf"), 0.0, top)
        total = tl.zeros([HEADS], tl.float32)
        acc = tl.zeros([HEADS, DPAD], tl.float32)
        for first in range(0, max_parts, PARTS):
            part, lse = _load_parts(LSE, Parts, entry, first, max_parts, h, H, PARTS)
            at = (part[:, None] * H + h[None, :])[:, :, None] * D + d[None, None, :]
            # o of an empty part may be anything.
            mask = (lse > -float("inf"))[:, :, None] & (d < D)[None, None, :]
            o = tl.load(O + at, mask=mask, other=0.0).to(tl.float32)
            weight = tl.exp(lse - safe_top[None, :])
            total += tl.sum(weight, 0)
            acc += tl.sum(o * weight[:, :, None], 0)
        divisor = tl.where(total == 0.0, 1.0, total)
        out = acc / divisor[:, None]
        at = tl.load(Rows + entry) * H + h
        mask = (h < H)[:, None] & (d < D)[None, :]
        tl.store(Out + (at[:, None] * D + d[None, :]), out, mask=mask)
        tl.store(OutLSE + at, top + tl.log(divisor), mask=h < H)

    @triton.jit
    def _load_parts(
        LSE, Parts, entry, first, max_parts, h, H: tl.constexpr, PARTS: tl.constexpr
    ):
        """Numbers of some partial rows, [PARTS], and their log-sum-exps, [PARTS, heads]."""
        i = first + tl.arange(0, PARTS)
        part = tl.load(Parts + entry * max_parts + i, mask=i < max_parts, other=-1).to(tl.int64)
        mask = (part >= 0)[:, None] & (h < H)[None, :]
        at = part[:, None] * H + h[None, :]
        return part, tl.load(LSE + at, mask=mask, other=-float("inf")).to(tl.float32)

    @triton.jit
    def _rotate_kernel(
        X,
        Cos,
        Sin,
        ROW: tl.constexpr,
        HEADS: tl.constexpr,
        HALF: tl.constexpr,
        HEADSPAD: tl.constexpr,
        HALFPAD: tl.constexpr,
    ):
        """One program: a row."""
        row = tl.program_id(0).to(tl.int64)
        h = tl.arange(0, HEADSPAD)[:, None]
        i = tl.arange(0, HALFPAD)[None, :]
        mask = (h < HEADS) & (i < HALF)
        cos = tl.load(Cos + (row * HALF + i), mask=i < HALF, other=0.0).to(tl.float32)
        sin = tl.load(Sin + (row * HALF + i), mask=i < HALF, other=0.0).to(tl.float32)
        first = row * ROW + h * (2 * HALF) + i
        second = first + HALF
        a = tl.load(X + first, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(X + second, mask=mask, other=0.0).to(tl.float32)
        tl.store(X + first, a * cos - b * sin, mask=mask)
        tl.store(X + second, b * cos + a * sin, mask=mask)


def attention_config(lanes, heads, kv_heads, head_dim, itemsize) -> dict:
    """Compile-time arguments and launch options of `_partial_attention_kernel`: 16 lanes are
    decode, more are prefill. Of s stages, s − 1 tiles of K and V lie in shared memory (one more
    where wgmma reads them), besides the lanes' q and p: an A100 has 163 KB, an H100 227."""
    width = max(16, next_power_of_2(head_dim))
    room = 163 * 1024 - lanes * (width + TILE) * itemsize
    tiles_in_room = max(1, room // (2 * TILE * width * itemsize))
    return dict(
        H=heads,
        HKV=kv_heads,
        D=head_dim,
        M=lanes,
        N=TILE,
        DPAD=width,
        UPCAST=os.environ.get("TRITON_INTERPRET") == "1",
        num_stages=min(3, 1 + tiles_in_room),
        num_warps=8 if lanes > MIN_LANES else 4,
    )


# ── the lesson, run ──────────────────────────────────────────────────────────────────────────────


def show_parts():
    """Attention of two rows over keys in three parts: what each part gives, and what `merge` makes
    of it, beside the softmax over all keys at once."""
    C = 4  # keys of a part
    D = 16
    position = np.array([6, 11])
    torch.manual_seed(0)
    q = torch.randn(2, 1, D)
    kv = torch.randn(3 * C, 2, 1, D)
    rows = QueryRows(np.array([0, 0]), np.array([0, 1]), position)
    parts = []
    for first in (0, C, 2 * C):
        span = KVSpans(*np.array([[0], [first], [C], [first]]))
        parts.append(partial_attention(q, kv, Work(rows, span, 1, 1), scale=D**-0.5))
    o, lse = (torch.cat(x) for x in zip(*parts))  # [3 · 2, 1, D], [3 · 2, 1]
    merged_o, merged_lse = merge(o, lse, torch.tensor([[0, 2, 4], [1, 3, 5]]))
    all_o, all_lse = attend_at_once(q, kv, position)
    print(f"{3 * C} keys in three parts. A row sees those up to its own position.")
    print("|o|: the norm of a part's o.")
    for row, at in enumerate(position.tolist()):
        print(f"\nrow at position {at:<4}    |o|      lse  weight exp(lse_p − lse)")
        for part in range(3):
            its_o = o[2 * part + row]
            its_lse = lse[2 * part + row, 0]
            weight = (its_lse - merged_lse[row, 0]).exp()
            keys = f"keys {part * C} to {part * C + C - 1}"
            print(f"  {keys:<16}{its_o.norm():>8.4f} {its_lse:>8.4f}  {weight:.4f}")
        print(f"  {'merged':<16}{merged_o[row].norm():>8.4f} {merged_lse[row, 0]:>8.4f}")
        print(f"  {'softmax over all':<16}{all_o[row].norm():>8.4f} {all_lse[row, 0]:>8.4f}")
    apart = (merged_o - all_o).abs().max()
    print(f"\nMerged and whole differ by {apart:.0e} at most: parts may lie anywhere.")
    print("Next: work.py, how the attention of many requests is cut into such parts.")


def attend_at_once(q, kv, position):
    """By the textbook, for heads of one KV head: q [T, H, D] over kv [keys, 2, 1, D], of which a row
    sees those up to its position → o [T, H, D], lse [T, H]."""
    scores = q @ kv[:, 0, 0].T * q.shape[-1] ** -0.5  # [T, H, keys]
    hidden = torch.arange(len(kv)) > torch.as_tensor(position)[:, None, None]
    scores = scores.masked_fill(hidden, -math.inf)
    return scores.softmax(-1) @ kv[:, 1, 0], scores.logsumexp(-1)


# Options are those of the benchmark. Without any there is the lesson, too, then the benchmark: a
# check and a few timings, on whatever device there is.
if __name__ == "__main__":
    import sys

    if not sys.argv[1:]:
        run_lesson(show_parts)
        print("\nThe kernels, checked and timed:", flush=True)
    benchmark = os.path.dirname(os.path.abspath(__file__)) + "/bench/kernel_speed.py"
    os.execv(sys.executable, [sys.executable, benchmark, "--small", *sys.argv[1:]])
