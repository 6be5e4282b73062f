"""What a case of the conformance vectors is made of (see conformance.py): its parts, numbers that
are drawn the same everywhere, and the state of a pool, as a file has it and as the balancer has it.
"""

import sys
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from balancer import Balancer, Request  # noqa: E402

# A float64 has all integers up to here, and so has every reader of JSON.
MOST_EXACT = 2**53 - 1


class Case(NamedTuple):
    name: str  # within its kind; in files behind it
    shows: str  # a sentence
    input: dict
    # Field of the output → "exactly", "cost" or {"within": absolute tolerance}.
    compare: dict
    because: str = ""  # where tolerances come from
    paged: bool = False  # see answer_partial_attention
    output: dict | None = None  # once it is known


def exact_case(name, shows, fields: str, **given) -> Case:
    """All fields are compared exactly."""
    return Case(name, shows, given, dict.fromkeys(fields.split(), "exactly"))


class Kind(NamedTuple):
    """How cases of a kind are made and answered."""
    cases: Callable  # () → cases, without their output
    answer: Callable  # input → output, by this implementation
    # Input → output of a reference, where that is more exact.
    expect: Callable | None = None
    # Input, value of the field that is compared by cost → cost. ValueError: it is not allowed.
    cost: Callable | None = None


class Draws:
    """Random numbers that are the same everywhere: NumPy keeps the raw stream of a bit generator as
    it is, what a Generator makes of it may change."""
    def __init__(self, seed: int):
        self.bits = np.random.PCG64(seed)
        self.drawn: list[list[int]] = []  # by `integers`

    def below(self, limit: int, count: int) -> list[int]:
        return [int(raw) % limit for raw in self.bits.random_raw(count)]

    def uniform(self, *shape: int) -> np.ndarray:
        """Multiples of 2^-12 in [-1, 1)."""
        raw = self.bits.random_raw(int(np.prod(shape)))
        return ((raw >> np.uint64(51)).astype(np.float64) / 2**12 - 1).reshape(shape)

    def integers(self, limits: np.ndarray) -> np.ndarray:
        """In place of a Generator's: one below each limit. They are kept."""
        raw = self.bits.random_raw(len(limits))
        numbers = (raw % limits.astype(np.uint64)).astype(np.int64)
        self.drawn.append(numbers.tolist())
        return numbers


class Recorded:
    """The draws of a case, in place of a Generator."""
    def __init__(self, draws: list[list[int]]):
        self.draws = iter(draws)

    def integers(self, limits: np.ndarray) -> np.ndarray:
        numbers = column(next(self.draws, []))
        if len(numbers) != len(limits) or (numbers >= limits).any():
            raise ValueError(f"draws {numbers.tolist()} for limits {limits.tolist()}")
        return numbers


def column(values) -> np.ndarray:
    return np.array(values, np.int64)


# ── a pool and its requests, as files have them ──────────────────────────────────────────────────


def segment_id(home: int, number: int) -> str:
    """An id that says something: its hash home is `home`, if there are more instances than that."""
    return (home.to_bytes(8, "little") + number.to_bytes(8, "big")).hex()


def make_pool(instances, slots, segment_tokens, taken=(), segments=(), **others) -> dict:
    """A pool whose slots are free, but for those that are taken or hold segments."""
    taken = {*taken, *(slot for segment in segments for slot in segment["slots"])}
    every = range(instances * slots)
    free = [[slot for slot in every if slot // slots == i] for i in range(instances)]
    pool = dict(
        instances=instances,
        slots=slots,
        segment_tokens=segment_tokens,
        placement="stripe",
        replicate_factor=3.0,
        free=[[slot for slot in here[::-1] if slot not in taken] for here in free],
        segments=list(segments),
        lru=[],
        extras=[],
        hits=0.0,
        load=[0] * instances,
    )
    return pool | others


def make_segment(id, slots, parent=None, heat=0.0, touched=0) -> dict:
    return dict(id=id, parent=parent, slots=slots, heat=heat, touched=touched)


def balancer_of(pool: dict) -> Balancer:
    """A balancer in the state that a case begins with."""
    balancer = Balancer(
        pool["instances"],
        pool["slots"],
        pool["segment_tokens"],
        pool["placement"],
        pool["replicate_factor"],
    )
    balancer.free = [list(slots) for slots in pool["free"]]
    balancer.load = column(pool["load"])
    tree = balancer.tree
    by_slot = {}
    by_id = {None: None}
    for given in pool["segments"]:  # parents come before their children
        id = given["id"]
        first, *others = given["slots"]
        parent = by_id[given["parent"]]
        segment = tree.insert(bytes.fromhex(id), parent, first // balancer.slots, first)
        segment.replicas.update((slot // balancer.slots, slot) for slot in others)
        segment.heat = given["heat"]
        segment.touched = given["touched"]
        by_id[id] = segment
        by_slot.update(dict.fromkeys(given["slots"], segment))
    tree.clock = max((segment.touched for segment in by_slot.values()), default=0)
    tree.root.heat = pool["hits"]
    tree.lru.update((bytes.fromhex(id), by_id[id]) for id in pool["lru"])
    tree.extras.update((slot, by_slot[slot]) for slot in pool["extras"])
    balancer._index_replicas()
    return balancer


def pool_of(balancer: Balancer, replicate_factor: float) -> dict:
    """The state of a balancer, as a case has it."""
    tree = balancer.tree
    segments = [
        make_segment(
            segment.id.hex(),
            list(segment.replicas.values()),
            segment.parent.id.hex() or None,
            segment.heat,
            segment.touched,
        )
        for segment in sorted(tree.segments.values(), key=lambda segment: segment.depth)
    ]
    return dict(
        instances=balancer.num_instances,
        slots=balancer.slots,
        segment_tokens=balancer.segment_tokens,
        placement=balancer.placement,
        replicate_factor=replicate_factor,
        free=[list(slots) for slots in balancer.free],
        segments=segments,
        lru=[id.hex() for id in tree.lru],
        extras=list(tree.extras),
        hits=tree.root.heat,
        load=balancer.load.tolist(),
    )


def arriving(balancer: Balancer, given: dict) -> Request:
    """A request that comes, with a segment's length of answer."""
    length = given["length"]
    request = Request(given["id"], [0] * length, length + balancer.segment_tokens)
    request.ids = [bytes.fromhex(id) for id in given["ids"]]
    request.table = np.zeros(balancer.num_segments(request.max_tokens), np.int32)
    return request


def request_of(balancer: Balancer, given: dict) -> Request:
    """A running request in the state that a case begins with."""
    request = arriving(balancer, given)
    request.num_prompt = given["prompt"]
    published = request.ids[: given["published"]]
    request.segments = [balancer.tree.segments[id] for id in published]
    request.num_shared = given["shared"]
    table = given["table"]
    request.table[: len(table)] = table
    request.num_slots = len(table)
    request.done = given["done"]
    request.held_row = len(balancer.held)
    written = max(len(published), balancer.num_segments(request.done))
    instances = column(table[:written]) // balancer.slots
    held = np.bincount(instances, minlength=balancer.num_instances)
    balancer.held = np.concatenate((balancer.held, held[None]))
    return request


def make_request(length, ids=(), table=(), done=0, published=0, prompt=None) -> dict:
    """A request that shares nothing, of a prompt only, if not said otherwise."""
    return dict(
        id=0,
        length=length,
        prompt=length if prompt is None else prompt,
        ids=list(ids),
        published=published,
        shared=0,
        table=list(table),
        done=done,
    )


def state_of(request: Request) -> dict:
    """A running request, as a case has it."""
    return dict(
        id=request.id,
        length=len(request.tokens),
        prompt=request.num_prompt,
        ids=[id.hex() for id in request.ids],
        published=len(request.segments),
        shared=request.num_shared,
        table=request.table[: request.num_slots].tolist(),
        done=request.done,
    )


if __name__ == "__main__":
    print(__doc__)
