"""Draws the README's figures: what a pool is, its ideas, and a request's life.

    python bench/lesson.py

writes them into bench/figures, or where `--output` says. Bytes in them are those that a TokenLake
counts with for Llama-3.1-8B in bf16; names of functions are the code's. bench/svg.py says what the
colours mean.
"""

import itertools
import sys
from pathlib import Path
from typing import NamedTuple

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from options import Parser, file_name, run_main  # noqa: E402
from pool import LakeConfig  # noqa: E402
from simulate import MODELS, segment_tokens  # noqa: E402
from svg import LINE, WIDTH, Figure  # noqa: E402
from tokenlake import TokenLake  # noqa: E402
from work import MAX_LANES, rows_of_a_block  # noqa: E402

LLAMA = MODELS["llama-3.1-8b"]
C = segment_tokens("llama-3.1-8b")
OF = "Llama-3.1-8B in bf16, one layer"
INSTANCES = 3
LAKE = TokenLake(list(range(INSTANCES)), LLAMA, LakeConfig(C), dtype=torch.bfloat16)
ROW = LAKE.query_bytes  # a row's query, and its result
QUERY = LLAMA.num_heads * LLAMA.head_dim * torch.bfloat16.itemsize
RESULT = ROW - QUERY
SEGMENT = C * LAKE.kv_bytes
# With so many rows, shipping them is as many bytes as pulling a segment.
EVEN_ROWS = SEGMENT / ROW
BLOCK = rows_of_a_block(LLAMA.num_heads // LLAMA.num_kv_heads, MAX_LANES)

MARGIN = 16
RIGHT = WIDTH - MARGIN


def size(count) -> str:
    """Bytes as people read them."""
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def named(segments) -> str:
    return ", ".join(map(str, segments))


def columns(number, width):
    """Where so many columns of a width begin, spread from margin to margin."""
    gap = (RIGHT - MARGIN - number * width) / (number - 1)
    return [MARGIN + i * (width + gap) for i in range(number)]


# ── the pool ─────────────────────────────────────────────────────────────────────────────────────

PROMPT = 9  # segments of the prompt that is drawn
HOLDER = 186  # width of an instance
SLOTS = 5, 2  # in a row, and rows
SLOT = 30, 22  # width, height
PITCH = 32, 25  # from slot to slot


def draw_pool() -> Figure:
    figure = Figure(
        "A pool of KV caches",
        f"A long prompt of {PROMPT} segments is striped over the slabs of {INSTANCES} instances. "
        "The query row of a decode, which instance 1 computes, travels to the homes of all "
        "segments; results, O and its log-sum-exp (LSE), come back and are merged. Below, to "
        f"scale: of {OF}, a segment of {C} tokens has {size(SEGMENT)}, a row's query and result "
        f"{size(ROW)}.",
        424,
    )
    holders = columns(INSTANCES, HOLDER)
    stripe(figure, holders)
    for instance, x in enumerate(holders):
        draw_slab(figure, instance, x)
    travel(figure, holders)
    compare_bytes(figure)
    return figure


def stripe(figure, holders):
    """The prompt, and the home of each of its segments."""
    width = 34
    first = (WIDTH - PROMPT * width) / 2
    said = f"a long prompt: segments of {C} tokens"
    figure.text(WIDTH / 2, 22, said, "head", "middle")
    for segment in range(PROMPT):
        x = first + segment * width
        figure.box(x + 1, 32, width - 2, 24, str(segment), "kv", "small")
        column, instance = divmod(segment, INSTANCES)
        end = holders[instance] + INSET + column * PITCH[0] + SLOT[0] / 2, 117
        figure.curve((x + width / 2, 58), end, "kv thin")
    figure.cells([(MARGIN, 14)], 20, 15, "kv")
    figure.text(44, 26, "segment of this prompt", "small")
    figure.cells([(MARGIN, 35)], 20, 15, "faint")
    figure.text(44, 47, "segment of other prompts", "small")
    figure.cells([(MARGIN, 56)], 20, 15, "faint hollow dashed")
    figure.text(44, 68, "free slot", "small")
    said = "Striped: the home of each is\none instance after that of\nthe segment before."
    figure.text(558, 26, said, "small")


def draw_slab(figure, instance, x):
    """An instance, and what its slots hold."""
    figure.box(x, 106, HOLDER, 214, look="faint hollow")
    own = range(instance, PROMPT, INSTANCES)
    across, down = SLOTS
    places = [
        (x + INSET + PITCH[0] * i, 118 + PITCH[1] * j)
        for j in range(down)
        for i in range(across)
    ]
    others = len(own)
    figure.cells(places[:others], *SLOT, "kv")
    for segment, (left, top) in zip(own, places):
        figure.text(left + SLOT[0] / 2, top + 16, str(segment), "small", "middle")
    free = len(places) - 1 - instance
    figure.cells(places[others:free], *SLOT, "faint")
    figure.cells(places[free:], *SLOT, "faint hollow dashed")
    said = f"instance {instance}: slots of a GPU"
    figure.text(x + HOLDER / 2, 186, said, "", "middle")


def numbers(instance) -> str:
    """Of the prompt's segments that live there."""
    return named(range(instance, PROMPT, INSTANCES))


INSET = 14  # of what stands in an instance
CHIP = HOLDER - 2 * INSET  # width of that
SENT = 214  # y of the arrows
ANSWERED = 294


def travel(figure, holders):
    """A decode's row to all homes, and what comes back."""
    left, middle, right = (holder + INSET for holder in holders)
    figure.box(middle, 200, CHIP, 28, "query row of a decode", "query", "small")
    figure.box(middle, 280, CHIP, 28, "merge by LSE", "result")
    centre = middle + CHIP / 2
    figure.arrow([(centre, 228), (centre, 280)], "result")
    figure.text(centre + 10, 258, f"over {numbers(1)}", "small")
    for holder, instance in ((left, 0), (right, 2)):
        said = f"attention over\nsegments {numbers(instance)}"
        figure.box(holder, 200, CHIP, 108, said)
    meet(figure, middle, left + CHIP)
    meet(figure, middle + CHIP, right)


def meet(figure, here, there):
    """Between the instance that computes a row and one that holds what it reads."""
    figure.arrow([(here, SENT), (there, SENT)], "query")
    figure.arrow([(there, ANSWERED), (here, ANSWERED)], "result")
    gap = (here + there) / 2
    figure.text(gap, SENT - 8, "query row", "small query", "middle")
    figure.text(gap, ANSWERED - 8, "result", "small result", "middle")
    figure.text(gap, ANSWERED + 17, "O and LSE", "small result", "middle")


def compare_bytes(figure):
    """What travels beside what stays, to scale."""
    whole = RIGHT - MARGIN
    figure.text(MARGIN, 344, f"{OF}, to scale:", "small faint")
    said = f"a segment, KV of {C} tokens, stays where it lives: {size(SEGMENT)}"
    figure.text(MARGIN, 366, said, "small kv")
    figure.cells([(MARGIN, 373)], whole, 10, "kv")
    said = "a row's query and result (O, and its log-sum-exp, LSE) travel instead: "
    said += f"{size(ROW)}, {EVEN_ROWS:.0f} times fewer"
    query = whole * QUERY / SEGMENT
    figure.cells([(MARGIN, 393)], query, 10, "query solid")
    figure.cells([(MARGIN + query, 393)], whole * RESULT / SEGMENT, 10, "result solid")
    figure.text(MARGIN + 16, 403, said, "small query")


# ── Q and KV must meet ───────────────────────────────────────────────────────────────────────────

MOST_ROWS = 256  # on the chart
CHART = 76, 206, 400, 130  # x, y, width, height


def draw_meet() -> Figure:
    figure = Figure(
        "Q and KV must meet; either can travel",
        "Left: a decode ships its one row to the instance that holds a segment, and the result "
        "comes back. Right: where a prompt has many rows, the segment's KV travels to them. Below: "
        f"bytes over rows. A row and its result are {size(ROW)}, a segment of {C} tokens "
        f"{size(SEGMENT)}: from {int(EVEN_ROWS) + 1} rows on to pull it is fewer bytes.",
        386,
    )
    left, right = columns(2, 350)
    show_meeting(figure, left, "a decode ships its row")
    show_meeting(figure, right, "many rows of a prompt pull the KV")
    draw_shipping(figure, left)
    draw_pulling(figure, right)
    chart_bytes(figure)
    return figure


def draw_shipping(figure, x):
    figure.cells([(x + 22, 70)], 66, 7, "query")
    figure.arrow([(x + 94, 74), (x + 256, 74)], "query")
    figure.text(x + 175, 67, "row of Q", "small query", "middle")
    figure.arrow([(x + 256, 92), (x + 94, 92)], "result")
    figure.text(x + 175, 108, "O and LSE", "small result", "middle")
    said = f"{size(ROW)} travel in a layer, not {size(SEGMENT)}:\n{EVEN_ROWS:.0f} times fewer"
    figure.text(x, 148, said, "small")


def draw_pulling(figure, x):
    figure.cells([(x + 22, y) for y in range(54, 98, 6)], 66, 5, "query")
    figure.arrow([(x + 256, 82), (x + 94, 82)], "kv")
    figure.text(x + 175, 74, "rows of K and V", "small kv", "middle")
    said = f"{size(SEGMENT)} travel in a layer, not {size(C * ROW)} for {C} rows;\n"
    said += "the KV leaves one layer early"
    figure.text(x, 148, said, "small")


def show_meeting(figure, x, said):
    """Two instances, one with queries and one with a segment."""
    figure.text(x, 24, said, "head")
    for left, whose in ((x, "the reader"), (x + 240, "the holder")):
        figure.box(left, 36, 110, 90, look="faint hollow")
        figure.text(left + 55, 118, whose, "small", "middle")
    figure.cells([(x + 262, y) for y in range(54, 98, 6)], 66, 5, "kv")


def chart_bytes(figure):
    """What travels over rows, either way."""
    x, y, width, height = CHART
    bottom = y + height
    highest = MOST_ROWS * ROW

    def place(rows, count):
        return x + width * rows / MOST_ROWS, bottom - height * count / highest

    figure.line([(x, y - 8), (x, bottom), (x + width + 8, bottom)], "faint")
    for rows in range(0, MOST_ROWS + 1, 64):
        figure.text(place(rows, 0)[0], bottom + 17, str(rows), "small", "middle")
    said = f"rows that read a segment of {C} tokens"
    figure.text(x + width / 2, bottom + 36, said, "small", "middle")
    for count, said in ((0, "0"), (SEGMENT, size(SEGMENT)), (highest, size(highest))):
        figure.text(x - 8, place(0, count)[1] + 4, said, "small", "end")
    even = place(EVEN_ROWS, SEGMENT)
    figure.line([even, (even[0], bottom)], "faint dashed")
    figure.line([place(0, 0), place(MOST_ROWS, highest)], "query")
    figure.line([place(0, SEGMENT), place(MOST_ROWS, SEGMENT)], "kv")
    beside = x + width + 12
    pulled_y = place(0, SEGMENT)[1]
    figure.text(beside, y + 4, "rows and results travel", "small query")
    figure.text(beside, pulled_y + 4, "the KV travels", "small kv")
    said = f"Break-even: {EVEN_ROWS:.0f} rows. One and\nits result are as many bytes\n"
    said += f"as the KV of {ROW / LAKE.kv_bytes:.1f} tokens."
    figure.text(beside, pulled_y + 26, said, "small")
    figure.text(even[0] - 8, bottom - 8, "ship", "small query", "end")
    figure.text(even[0] + 8, bottom - 8, "pull", "small kv")


# ── what all want is read once ───────────────────────────────────────────────────────────────────

FEW = BLOCK // 4
ROWS_THERE = FEW, 2 * FEW, FEW  # of decodes, by the instance that computes them
BAR = 5.5  # from row to row
TREE = 414  # x
FOOT = 288  # y of what stands below


def draw_once() -> Figure:
    figure = Figure(
        "What all want is read once",
        f"Left: rows of {BLOCK} decodes, which {INSTANCES} instances compute, stand at the "
        "holder of a segment at the same moment, and it reads the segment once for all of them. "
        "Right: in a prefix tree there is a group of rows for each branching; a row's own part is "
        "merged with those of its groups.",
        338,
    )
    gather_rows(figure)
    show_groups(figure)
    return figure


def gather_rows(figure):
    """Rows of decodes at the holder of a segment."""
    said = f"{BLOCK} decodes meet a segment"
    figure.text(MARGIN, 24, said, "head")
    top = 66
    height = BLOCK * BAR
    figure.box(196, top - 30, 184, height + 58, look="faint hollow")
    figure.text(288, top - 12, f"instance {INSTANCES}", "small", "middle")
    figure.text(236, top + height + 16, "rows of Q", "small query", "middle")
    figure.text(340, top + height + 16, "segment", "small kv", "middle")
    y = top
    for instance, rows in enumerate(ROWS_THERE):
        tall = rows * BAR
        said = f"instance {instance}\n{rows} rows"
        figure.box(MARGIN, y, 96, tall - 6, said, letters="small")
        bars = [(212, y + BAR * i) for i in range(rows)]
        figure.cells(bars, 48, BAR - 2, "query solid")
        figure.arrow([(MARGIN + 98, y + tall / 2 - 3), (208, y + tall / 2 - 3)], "query")
        y += tall
    stripes = [(316, top + 11 * i) for i in range(16)]
    figure.cells(stripes, 48, 9, "kv")
    middle = top + height / 2 - 1
    figure.arrow([(312, middle), (264, middle)], "kv")
    figure.text(288, middle - 9, "once", "small kv", "middle")
    said = f"{size(SEGMENT)} are read a layer, not {size(BLOCK * SEGMENT)}.\n"
    said += f"(A thread block of the GPU takes {BLOCK} rows;\n"
    said += "more rows are several reads.)"
    figure.text(MARGIN, FOOT, said, "small")


class Node(NamedTuple):
    """Segments, and beside them the rows that read these."""

    x: float
    y: float
    name: str
    width: float
    rows: str
    rows_width: float

    @property
    def middle(self) -> float:
        return self.x + (self.width + 2 + self.rows_width) / 2


def show_groups(figure):
    """A prefix tree: which rows read a node together."""
    figure.text(TREE, 24, "a group for each branching of the tree", "head")
    root = Node(TREE + 58, 46, "system prompt", 116, "A B C D", 76)
    shared = Node(TREE, 122, "document", 80, "A B", 46)
    leaves = [
        Node(TREE + 84 * i, 198, "own", 44, row, 30) for i, row in enumerate("ABCD")
    ]
    for parent, children in ((root, [shared, *leaves[2:]]), (shared, leaves[:2])):
        for child in children:
            start = parent.middle, parent.y + 32
            figure.curve(start, (child.middle, child.y - 2), "faint")
    for node in (root, shared, *leaves):
        figure.box(node.x, node.y, node.width, 30, node.name, "kv", "small")
        beside = node.x + node.width + 2
        figure.box(beside, node.y, node.rows_width, 30, node.rows, "query", "small")
    said = "The result of row A is merged of three:\n"
    said += "its own part, that of A B, and that of A B C D."
    figure.text(TREE, FOOT, said, "small result")


# ── sequence parallelism is a split of rows ──────────────────────────────────────────────────────

CACHED = INSTANCES  # segments of the prompt that are in the pool
SEGMENTS = CACHED + 3 * INSTANCES  # and those whose rows are computed
COMPUTER = 106, 96  # y and height of an instance


def draw_split() -> Figure:
    figure = Figure(
        "Sequence parallelism is only a split of rows",
        f"A prompt of {SEGMENTS} segments, striped over {INSTANCES} instances; the first {CACHED} "
        "are in the pool. Rows of the others are computed where these will live: instance 0 has "
        f"{named(range(0, SEGMENTS, INSTANCES))}. {fresh_in_words()} There is no ring. Where fresh KV would be "
        "more bytes than the queries and results of those that read it, these travel instead.",
        350,
    )
    deal_rows(figure)
    holders = columns(INSTANCES, HOLDER)
    for instance, x in enumerate(holders):
        draw_computer(figure, instance, x)
    exchange_fresh(figure, holders)
    said = "No ring: fresh KV goes from each instance to those with later rows, both\n"
    said += "ways between any two, and old KV likewise. Where KV would be more bytes\n"
    said += "than the queries and results of its readers, these travel instead."
    figure.text(MARGIN, 302, said, "small")
    return figure


def fresh_sent(source, target) -> list[int]:
    """New segments of an instance that rows of another read: those with later rows there."""
    last = max(range(target, SEGMENTS, INSTANCES))
    return [s for s in range(CACHED, SEGMENTS) if s % INSTANCES == source and s < last]


def fresh_in_words() -> str:
    pairs = itertools.permutations(range(INSTANCES), 2)
    sent = (f"{named(fresh_sent(a, b))} from {a} to {b}" for a, b in pairs)
    return f"Fresh KV of segments travels: {'; '.join(sent)}."


def deal_rows(figure):
    """The prompt, and the instance of each of its segments."""
    width = 34
    first = (WIDTH - SEGMENTS * width) / 2
    figure.text(WIDTH / 2, 22, f"one prompt: {SEGMENTS} segments", "head", "middle")
    for segment in range(SEGMENTS):
        x = first + segment * width
        look = look_of(segment)
        figure.box(x + 1, 32, width - 2, 24, str(segment), look, "small")
        left, top = place_of(segment)
        figure.curve((x + width / 2, 58), (left + SLOT[0] / 2, top - 1), f"{look} thin")
    figure.cells([(MARGIN, 14)], 20, 15, "kv")
    figure.text(44, 26, "in the pool already", "small")
    figure.cells([(MARGIN, 35)], 20, 15, "query")
    figure.text(44, 47, "rows to compute", "small")
    said = "Striped: rows are\ncomputed where their\nKV will live."
    figure.text(604, 26, said, "small")


def look_of(segment) -> str:
    return "kv" if segment < CACHED else "query"


def place_of(segment):
    """Left and top of it at its instance."""
    column, instance = divmod(segment, INSTANCES)
    width = SEGMENTS // INSTANCES * PITCH[0]
    left = columns(INSTANCES, HOLDER)[instance] + (HOLDER - width) / 2
    return left + column * PITCH[0], COMPUTER[0] + 14


def draw_computer(figure, instance, x):
    """An instance, its old segment, and the rows that it computes."""
    top, height = COMPUTER
    figure.box(x, top, HOLDER, height, look="faint hollow")
    own = range(instance, SEGMENTS, INSTANCES)
    for segment in own:
        left, y = place_of(segment)
        figure.cells([(left, y)], *SLOT, look_of(segment))
        figure.text(left + SLOT[0] / 2, y + 16, str(segment), "small", "middle")
    centre = x + HOLDER / 2
    figure.text(centre, top + 60, f"instance {instance}", "", "middle")
    said = f"computes rows of {named(own[CACHED // INSTANCES :])}"
    figure.text(centre, top + 80, said, "small", "middle")


def exchange_fresh(figure, holders):
    """Between each two instances, both ways: neighbours side by side, the outer ones below."""
    top, height = COMPUTER
    for left in range(INSTANCES - 1):
        ends = holders[left] + HOLDER + 2, holders[left + 1] - 2
        tell(figure, left, left + 1, [(ends[0], top + 32), (ends[1], top + 32)])
        tell(figure, left + 1, left, [(ends[1], top + 76), (ends[0], top + 76)])
    first, *_, last = (holder + HOLDER / 2 for holder in holders)
    bottom = top + height + 2
    for source, target, start, end, y in (
        (INSTANCES - 1, 0, last - 20, first + 20, bottom + 28),
        (0, INSTANCES - 1, first - 20, last + 20, bottom + 58),
    ):
        path = [(start, bottom), (start, y), (end, y), (end, bottom)]
        tell(figure, source, target, path)


def tell(figure, source, target, path):
    """Fresh KV goes along a path, the middle of which is level."""
    figure.arrow(path, "kv")
    middle = (path[0][0] + path[-1][0]) / 2
    level = path[len(path) // 2][1]
    said = f"KV {named(fresh_sent(source, target))}"
    figure.text(middle, level - 7, said, "small kv", "middle")


# ── a conventional instance is a lake of one ─────────────────────────────────────────────────────

FLEET = 4  # instances
PANEL = 216  # width
LAKES = [  # instances in each, policy, what that means
    (4, "tokenlake", "one lake of four instances:\nany row meets any KV"),
    (2, "lakes:2x2", "two lakes of two:\na query stays in its lake"),
    (1, "router", "four lakes of one, conventional:\nthey never communicate"),
]


def draw_lakes() -> Figure:
    figure = Figure(
        "A conventional instance is a lake of one",
        f"{FLEET} instances as one lake with one pool; as two lakes of two behind a router; as "
        "four lakes of one behind a router, each with a cache of its own, which never communicate.",
        222,
    )
    for x, (members, policy, said) in zip(columns(len(LAKES), PANEL), LAKES):
        figure.text(x + PANEL / 2, 192, said, "small", "middle")
        draw_fleet(figure, x, members, policy)
    return figure


def draw_fleet(figure, x, members, policy):
    """Instances in lakes of so many members each."""
    pitch = PANEL / FLEET
    middle = x + PANEL / 2
    figure.text(middle, 20, policy, "code", "middle")
    source = "requests" if members == FLEET else "router"
    figure.box(middle - 45, 32, 90, 28, source, letters="small")
    for first in range(0, FLEET, members):
        left = x + first * pitch + 2
        width = members * pitch - 4
        top = left + width / 2, 84
        figure.curve((middle, 62), top, "faint")
        figure.box(left, 86, width, 86, look="faint hollow")
        for instance in range(members):
            near = left + instance * pitch + 3
            figure.box(near, 94, pitch - 10, 32, str(first + instance), letters="small")
        said = "cache" if members == 1 else "pool"
        figure.box(left + 3, 134, width - 6, 30, said, "kv", "small")


# ── the control plane is deterministic ───────────────────────────────────────────────────────────

RANK = 190  # width
LANE = 736  # x of the way back
BAND = 712 - MARGIN  # width of what spans all ranks


def draw_agree() -> Figure:
    figure = Figure(
        "The control plane is deterministic",
        "From the same trace, the same clock and fit of rank 0 and the same sampled tokens, every "
        "rank plans the same for all. Ranks compare a digest of the plan and its tokens before the "
        "first exchange of data. Then Q, results and KV cross, each rank with each. At the end of "
        "an iteration sampled tokens, rank 0's clock and its fit cross; with them the next one is "
        "planned.",
        516,
    )
    figure.text(MARGIN, 24, "what every rank has", "head")
    said = (
        "the trace · sampled tokens · rank 0's clock · rank 0's fit of the time predictor"
    )
    figure.box(MARGIN, 36, BAND, 32, said)
    pitch = (BAND - RANK) / (INSTANCES - 1)
    for rank in range(INSTANCES):
        draw_rank(figure, MARGIN + rank * pitch, rank)
    said = "each rank sends all others the digest of its plan and tokens;\nif one differs, all "
    said += "stop, before any data has crossed"
    figure.box(MARGIN, 186, BAND, 66, said, code="Cluster.announce, Cluster.confirm")
    said = "in each layer, from each rank to each: Q, results (O, LSE), KV"
    figure.box(MARGIN, 386, BAND, 32, said)
    said = (
        "what the next plan needs crosses: sampled tokens · rank 0's clock · rank 0's fit"
    )
    figure.box(MARGIN, 442, BAND, 50, said, code="EndOfIteration.gather")
    figure.arrow([(BAND + 18, 467), (LANE, 467), (LANE, 52), (BAND + 18, 52)], "ink")
    figure.text(LANE, 508, "the next iteration", "small", "end")
    return figure


def draw_rank(figure, x, rank):
    """What it does in an iteration, between what crosses."""
    middle = x + RANK / 2
    for y, end in ((70, 94), (164, 184), (254, 274), (420, 440)):
        figure.arrow([(middle, y), (middle, end)], "ink")
    calls = "Scheduler.schedule\nTokenLake.gen_plans"
    figure.box(x, 96, RANK, 66, f"rank {rank} plans for all", code=calls)
    calls = "TokenLake.put\nTokenLake.query"
    figure.box(x, 276, RANK, 66, "computes its own rows", code=calls)
    exchange(figure, middle - 72, "query", "Q")
    exchange(figure, middle - 20, "result", "O, LSE")
    exchange(figure, middle + 52, "kv", "KV")


def exchange(figure, x, look, said):
    """Goes from a rank to the others, and comes to it from them."""
    ends = [(x, 344), (x, 384)]
    figure.arrow(ends, look)
    figure.arrow(ends[::-1], look)
    figure.text(x + 8, 368, said, f"small {look}")


# ── a request's life ─────────────────────────────────────────────────────────────────────────────

STEP_PITCH = 62
STRIP = 556  # x of the segments
SEGMENT_PITCH = 31
HITS = 3
NEW = 2  # segments that the rest of the prompt fills
REST = NEW + 1  # with its open tail


class Step(NamedTuple):
    title: str
    said: str
    calls: str  # who does it
    looks: list[str]  # of the request's segments
    word: str  # on these


STEPS = [
    Step(
        "It arrives",
        "when it is due, by rank 0's clock, and waits in the queue.",
        "Server._send_due, Scheduler.add",
        ["faint hollow"] * (HITS + REST),
        "only tokens",
    ),
    Step(
        "It is matched",
        "Chained hashes of its segments are looked up in the prefix tree.",
        "Balancer.match, PrefixTree.match",
        ["kv"] * HITS + ["faint hollow"] * REST,
        f"{HITS} hits",
    ),
    Step(
        "It is admitted",
        "if there is room. While another prefills its next segment it waits, to\n"
        "hit that. What it hits is pinned: it cannot be evicted (copies can).",
        "Scheduler._admit, Balancer.awaited, Balancer.admit",
        ["kv solid"] * HITS + ["faint hollow"] * REST,
        "pinned",
    ),
    Step(
        "In each iteration slots are reserved",
        "for its next rows, at the instances where their segments will live. If no\n"
        "slot is free, what was least recently used is evicted.",
        "Scheduler._reserve, Balancer.reserve, PrefixTree.evict",
        ["kv solid"] * HITS + ["kv hollow dashed"] * REST,
        "slots reserved",
    ),
    Step(
        "Its rows are planned",
        "with all others': who computes them, and how they meet their KV.",
        "Engine._plan, TokenLake.gen_plans",
        ["kv solid"] * HITS + ["query"] * REST,
        "rows to compute",
    ),
    Step(
        "Its rows are computed",
        "by layers: KV is put, rows query the pool. The last gives a token.",
        "Engine._launch, TokenLake.put, TokenLake.query",
        ["kv solid"] * HITS + ["kv"] * REST,
        "KV written",
    ),
    Step(
        "It is committed",
        "Full segments are published: others hit them from now on.",
        "Scheduler.advance, Balancer.commit, PrefixTree.insert",
        ["kv solid"] * (HITS + NEW) + ["kv"],
        "published, open tail",
    ),
    Step(
        "It is finished",
        "Its segments are unpinned, and stay in the LRU until a slot is needed.",
        "Balancer.release, PrefixTree.unpin, Server._finish",
        ["kv"] * (HITS + NEW) + ["faint hollow dashed"],
        "in the LRU, slot freed",
    ),
]
LOOP = 4, 7  # these are repeated, by number
PREEMPTED = Step(
    "Or it is preempted",
    "if all slots are pinned and it was admitted last. It keeps its tokens,\n"
    "gives back its slots, waits again, and will hit what it had published.",
    "Scheduler._preempt, Balancer.release, Scheduler.add",
    ["kv"] * (HITS + 1) + ["faint hollow"] * (REST - 1),
    "unpinned, slots given back",
)
RESERVES = 4  # the step to which that is the alternative
ENTRIES = [*STEPS[:RESERVES], PREEMPTED, *STEPS[RESERVES:]]  # from above to below


def draw_life() -> Figure:
    named = "; ".join(f"{number}. {step.title}" for number, step in enumerate(STEPS, 1))
    first, last = LOOP
    figure = Figure(
        "A request's life",
        f"{named}. Steps {first} to {last} are repeated in each iteration. If in step {RESERVES} "
        "all slots are pinned, the request that was admitted last is preempted, and goes on with "
        "step 1.",
        sum(map(height_of, ENTRIES)) + 12,
    )
    for step in ENTRIES:
        draw_step(figure, step)
    ys = [middle_of(step) for step in STEPS]
    for number, (y, end) in enumerate(zip(ys, [*ys[1:], None]), 1):
        figure.box(48, y - 13, 26, 26, str(number), letters="head")
        if end:
            figure.arrow([(61, y + 15), (61, end - 15)], "faint")
    go_back(figure, 28, (46, ys[last - 1]), ys[first - 1], "ink")
    go_back(figure, 12, (84, middle_of(PREEMPTED) - 11), ys[0], "ink dashed")
    return figure


def go_back(figure, lane, start, y, look):
    """To the number of an earlier step. lane: the x of the way up."""
    figure.arrow([start, (lane, start[1]), (lane, y), (46, y)], look)


def height_of(step) -> float:
    return STEP_PITCH + LINE * step.said.count("\n")


def middle_of(step) -> float:
    """y of its number."""
    return sum(map(height_of, ENTRIES[: ENTRIES.index(step)])) + 26


def draw_step(figure, step):
    """A line of the story, who does it, and what becomes of the request's segments."""
    y = middle_of(step)
    figure.text(90, y - 6, step.title, "head")
    figure.text(90, y + 12, step.said, "small")
    figure.text(90, y + height_of(step) - 33, step.calls, "code faint")
    for look in dict.fromkeys(step.looks):
        places = [
            (STRIP + SEGMENT_PITCH * i, y - 14)
            for i, own in enumerate(step.looks)
            if own == look
        ]
        figure.cells(places, SEGMENT_PITCH - 4, 22, look)
    figure.text(STRIP, y + 25, step.word, "small faint")


# ── the program ──────────────────────────────────────────────────────────────────────────────────

FIGURES = {
    "pool": draw_pool,
    "meet": draw_meet,
    "once": draw_once,
    "split": draw_split,
    "lakes": draw_lakes,
    "agree": draw_agree,
    "life": draw_life,
}


def main(arguments: list[str]):
    parser = Parser(description="Draws the README's figures.")
    default = HERE / "figures"
    parser.add_argument(
        "--output", type=file_name, default=default, help="folder (bench/figures)"
    )
    folder = Path(parser.parse_args(arguments).output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, draw in FIGURES.items():
            draw().write(folder / f"{name}.svg")
    except OSError as error:
        parser.refuse(
            f"--output {folder}: {error.strerror}; a folder that takes files is expected"
        )


if __name__ == "__main__":
    run_main(main)
