"""Partial attention and merge: how can a softmax be computed in pieces?

For one query row and a set S of keys, with scores s_j = q·k_j·scale, the textbook has

    o(S) = Σ_j exp(s_j)·v_j / Σ_j exp(s_j)          lse(S) = ln Σ_j exp(s_j)

and for any partition of S into parts (each wherever it likes)

    lse = ln Σ_p exp(lse_p)                          o = Σ_p exp(lse_p − lse)·o_p

so a row's attention over a cache in pieces is a weighted mean of what the pieces return: the one
fact the pool rests on. `partial_attention` gives (o, lse) of rows over spans of a slab, `merge`
joins parts. Both subtract a maximum before exp (the textbook form overflows). An empty
part is written, too: as o = 0 and lse = −inf, never as NaN.

What is to be done is said by two tables, and cut for the hardware into three more:

    QueryRuns ──▶ blocks: as many rows of one run as a program takes ─┐
                                                                      ├─▶ pieces: a block over some
    KVSpans ────▶ tiles: at most 64 rows of one span ─────────────────┘   of its tiles

A program takes a piece and a KV head. A block is one piece; but one that is longer than an even
part of all tiles is cut into several, whose results are merged: so a few long ones keep a GPU
busy.

Two implementations: Triton, and PyTorch for CPUs and float64. Left out: Hopper's copy engine (TMA).
Notation: T rows · H query heads · Hkv KV heads · G = H / Hkv · D head dim · P results.
"""

import math
import os
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this platform: PyTorch serves
    triton = None

TILE = 64  # KV rows of a tile, at most
MIN_PIECE_TILES = 4  # of a block that is cut: fewer do not pay for the merge
# A program has a lane for each (row, head of a KV head). A dot takes 16 at least; 128 take up to
# 202 of 255 registers.
MIN_LANES = 16
MAX_LANES = 128
MAX_BATCH = 64  # pieces that PyTorch pads to one shape: it bounds what is copied
AFTER_ALL = np.iinfo(np.int64).max  # a position that no query row sees: that of padding


# ── tables of integers ───────────────────────────────────────────────────────────────────────────
#
# A table is a NamedTuple of columns: arrays of one length, with an entry for each thing of one
# kind.

Column = np.ndarray


def select(table, chosen):
    """The chosen entries (indices or a mask) of every column."""
    return type(table)(*(None if column is None else column[chosen] for column in table))


def ranges(first, counts):
    """Concatenated `arange(first, first + count)`, without a loop: [n], [n] → [sum(counts)]."""
    first = np.asarray(first, np.int64)
    counts = np.asarray(counts, np.int64)
    offsets = first - (np.cumsum(counts) - counts)
    return np.arange(counts.sum()) + np.repeat(offsets, counts)


def starts(lengths):
    """Where each of consecutive stretches begins: [n] → [n]."""
    return np.cumsum(lengths) - lengths


def starts_in_groups(lengths, group):
    """Where each stretch begins within its group; group [n] ascends."""
    first = starts(lengths)
    return first - first[np.searchsorted(group, group)]


def split_lengths(lengths, size):
    """Cuts each length [n] into sections of `size`, the last one maybe shorter. Returns owner (the
    length it is of), offset in it, and length of each section: 3 × [sections]."""
    counts = -(-lengths // size)
    owner = np.repeat(np.arange(len(lengths)), counts)
    offset = ranges(np.zeros_like(counts), counts) * size
    return owner, offset, np.minimum(lengths[owner] - offset, size)


def to_device(arrays, device) -> list:
    """Integer arrays of the host as int64 tensors there, in one copy that nobody waits for.
    (Entries of pieces and tiles are 48 and 32 bytes, so each table in the copy begins where 16
    divides: the kernel is compiled for such pointers.)"""
    flat = torch.from_numpy(
        np.concatenate([array.ravel() for array in arrays], dtype=np.int64)
    )
    if torch.device(device).type == "cuda":
        flat = flat.pin_memory()
    flat = flat.to(device, non_blocking=True)
    tensors = flat.split([array.size for array in arrays])
    return [tensor.view(array.shape) for tensor, array in zip(tensors, arrays)]


# ── what is to be done ───────────────────────────────────────────────────────────────────────────


class QueryRuns(NamedTuple):
    """An entry is a run: query rows at consecutive positions that read the same spans."""
    first_row: Column  # of q
    rows: Column
    position: Column  # of the first row


class KVSpans(NamedTuple):
    """An entry is a span: consecutive rows of k and v at consecutive positions. A tile is a short
    one."""
    run: Column  # number of the run that reads it, ascending
    first_row: Column  # of k and v
    length: Column
    position: Column  # of the first row


class Blocks(NamedTuple):
    """An entry is a block: as many rows of a run as a program takes. By run."""
    first_row: Column  # of q
    rows: Column
    position: Column  # of the first row
    first_tile: Column  # its run reads tiles up to end_tile
    end_tile: Column


class Pieces(NamedTuple):
    """An entry is a piece: a block over some of its tiles, work for a program. By block."""
    first_row: Column  # of q
    rows: Column
    partial: Column  # number of the partial row that its first row gives
    position: Column  # of the first row
    first_tile: Column
    end_tile: Column


def cut_tiles(spans) -> KVSpans:
    """Spans of TILE rows at most."""
    span, offset, length = split_lengths(spans.length, TILE)
    first_row = spans.first_row[span] + offset
    return KVSpans(spans.run[span], first_row, length, spans.position[span] + offset)


def cut_blocks(runs, tiles, max_rows) -> Blocks:
    """Blocks of at most so many rows."""
    num_tiles = np.bincount(tiles.run, minlength=len(runs.rows))
    first_tile = starts(num_tiles)
    end_tile = first_tile + num_tiles
    run, offset, rows = split_lengths(runs.rows, max_rows)
    first_row = runs.first_row[run] + offset
    position = runs.position[run] + offset
    return Blocks(first_row, rows, position, first_tile[run], end_tile[run])


def cut_pieces(blocks, wanted_pieces):
    """Pieces, about as many as are wanted where long blocks can be cut; and the block of each:
    [pieces]. A block that reads nothing has one, too: it writes that its rows are empty."""
    num_tiles = blocks.end_tile - blocks.first_tile
    max_tiles = max(MIN_PIECE_TILES, -(-int(num_tiles.sum()) // wanted_pieces))
    block, offset, _ = split_lengths(np.maximum(num_tiles, 1), max_tiles)
    whole = select(blocks, block)
    first_tile = whole.first_tile + offset
    pieces = Pieces(
        whole.first_row,
        whole.rows,
        starts(whole.rows),
        whole.position,
        first_tile,
        np.minimum(whole.end_tile, first_tile + max_tiles),
    )
    return pieces, block


def partials_of_rows(blocks, pieces, block):
    """The partial rows that `merge` is to join for each row of the runs: [rows, the most pieces
    that a block has], −1 where its block has fewer; [0, 0] if none was cut. block [pieces]: of
    each."""
    if len(block) == len(blocks.rows):
        return np.zeros((0, 0), np.int64)
    num_pieces = np.bincount(block)
    first_piece = starts(num_pieces)
    # A block's pieces follow each other, each with a partial row for every row of the block.
    block_of_row, row_of_block, _ = split_lengths(blocks.rows, 1)
    first_partial = pieces.partial[first_piece][block_of_row] + row_of_block
    number = np.arange(num_pieces.max())
    partials = first_partial[:, None] + number * blocks.rows[block_of_row, None]
    return np.where(number < num_pieces[block_of_row, None], partials, -1)


class PaddedBatch(NamedTuple):
    """b pieces padded to m query rows and n KV rows, as gathers for PyTorch. Padding repeats the
    first row of its own piece: another's might be NaN, and 0 × NaN is NaN."""
    query_rows: torch.Tensor  # [b, m]
    # [b, m] where results go; those of padding behind the last row.
    partial_rows: torch.Tensor
    kv_rows: torch.Tensor  # [b, n]
    # [b, 1, m, n] what a query row does not see, the same for all heads.
    hidden: torch.Tensor


class Work:
    """What `partial_attention` is to do: made on the host in each iteration, used by every layer.

    A row of a run sees the keys of its spans at positions up to its own. Results are
    P = sum(rows), one for each row of all runs in order; without spans they are empty. Pieces
    write *partial rows*: P, or more where a block was cut; then `parts` says how they are merged.
    runs: QueryRuns, spans: KVSpans. wanted_pieces: about how many, if long blocks can be cut."""
    def __init__(self, runs, spans, heads_per_kv, device="cpu", wanted_pieces=1):
        # A power of two, with room for all heads of a row and, up to MAX_LANES, for the longest
        # run.
        wanted = min(int(runs.rows.max(initial=1)) * heads_per_kv, MAX_LANES)
        self.lanes = next_power_of_2(max(MIN_LANES, wanted, heads_per_kv))
        tiles = cut_tiles(spans)
        blocks = cut_blocks(runs, tiles, self.lanes // heads_per_kv)
        pieces, block = cut_pieces(blocks, wanted_pieces)
        parts = partials_of_rows(blocks, pieces, block)
        self.num_partials = int(pieces.rows.sum())
        self._host = pieces, tiles
        # The kernel loads a tile ahead: there is an empty one behind the last.
        tile_rows = np.pad(np.stack(tiles, 1), ((0, 1), (0, 0)))
        self.pieces, self.tiles, self.parts = to_device(
            [np.stack(pieces, 1), tile_rows, parts], device
        )

    @cached_property
    def padded(self) -> list[PaddedBatch]:
        """The same work for PyTorch: pieces of like size, between the same powers of two, in
        batches, so that a batch is one matmul. Pieces without keys are in none."""
        pieces, tiles = self._host
        keys_before = np.concatenate(([0], np.cumsum(tiles.length)))
        first_key = keys_before[pieces.first_tile]
        num_keys = keys_before[pieces.end_tile] - first_key
        kv_rows = ranges(tiles.first_row, tiles.length)
        kv_positions = ranges(tiles.position, tiles.length)
        alike = {}
        sizes = zip(pieces.rows.tolist(), num_keys.tolist())
        for piece, (m, n) in enumerate(sizes):
            if n:
                size = (m - 1).bit_length(), (n - 1).bit_length()
                alike.setdefault(size, []).append(piece)
        batches = []
        for _, same in sorted(alike.items()):
            for start in range(0, len(same), MAX_BATCH):
                chosen = np.array(same[start : start + MAX_BATCH])[:, None]
                column = np.arange(num_keys[chosen].max())
                is_key = column < num_keys[chosen]
                key = first_key[chosen] + column * is_key
                position = np.where(is_key, kv_positions[key], AFTER_ALL)
                batches.append(self._pad(select(pieces, chosen), kv_rows[key], position))
        return batches

    def _pad(self, pieces, kv_rows, kv_positions):
        """A batch of pieces (columns are [b, 1]), whose KV rows and positions are padded: [b,
        n]."""
        row = np.arange(pieces.rows.max())
        is_row = row < pieces.rows
        query_positions = pieces.position + row
        arrays = (
            np.where(is_row, pieces.first_row + row, pieces.first_row),
            np.where(is_row, pieces.partial + row, self.num_partials),
            kv_rows,
            kv_positions[:, None, None] > query_positions[:, None, :, None],
        )
        return PaddedBatch(*(torch.from_numpy(x).to(self.pieces.device) for x in arrays))


def next_power_of_2(n) -> int:
    return 1 << (n - 1).bit_length()


# ── partial attention ────────────────────────────────────────────────────────────────────────────


def use_triton(x, backend) -> bool:
    """`auto`: Triton on a GPU, but for float64 and for heads over 512 bytes, of which shared memory
    does not hold two tiles."""
    if backend != "auto":
        return backend == "triton"
    head_bytes = x.shape[-1] * x.element_size()
    return (
        triton is not None
        and x.is_cuda
        and x.dtype != torch.float64
        and head_bytes <= 512
    )


def partial_attention(q, k, v, work, scale, backend: str = "auto"):
    """Attention of query rows over spans of a slab, and its log-sum-exp (natural log).

    q [T, H, D], k and v [slab rows, Hkv, D] → o [P, H, D], lse [P, H], in float32 (float64 for
    float64 input). Every result is written; without a visible key it is o = 0, lse = −inf.
    What lies in slab rows outside the spans is never used, NaN included."""
    attend = _attend_with_triton if use_triton(q, backend) else _attend_with_torch
    o, lse = attend(q, k, v, work, scale)
    if not len(work.parts):
        return o, lse
    return merge(o, lse, work.parts, backend)


def _attend_with_triton(q, k, v, work, scale):
    _, H, D = q.shape
    Hkv = k.shape[1]
    o = torch.empty(work.num_partials, H, D, dtype=torch.float32, device=q.device)
    lse = torch.empty(work.num_partials, H, dtype=torch.float32, device=q.device)
    if work.num_partials:
        config = attention_config(work.lanes, H, Hkv, D, k.element_size())
        _partial_attention_kernel[len(work.pieces), Hkv](
            q.contiguous(), k, v, work.pieces, work.tiles, o, lse, scale, **config
        )
    return o, lse


def _attend_with_torch(q, k, v, work, scale):
    """A batch of padded pieces at a time, in float32 at least."""
    _, H, D = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    # One row more than there are, for what padding gives.
    o = torch.zeros(work.num_partials + 1, H, D, dtype=wide, device=q.device)
    lse = torch.full((work.num_partials + 1, H), -math.inf, dtype=wide, device=q.device)
    for batch in work.padded:
        o[batch.partial_rows], lse[batch.partial_rows] = _attend_batch(
            q, k, v, batch, scale, wide
        )
    return o[:-1], lse[:-1]


def _attend_batch(q, k, v, batch, scale, wide):
    """→ o [b, m, H, D], lse [b, m, H] of a padded batch."""
    _, H, D = q.shape
    Hkv = k.shape[1]
    b, m = batch.query_rows.shape
    n = batch.kv_rows.shape[1]

    def gather(slab):  # [slab rows, Hkv, D] → [Hkv, b, n, D]
        rows = slab.flatten(1).index_select(0, batch.kv_rows.flatten())
        return rows.view(b, n, Hkv, D).permute(2, 0, 1, 3).to(wide)

    query = q[batch.query_rows].view(b, m, Hkv, -1, D)
    query = query.permute(2, 0, 3, 1, 4).to(wide) * scale  # [Hkv, b, G, m, D]
    s = query.reshape(Hkv, b, -1, D) @ gather(k).mT  # [Hkv, b, G·m, n]
    s = s.view(Hkv, b, -1, m, n)
    s.masked_fill_(batch.hidden, -math.inf)
    top = s.amax(-1, keepdim=True)
    p = s.sub_(torch.where(top == -math.inf, 0, top)).exp_()
    # At least 1 with a visible key, as the maximum gives 1. Without one it is 0, and so is p.
    total = p.sum(-1, keepdim=True)
    o = p.flatten(2, 3) @ gather(v)  # [Hkv, b, G·m, D]
    o = o.view(Hkv, b, -1, m, D) / total.clamp(min=1)
    lse = top + total.log()  # [Hkv, b, G, m, 1]
    o = o.permute(1, 3, 0, 2, 4).reshape(b, m, H, D)
    lse = lse.permute(1, 3, 0, 2, 4).reshape(b, m, H)
    return o, lse


# ── merge ────────────────────────────────────────────────────────────────────────────────────────


def merge(o, lse, parts, backend: str = "auto"):
    """Joins the parts of each row in one pass (pairwise merging rounds more often).

    o [P, H, D], lse [P, H], parts [rows, max_parts], −1 where a row has fewer parts → o
    [rows, H, D], lse [rows, H], of the input's type. o is not read where its lse is −inf. Rows
    whose parts are all empty, or that have none, come out empty: o = 0, lse = −inf."""
    if use_triton(o, backend):
        return _merge_with_triton(o, lse, parts)
    return _merge_with_torch(o, lse, parts)


def _merge_with_triton(o, lse, parts):
    rows, max_parts = parts.shape
    _, H, D = o.shape
    out = o.new_empty(rows, H, D)
    out_lse = lse.new_empty(rows, H)
    if rows:
        _merge_kernel[rows,](
            o.contiguous(),
            lse.contiguous(),
            parts.contiguous(),
            out,
            out_lse,
            max_parts,
            H=H,
            D=D,
            HPAD=next_power_of_2(H),
            DPAD=next_power_of_2(D),
        )
    return out, out_lse


def _merge_with_torch(o, lse, parts):
    rows, max_parts = parts.shape
    num_partials, H, D = o.shape
    if not num_partials or not max_parts:
        return o.new_zeros(rows, H, D), lse.new_full((rows, H), -math.inf)
    index = parts.clamp(min=0).long()
    absent = (parts < 0)[:, :, None]
    part_lse = lse[index].masked_fill(absent, -math.inf)  # [rows, max_parts, H]
    top = part_lse.amax(1, keepdim=True)
    weight = torch.exp(part_lse - torch.where(top == -math.inf, 0, top))
    total = weight.sum(1)  # [rows, H]; 0 without a part, else 1 at least
    part_o = o[index].masked_fill((part_lse == -math.inf)[..., None], 0)
    out = (weight[..., None] * part_o).sum(1) / total.clamp(min=1)[..., None]
    return out, top[:, 0] + total.log()


# ── the kernels ──────────────────────────────────────────────────────────────────────────────────


if triton is not None:
    LOG2E = tl.constexpr(1.4426950408889634)
    LN2 = tl.constexpr(0.6931471805599453)

    def _column(table, name):
        """A column of a table, by the name that the host has for it."""
        return tl.constexpr(table._fields.index(name))

    TILE_COLUMNS = tl.constexpr(len(KVSpans._fields))
    TILE_FIRST_ROW = _column(KVSpans, "first_row")
    TILE_LENGTH = _column(KVSpans, "length")
    TILE_POSITION = _column(KVSpans, "position")
    PIECE_COLUMNS = tl.constexpr(len(Pieces._fields))
    PIECE_FIRST_ROW = _column(Pieces, "first_row")
    PIECE_ROWS = _column(Pieces, "rows")
    PIECE_PARTIAL = _column(Pieces, "partial")
    PIECE_POSITION = _column(Pieces, "position")
    PIECE_FIRST_TILE = _column(Pieces, "first_tile")
    PIECE_END_TILE = _column(Pieces, "end_tile")

    @triton.jit
    def _load_tile(Tiles, t):
        """First slab row, length and position of a tile."""
        tile = Tiles + t * TILE_COLUMNS
        first_row = tl.load(tile + TILE_FIRST_ROW)
        length = tl.load(tile + TILE_LENGTH)
        return first_row, length, tl.load(tile + TILE_POSITION)

    @triton.jit
    def _load_rows(X, at, mask, UPCAST: tl.constexpr):
        x = tl.load(X + at, mask=mask, other=0.0)
        if UPCAST:  # the interpreter has no 16-bit arithmetic
            x = x.to(tl.float32)
        return x

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

    @triton.jit
    def _partial_attention_kernel(
        Q,
        K,
        V,
        Pieces,
        Tiles,
        O,
        LSE,
        scale,
        H: tl.constexpr,
        HKV: tl.constexpr,
        D: tl.constexpr,
        M: tl.constexpr,
        N: tl.constexpr,
        DPAD: tl.constexpr,
        UPCAST: tl.constexpr,
    ):
        """One program: a piece × one KV head. Its M lanes are (row, head of the group)."""
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
        position = tl.load(piece + PIECE_POSITION) + row
        # int64, as all offsets: slabs are long.
        q_row = tl.load(piece + PIECE_FIRST_ROW) + row
        q_at = (q_row * H + query_head)[:, None] * D + d
        q = _load_rows(Q, q_at, q_mask, UPCAST)
        top = tl.full([M], -float("inf"), tl.float32)
        total = tl.zeros([M], tl.float32)
        acc = tl.zeros([M, DPAD], tl.float32)
        first_tile = tl.load(piece + PIECE_FIRST_TILE)
        kv_first, length, kv_position = _load_tile(Tiles, first_tile)
        for t in range(first_tile, tl.load(piece + PIECE_END_TILE)):
            kv_at = ((kv_first + n) * HKV + head)[:, None] * D + d
            kv_mask = (n < length)[:, None] & (d < D)  # of V, too: 0 × NaN is NaN
            k = _load_rows(K, kv_at, kv_mask, UPCAST)
            v = _load_rows(V, kv_at, kv_mask, UPCAST)
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)
            # As int32: counts of keys of this tile that a row sees.
            visible = tl.minimum(position + 1 - kv_position, length).to(tl.int32)
            s = tl.where(n[None, :] < visible[:, None], s, -float("inf"))
            top, total, acc = _add_tile(s, v, top, total, acc)
            # A tile ahead: addresses that wait for a load would cost K and V half their stages.
            kv_first, length, kv_position = _load_tile(Tiles, t + 1)
        divisor = tl.where(total == 0.0, 1.0, total)
        o = acc / divisor[:, None]
        lse = (top + tl.log2(divisor)) * LN2  # an empty part: top is −inf, and so is this
        out = (tl.load(piece + PIECE_PARTIAL) + row) * H + query_head
        tl.store(O + out[:, None] * D + d, o, mask=q_mask)
        tl.store(LSE + out, lse, mask=is_row)

    @triton.jit
    def _merge_kernel(
        O,
        LSE,
        Parts,
        Out,
        OutLSE,
        max_parts,
        H: tl.constexpr,
        D: tl.constexpr,
        HPAD: tl.constexpr,
        DPAD: tl.constexpr,
    ):
        """One program: one row, all heads. The textbook's weighted mean, with a running maximum."""
        row = tl.program_id(0).to(tl.int64)
        h = tl.arange(0, HPAD)
        d = tl.arange(0, DPAD)
        is_head = h < H
        mask = is_head[:, None] & (d < D)[None, :]
        top = tl.full([HPAD], -float("inf"), tl.float32)
        total = tl.zeros([HPAD], tl.float32)
        acc = tl.zeros([HPAD, DPAD], tl.float32)
        for i in range(max_parts):
            part = tl.load(Parts + row * max_parts + i).to(tl.int64)
            lse = tl.load(
                LSE + tl.maximum(part, 0) * H + h, mask=is_head, other=-float("inf")
            )
            lse = tl.where(part >= 0, lse, -float("inf"))
            full = lse > -float("inf")  # o of an empty part may be anything
            o = tl.load(
                O + (part * H + h)[:, None] * D + d[None, :],
                mask=mask & full[:, None],
                other=0.0,
            ).to(tl.float32)
            new_top = tl.maximum(top, lse)
            safe_top = tl.where(new_top == -float("inf"), 0.0, new_top)
            weight = tl.exp(lse - safe_top)
            shrink = tl.exp(top - safe_top)
            total = total * shrink + weight
            acc = acc * shrink[:, None] + o * weight[:, None]
            top = new_top
        divisor = tl.where(total == 0.0, 1.0, total)
        out = acc / divisor[:, None]
        lse = top + tl.log(divisor)
        tl.store(Out + (row * H + h)[:, None] * D + d[None, :], out, mask=mask)
        tl.store(OutLSE + row * H + h, lse, mask=is_head)


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


if __name__ == "__main__":  # a check and a small benchmark, on whatever device there is
    import sys

    benchmark = os.path.dirname(os.path.abspath(__file__)) + "/bench/kernel_speed.py"
    os.execv(sys.executable, [sys.executable, benchmark, "--small", *sys.argv[1:]])
