"""How near are the kernels to the hardware's limit? Decode, prefill and merge, each beside a peer.

    python bench/kernel_speed.py                 # all shapes (a GPU), or a check of tiny ones (CPU)
    python bench/kernel_speed.py --models llama-3.1-8b --segments 512 --json kernels.json
    python kernels.py                            # a few shapes of one model: --small

Every line is checked against float64 before it is timed. KV lies in random segments of a slab
twice what is read, the L2 cache is flushed between runs, and times are medians.

    decode     batch × context: TB/s of KV, its share of a copy's bandwidth in this very run
    prefill    a chunk of rows over a prefix: TFLOP/s
    merge      rows × parts: TB/s of what it reads and writes, its share of a copy's
    shared     decodes × tokens that all share + own ones (`--shared 64x8192+512`, on a CPU too):
               read once against each for itself, in turn

The peer is PyTorch's `scaled_dot_product_attention` over a contiguous cache, its best case, and
flash-attn where it is installed. `x_` is its time over ours: above 1 we are faster, although what
we return is float32. Without a GPU the kernels run in Triton's interpreter, and nothing
but `--shared` is timed.
"""

import argparse
import importlib.util
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
GPU = torch.cuda.is_available()
if not GPU:
    # Before triton is imported, as the next line does.
    os.environ["TRITON_INTERPRET"] = "1"

from torch.nn.attention.bias import causal_lower_right  # noqa: E402

import kernels  # noqa: E402
from kernels import Outputs, merge, programs_at_once  # noqa: E402
from model import cut, one_line, shown  # noqa: E402
from options import Parser, output_file, run_main  # noqa: E402
from provenance import describe_machine  # noqa: E402
from work import AtOnce, KVSpans, QueryRows, Work  # noqa: E402


class Shape(NamedTuple):
    heads: int
    kv_heads: int
    head_dim: int


MODELS = {
    "llama-3.1-8b": Shape(32, 8, 128),
    "llama-2-7b": Shape(32, 32, 128),
    "llama-3-70b": Shape(64, 8, 128),
    "small": Shape(8, 4, 64),
    "tiny": Shape(4, 2, 16),
}
DEVICE = "cuda" if GPU else "cpu"
ATTENTION_LIMIT = 3e-2  # of a relative error in 16 bits, peaky logits
MERGE_LIMIT = 1e-5  # in float32


class AttentionCase(NamedTuple):
    """`batch` sequences of `context` tokens, the last `rows` of each queries."""
    model: str
    batch: int
    rows: int
    context: int
    segment: int  # tokens
    shared: int = 0  # the first tokens are the same for all: full segments of them


class MergeCase(NamedTuple):
    model: str
    rows: int
    parts: int


def median_ms(run: Callable) -> float | None:
    """Between runs the L2 cache is flushed (triton.testing)."""
    if not GPU:
        return None
    from triton.testing import do_bench

    return do_bench(run, warmup=20, rep=100, return_mode="median")


def copy_bandwidth() -> float | None:
    """B/s of a copy, read and written bytes together."""
    if not GPU:
        return None
    source = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    ms = median_ms(lambda: target.copy_(source))
    return 2 * source.nbytes / ms * 1e3


# Attention.


@dataclass
class Problem:
    """An attention case with its data."""
    case: AttentionCase
    q: torch.Tensor  # [batch · rows, H, D]
    kv: torch.Tensor  # [slab rows, 2, Hkv, D]
    slab_rows: torch.Tensor  # [batch, context] where each token's KV lies

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.q.shape[-1])


def random_slots(case: AttentionCase) -> np.ndarray:
    """[batch, segments] in a slab twice as large."""
    segments = -(-case.context // case.segment)
    slots = torch.randperm(2 * case.batch * segments).numpy()
    slots = slots[: case.batch * segments].reshape(case.batch, segments)
    shared = case.shared // case.segment
    slots[:, :shared] = slots[0, :shared]
    return slots


def random_problem(case: AttentionCase, slots: np.ndarray, dtype) -> Problem:
    """Random Q, K and V; peaky logits."""
    shape = MODELS[case.model]
    slab_size = 2 * slots.size * case.segment

    def random_rows(rows, heads):
        return torch.randn(rows, heads, shape.head_dim, device=DEVICE, dtype=dtype)

    q = random_rows(case.batch * case.rows, shape.heads)
    kv = random_rows(slab_size, 2 * shape.kv_heads).unflatten(1, (2, -1))
    slab_rows = slots[:, :, None] * case.segment + np.arange(case.segment)
    slab_rows = slab_rows.reshape(case.batch, -1)[:, : case.context]
    return Problem(case, 2 * q, kv, torch.from_numpy(slab_rows).to(DEVICE))


def attention_work(case: AttentionCase, slots: np.ndarray, dtype, share=True) -> Work:
    """A reader for each sequence, a span for each of its segments."""
    shape = MODELS[case.model]
    batch, segments = slots.shape
    programs = programs_at_once(DEVICE, shape.head_dim, dtype) if GPU else (32, 16)
    position = np.arange(segments) * case.segment
    length = np.minimum(case.context - position, case.segment)
    rows = QueryRows.of_runs(
        reader=np.arange(batch),
        first_row=np.arange(batch) * case.rows,
        rows=np.full(batch, case.rows),
        position=np.full(batch, case.context - case.rows),
    )
    spans = KVSpans(
        reader=np.repeat(np.arange(batch), segments),
        first_row=slots.ravel() * case.segment,
        length=np.tile(length, batch),
        position=np.tile(position, batch),
    )
    return Work(
        rows,
        spans,
        shape.heads,
        shape.kv_heads,
        dtype,
        AtOnce(*(n // shape.kv_heads for n in programs)),
        share,
    )


def expected_row(problem: Problem, sequence: int, row: int) -> torch.Tensor:
    """[H, D] attention of a sequence's row, in float64."""
    case = problem.case
    shape = MODELS[case.model]
    visible = problem.slab_rows[sequence, : case.context - case.rows + row + 1]
    query = problem.q[sequence * case.rows + row].double()
    query = query.view(shape.kv_heads, shape.heads // shape.kv_heads, shape.head_dim)
    keys, values = problem.kv[visible].double().unbind(1)
    scores = torch.einsum("kgd,nkd->kgn", query, keys) * problem.scale
    return torch.einsum("kgn,nkd->kgd", scores.softmax(-1), values).flatten(0, 1)


def relative_error(o: torch.Tensor, expected: torch.Tensor) -> float:
    return float((o.double() - expected).norm() / expected.norm())


def attention_error(problem: Problem, o: torch.Tensor) -> float:
    """The largest relative error of o, over the first and last row of some sequences."""
    batch = problem.case.batch
    rows = problem.case.rows
    worst = 0.0
    for sequence in {0, batch // 2, batch - 1}:
        for row in {0, rows - 1}:
            expected = expected_row(problem, sequence, row)
            worst = max(worst, relative_error(o[sequence * rows + row], expected))
    return worst


def checked_error(problem: Problem, o: torch.Tensor) -> float:
    """Raises ValueError if it is too large."""
    error = attention_error(problem, o)
    if not error < ATTENTION_LIMIT:
        case = problem.case
        raise ValueError(
            f"{case.model}: batch {case.batch}, {case.rows} rows, context {case.context}, segments "
            f"of {case.segment}: relative error {error:.2g}; less than {ATTENTION_LIMIT} is "
            "expected"
        )
    return error


def peers(problem: Problem) -> dict[str, Callable]:
    """Ours to beat, over K and V made contiguous: name → what to run."""
    case = problem.case
    # [batch, context, Hkv, D]
    k, v = (x.contiguous() for x in problem.kv[problem.slab_rows].unbind(2))
    q = problem.q.view(case.batch, case.rows, *problem.q.shape[1:])
    by_head = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    mask = causal_lower_right(case.rows, case.context) if case.rows > 1 else None

    def sdpa():
        return F.scaled_dot_product_attention(
            *by_head, attn_mask=mask, scale=problem.scale, enable_gqa=True
        )

    if not importlib.util.find_spec("flash_attn"):
        return {"sdpa": sdpa}

    def flash_attention():
        from flash_attn import flash_attn_with_kvcache

        return flash_attn_with_kvcache(q, k, v, softmax_scale=problem.scale, causal=True)

    return {"sdpa": sdpa, "flash-attn": flash_attention}


def times_ours(run_peer: Callable, ms: float) -> float | str:
    """A peer's time over ours; if it fails, as its kernels may not suit the device, why."""
    try:
        return median_ms(run_peer) / ms
    except Exception as error:
        return f"failed: {cut(one_line(repr(error)), 80)}"


def attention(problem: Problem, work: Work, use_triton: bool) -> Callable:
    """What a layer does, results in the model's type."""
    q = problem.q
    rows, H, D = q.shape
    outputs = Outputs([work], [rows], [], H, D, q.dtype, q.device, use_triton)

    def run():
        outputs.partial_attention(q, problem.kv, work, problem.scale)
        return outputs.merge()

    return run


def time_attention(case: AttentionCase, dtype, copy) -> dict:
    """What is printed of a case. copy: B/s of a copy. Raises ValueError if a result is wrong."""
    slots = random_slots(case)
    problem = random_problem(case, slots, dtype)
    run = attention(problem, attention_work(case, slots, dtype), True)

    error = checked_error(problem, run()[0])
    kind = "decode" if case.rows == 1 else "prefill"
    result = dict(kind=kind, **case._asdict(), error=error)
    ms = median_ms(run)
    if ms is None:
        return result
    heads, kv_heads, head_dim = MODELS[case.model]
    kv_bytes = 2 * case.batch * case.context * kv_heads * head_dim * dtype.itemsize
    pairs = case.batch * case.rows * (case.context - case.rows / 2)
    result |= dict(
        ms=ms,
        TBs=kv_bytes / ms / 1e9,
        TFLOPs=4 * heads * head_dim * pairs / ms / 1e9,
        of_copy=kv_bytes / ms * 1e3 / copy,
    )
    for peer, run_peer in peers(problem).items():
        result[f"x_{peer}"] = times_ours(run_peer, ms)
    return result


def time_shared(case: AttentionCase, dtype, rounds: int = 5) -> dict:
    """Decodes over a shared prefix that is read once, and by each for itself: times in turn."""
    slots = random_slots(case)
    problem = random_problem(case, slots, dtype)
    runs = [
        attention(problem, attention_work(case, slots, dtype, share), GPU)
        for share in (True, False)
    ]
    seconds = np.zeros((rounds, 2))
    errors = []
    for r, (i, run) in product(range(-1, rounds), enumerate(runs)):
        started = time.perf_counter()
        o, _ = run()
        if GPU:
            torch.cuda.synchronize()
        if r < 0:  # that warms up
            errors.append(checked_error(problem, o))
        else:
            seconds[r, i] = time.perf_counter() - started
    once, alone = 1e3 * np.median(seconds, 0)
    ratios = seconds[:, 1] / seconds[:, 0]
    return dict(
        kind="shared",
        **case._asdict(),
        error=max(errors),
        ms_once=once,
        ms_alone=alone,
        x_alone=float(np.median(ratios)),
        x_least=ratios.min(),
        x_most=ratios.max(),
    )


# Merge.


def expected_merge(
    o: torch.Tensor, lse: torch.Tensor, parts: torch.Tensor
) -> torch.Tensor:
    """[rows, H, D] in float64. parts: see kernels.merge."""
    missing = (parts < 0)[..., None]
    weights = lse[parts].double().masked_fill(missing, -math.inf).softmax(1)
    return (weights[..., None] * o[parts].double()).sum(1)


def time_merge(case: MergeCase, copy) -> dict:
    """What is printed of a case. copy: B/s of a copy. Raises ValueError if a result is wrong."""
    heads, _, head_dim = MODELS[case.model]
    total = case.rows * case.parts
    o = torch.randn(total, heads, head_dim, device=DEVICE)
    lse = 8 * torch.randn(total, heads, device=DEVICE)
    parts = torch.randperm(total, device=DEVICE).view(case.rows, case.parts)
    parts[1::2, 0] = -1  # ragged: every second row has a part less

    def run():
        return merge(o, lse, parts, "triton")

    error = relative_error(run()[0], expected_merge(o, lse, parts))
    if not error < MERGE_LIMIT:
        raise ValueError(
            f"{case.model}: merge of {case.rows} rows, {case.parts} parts: relative "
            f"error {error:.2g}"
        )
    result = dict(kind="merge", **case._asdict(), error=error)
    ms = median_ms(run)
    if ms is None:
        return result
    rows_moved = int((parts >= 0).sum()) + case.rows
    bytes_moved = rows_moved * heads * (head_dim + 1) * 4
    return result | dict(
        ms=ms,
        TBs=bytes_moved / ms / 1e9,
        of_copy=bytes_moved / ms * 1e3 / copy,
    )


# What is run.


def tiny_cases(model: str):
    """For the interpreter, but with ends of segments, tiles and pieces."""
    return [
        AttentionCase(model, 3, 1, 300, 128),
        AttentionCase(model, 1, 1, 700, 512),
        AttentionCase(model, 2, 20, 150, 32),
        AttentionCase(model, 6, 1, 400, 128, shared=384),
        MergeCase(model, 5, 2),
        MergeCase(model, 9, 6),
    ]


def decode_cases(model: str, segment: int, small: bool, room: float):
    """Those whose KV takes at most `room` bytes."""
    shape = MODELS[model]
    batches = (1, 64) if small else (1, 4, 16, 64, 256)
    contexts = (16_384,) if small else (4096, 16_384, 65_536, 131_072)
    for batch in batches:
        for context in contexts:
            kv_bytes = 4 * batch * context * shape.kv_heads * shape.head_dim
            if kv_bytes <= room:
                yield AttentionCase(model, batch, 1, context, segment)


def cases(options):
    """Of all models, one after another."""
    models = options.models[:1] if options.small else options.models
    segments = options.segments[:1] if options.small else options.segments
    for model in models:
        if not GPU:
            yield from tiny_cases(model)
            continue
        free_memory, _ = torch.cuda.mem_get_info()
        # KV lies twice in the slab, once contiguous for the peers, and some memory is to spare.
        room = min(free_memory / 6, 12e9)
        for segment in segments:
            yield from decode_cases(model, segment, options.small, room)
            yield AttentionCase(model, 64, 1, 15_872, segment, shared=15_360)
            for prefix in (0, 8192, 32_768, 131_072):
                yield AttentionCase(model, 1, 2048, 2048 + prefix, segment)
        for rows in (64, 1024, 8192):
            for parts in (2, 4, 8):
                yield MergeCase(model, rows, parts)


def describe(options, copy: float | None) -> str:
    """What is measured, on what, with which settings: the lines above the tables."""
    said = "There is no GPU: tiny shapes through Triton's interpreter, checked and not timed."
    if options.shared:
        said = "A shared prefix, read once and by each for itself, in turn: medians of 5 rounds."
    elif GPU:
        said = f"Times are medians; a copy moves {copy / 1e12:.2f} TB/s; x: a peer's time over ours."
    triton = kernels.triton.__version__
    return (
        f"Kernels of attention and merge, {options.dtype} (merge: float32), each checked against "
        f"float64.\n{said}\nRun on {describe_machine(DEVICE)}, Triton {triton}."
    )


# By key of a result: name and unit.
COLUMNS = {
    "kind": ("kind", ""),
    "model": ("model", ""),
    "batch": ("batch", "sequences"),
    "rows": ("rows", "of q"),
    "context": ("context", "tokens"),
    "segment": ("segment", "tokens"),
    "shared": ("shared", "tokens"),
    "parts": ("parts", "of a row"),
    "error": ("error", "relative"),
    "ms": ("time", "ms"),
    "TBs": ("moves", "TB/s"),
    "TFLOPs": ("computes", "TFLOP/s"),
    "of_copy": ("of a copy's", "share"),
    "ms_once": ("read once", "ms"),
    "ms_alone": ("alone", "ms"),
    "x_alone": ("alone", "x once"),
    "x_least": ("least", "x once"),
    "x_most": ("most", "x once"),
}


def format_row(cells: list[str]) -> str:
    """The kind, the model, and numbers; why there is no number may be longer than its column."""
    kind, model, *numbers = cells
    return f"{kind:<8}{model:<14}" + "".join(f"{text:>12}" for text in numbers)


def format_heads(result: dict) -> str:
    """Names and units of its columns."""
    columns = [COLUMNS.get(key, (key.removeprefix("x_"), "x ours")) for key in result]
    names, units = zip(*columns)
    return f"\n{format_row(names)}\n{format_row(units)}"


def format_result(result: dict) -> str:
    def cell(value):
        if isinstance(value, str):
            return value
        return f"{value:.3g}" if isinstance(value, float) else f"{value:,}"

    return format_row([*map(cell, result.values())])


def write_json(file, copy, results: list[dict]):
    report = dict(
        device=torch.cuda.get_device_name() if GPU else "cpu",
        copy=copy,
        torch=torch.__version__,
        triton=kernels.triton.__version__,
        lines=results,
    )
    file.seek(0)
    json.dump(report, file, indent=1)
    file.flush()


def shared_case(text: str) -> AttentionCase:
    """For argparse: decodes x shared tokens + own ones, of the small model (on a GPU, a real
    one)."""
    match = re.fullmatch(r"([1-9]\d{0,3})x([1-9]\d{0,5})\+([1-9]\d{0,5})", text)
    if match is None:
        said = f"{shown(text)}: decodes x shared + own tokens, as 64x8192+512, are expected"
        raise argparse.ArgumentTypeError(said)
    batch, shared, own = map(int, match.groups())
    model = "llama-3.1-8b" if GPU else "small"
    segment = math.gcd(shared, 512)
    return AttentionCase(model, batch, 1, shared + own, segment, shared)


def parse_options(arguments: list[str]):
    parser = Parser(description="Benchmark the kernels.")
    add = parser.add_argument
    add(
        "--models",
        help=f"of {', '.join(MODELS)}, by commas; default: all, tiny on a CPU",
    )
    add("--segments", default="128,512,2048", help="tokens of a segment")
    add(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="default bfloat16 (CPU: float16, --shared: float32)",
    )
    shared = "decodes over a shared prefix, as 64x8192+512 (own tokens last); nothing else"
    add("--shared", type=shared_case, metavar="BxS+T", help=shared)
    add("--small", action="store_true", help="a few shapes of the first model")
    add("--json", type=output_file, metavar="FILE", help="a file for the lines")
    options = parser.parse_args(arguments)
    if kernels.triton is None:
        parser.error("Triton is not installed; it is what is measured")
    default = "llama-3.1-8b,llama-2-7b,llama-3-70b" if GPU else "tiny"
    options.models = (options.models or default).split(",")
    for name in options.models:
        if name not in MODELS:
            parser.refuse(f"--models {shown(name)}: {', '.join(MODELS)} are there")
    if not re.fullmatch(r"[1-9]\d{0,5}(,[1-9]\d{0,5})*", options.segments):
        said = "positive numbers below a million, by commas, are expected"
        parser.refuse(f"--segments {shown(options.segments)}: {said}")
    options.segments = [int(tokens) for tokens in options.segments.split(",")]
    on_cpu = "float32" if options.shared else "float16"
    options.dtype = options.dtype or ("bfloat16" if GPU else on_cpu)
    return options


def main(arguments: list[str]) -> int:
    options = parse_options(arguments)
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    copy = copy_bandwidth()
    print(describe(options, copy), flush=True)
    results = []
    for case in [options.shared] if options.shared else cases(options):
        try:
            if options.shared:
                result = time_shared(case, dtype)
            elif isinstance(case, AttentionCase):
                result = time_attention(case, dtype, copy)
            else:
                result = time_merge(case, copy)
        except (ValueError, torch.OutOfMemoryError) as error:
            print(f"bench/kernel_speed.py: {one_line(error)}", file=sys.stderr)
            return 1
        if not results or list(result) != list(results[-1]):
            print(format_heads(result))
        results.append(result)
        print(format_result(result), flush=True)
        if options.json:  # after every result: a later one may not fit
            write_json(options.json, copy, results)
    return 0


if __name__ == "__main__":
    run_main(main)
