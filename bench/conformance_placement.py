"""What a segment is called, where it lives, when it is published and when it leaves, and what a
request meets meanwhile, as small fixed cases (see conformance.py).

Each kind has its cases and the answer of this implementation, whose docstring is the kind's page in
the README of the vectors.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from balancer import Balancer, Request, root_id  # noqa: E402
from conformance_cases import (  # noqa: E402
    MOST_EXACT,
    Case,
    Draws,
    Kind,
    arriving,
    balancer_of,
    exact_case,
    make_pool,
    make_request,
    make_segment,
    request_of,
    segment_id,
    state_of,
)

# ── ids of segments ──────────────────────────────────────────────────────────────────────────────

def answer_segment_ids(given: dict) -> dict:
    """Ids of the full segments of a request: the chained hash that all of the pool rests on.

    Root: the 16-byte BLAKE2b (RFC 7693: digest length 16, no key) of the salt's bytes, with the
    personalisation `root` (4 ASCII bytes, then 12 zero bytes) and no hash salt. Plain RFC 7693 has
    no personalisation: it is bytes 48 to 63 of BLAKE2's parameter block, where fanout and depth are
    1. So before the first block its first 8 bytes, little-endian, are XORed into h[6], the others
    into h[7]. The salt's bytes are its UTF-8; a half surrogate, which has none, is three bytes by
    the same pattern (U+D800 is `ed a0 80`). An empty salt is no bytes.

    Id of a segment: the 16-byte BLAKE2b, without key, hash salt or personalisation, of 16 + 8·C
    bytes: its parent's id (the root for the first segment), then its C tokens, each as 8 bytes,
    two's complement, little-endian. A segment that is not full has no id: L tokens give
    floor(L / C) ids.

    - input: `salt` (text; null where it is no Unicode), `salt_hex` (its bytes, which count),
      `tokens`, `segment_tokens` (C)
    - output: `root`, and `ids`, in order, as lower-case hexadecimal"""
    salt = bytes.fromhex(given["salt_hex"]).decode("utf-8", "surrogatepass")
    tokens = [int(token) for token in given["tokens"]]
    balancer = Balancer(1, 1, given["segment_tokens"])
    request = Request(0, tokens, len(tokens), salt)
    balancer.extend_ids(request)
    return dict(root=root_id(salt).hex(), ids=[id.hex() for id in request.ids])


def id_case(name, shows, tokens, segment_tokens=4, salt="") -> Case:
    is_unicode = not any("\ud800" <= character <= "\udfff" for character in salt)
    return exact_case(
        name,
        shows,
        "root ids",
        salt=salt if is_unicode else None,
        salt_hex=salt.encode("utf-8", "surrogatepass").hex(),
        tokens=[token if abs(token) <= MOST_EXACT else str(token) for token in tokens],
        segment_tokens=segment_tokens,
    )


def segment_id_cases() -> list[Case]:
    return [*length_cases(), *salt_cases(), *token_cases()]


def length_cases():
    """Prompts and segments of several lengths."""
    count = list(range(1, 101))
    said = "16 bytes of the root, which is that of all cases without a salt, then 4 · 8 of tokens."
    yield id_case("one segment", said, [1, 2, 3, 4])
    yield id_case("no tokens", "Nothing gives no id.", [])
    said = "Three tokens do not fill a segment of four: no id."
    yield id_case("shorter than a segment", said, [1, 2, 3])
    said = "The fifth token begins a segment that has no id yet."
    yield id_case("one more than a segment", said, count[:5])
    yield id_case(
        "one less than two", "Seven tokens fill one segment of four.", count[:7]
    )
    said = "The second id hashes the 16 bytes of the first, then tokens 5 to 8: 48 bytes in all."
    yield id_case("two segments", said, count[:8])
    said = "Tokens 5 to 8 as a first segment: another parent, so another id."
    yield id_case("the second one moved", said, count[4:8])
    said = "C = 1: an id for each token, each of 16 + 8 hashed bytes."
    yield id_case("segments of one", said, count[:5], 1)
    yield id_case(
        "segments of three", "C = 3 cuts the same tokens elsewhere.", count[:8], 3
    )
    said = "C = 14: a message of 128 bytes is one block of BLAKE2b exactly."
    yield id_case("a block exactly", said, count[:28], 14)
    said = "100 tokens are six segments of 16, and four tokens."
    yield id_case("segments of sixteen", said, count, 16)
    said = "C = 512: a message of 4,112 bytes, more than 32 blocks; the last 76 tokens are left."
    yield id_case("long segments", said, Draws(1).below(128_000, 1100), 512)


def salt_cases():
    """Salts, behind which everything is another cache."""
    tokens = [1, 2, 3, 4, 5, 6, 7, 8]
    said = "The 8 bytes of `tenant 1` are hashed into the root, and nowhere else."
    yield id_case("salt", said, tokens, salt="tenant 1")
    said = "A salt of one zero byte is not the empty one."
    yield id_case("salt of one NUL", said, tokens, salt="\0")
    said = "`zürich` is 7 bytes in UTF-8 (ü is c3 bc); it is not normalised."
    yield id_case("unicode salt", said, tokens, salt="zürich")
    said = "The same word with u and U+0308 (75 cc 88): 8 bytes, and another root."
    yield id_case("decomposed salt", said, tokens, salt="zu\u0308rich")
    said = "U+1F30A is four bytes (f0 9f 8c 8a), no pair of surrogates."
    yield id_case("salt beyond 16 bits", said, tokens, salt="\U0001f30a")
    said = "U+D800 alone is the bytes ed a0 80; such a salt is no Unicode text."
    yield id_case("half surrogate", said, tokens, salt="\ud800")
    said = "A salt of 300 bytes, three blocks of BLAKE2b."
    yield id_case("long salt", said, tokens, salt="ab" * 150)


def token_cases():
    """Tokens are 64 bits with a sign, whatever they are."""
    yield id_case("other order", "The same tokens the other way round.", [4, 3, 2, 1])
    yield id_case("zeros", "Four tokens 0 are 32 zero bytes behind the root.", [0] * 8)
    yield id_case("negative tokens", "Token -1 is eight bytes ff.", [-1, -2, -128, -129])
    said = "More than 32 and 53 bits (as text, which is not rounded); 2^63 - 1 is ff × 7, 7f."
    yield id_case("large tokens", said, [2**31, 2**32, 2**53 + 1, 2**63 - 1])
    said = "-2^63 is seven zero bytes, then 80."
    yield id_case("smallest token", said, [-(2**63), 0, 1, -(2**53) - 1])


# ── placement ────────────────────────────────────────────────────────────────────────────────────


def answer_placement(given: dict) -> dict:
    """Slots for the next rows of a request, where their segments will live, and who should compute
    them (§4.3). Rows are cut into *runs*: rows of one segment that one instance should compute. A
    segment may be cut into several.

    Home. A segment that has no slot yet gets a *home*; n is how many of `rows` are in it. `after`
    is the instance after that of the request's segment before it, around the end, or 0 for the
    first one. An *open tail*, whose index is not below the number of `ids` (what has an id is none,
    even if `rows` do not fill it), lives where the tuple (1 if planned rows there + n are over
    `most`, else 0; open tails there; (instance - after) mod N) is smallest. A full segment lives at
    `after`, if placement is `stripe`, if it is not the first one, and if it is a first child: its
    parent is none of the request's `published` ones (though another may have published it), or has
    no children in the pool. Else it lives at its id's first 8 bytes, as an unsigned little-endian
    integer, mod N. But if planned rows there + n are over `most`, it lives where the fewest are
    planned, of equals at the first from there on, around the end.

    Slot. It is taken from the end of the home's free list; if that is empty, from the end of the
    longest one, of equals the first; if all are empty, one is evicted (see eviction), wherever it
    is. If none can be, the answer is null; slots that were given before stay with the request. A
    slot for an open tail adds to `tails` where the slot is, which need not be its home.

    Runs. As long as rows of the segment are left: as many as its slot's instance has room for
    below `most`, or all if it has none, make a run. It should be computed at that instance if
    planned rows there and its own are `most` together at most; else where the fewest are planned,
    of equals at the first from the slot's instance on, around the end. Its rows are planned there
    from then on.

    - input: `pool`, `request`, `rows` (how many come next, from position `done` on), `planned` [N]
      rows planned so far, `tails` [N] open tails, `most` rows of an instance
    - output: `runs`, null or a list with `position`, `rows`, `preferred` instance, `slot`, and
      whether it `puts` KV (not if its segment is published); and what is so afterwards: `planned`
      (unchanged if runs is null), `tails`, the request's `table`, `free`. (An open tail is the last
      segment: nothing fails behind it, so if runs is null, `tails` is unchanged, too.)"""
    balancer = balancer_of(given["pool"])
    request = request_of(balancer, given["request"])
    planned = list(given["planned"])
    tails = list(given["tails"])
    runs = balancer.reserve(request, given["rows"], planned, tails, given["most"])
    fields = "position", "rows", "preferred", "slot", "puts"
    return dict(
        runs=runs and [{field: getattr(run, field) for field in fields} for run in runs],
        planned=planned,
        tails=tails,
        table=request.table[: request.num_slots].tolist(),
        free=balancer.free,
    )


def home_case(name, shows, pool, request, rows, planned=None, tails=None, most=1000):
    none = [0] * pool["instances"]
    return exact_case(
        name,
        shows,
        "runs planned tails table free",
        pool=pool,
        request=request,
        rows=rows,
        planned=planned or none,
        tails=tails or none,
        most=most,
    )


# Their hash homes among three instances are 2, 0 and 1.
IDS = [segment_id(2, 1), segment_id(0, 2), segment_id(1, 3)]


def placement_cases() -> list[Case]:
    return [*full_segment_cases(), *tail_cases(), *busy_home_cases(), *slot_cases()]


def full_segment_cases():
    """Homes of full segments, in a pool of 3 instances with 4 slots each, C = 4."""
    empty = make_pool(3, 4, 4)
    by_hash = empty | dict(placement="hash")
    three = make_request(12, IDS)
    said = "The first segment by hash (2), the others one instance further each: 0, 1."
    yield home_case("stripe", said, empty, three, 12)
    said = "Each where its id says: 2, 0, 1 (the first 8 bytes, little-endian, mod 3)."
    yield home_case("hash", said, by_hash, three, 12)
    said = "2^64 - 1 mod 3 is 0, 2^63 mod 3 is 2: the 8 bytes are unsigned."
    large = make_request(8, ["ff" * 16, "0000000000000080" + "00" * 8])
    yield home_case("hash of large ids", said, by_hash, large, 8)
    seven = make_pool(7, 4, 4, placement="hash")
    hashed = ["218f0e1d9c4e799e9c61a265e211ea3b", "3fb161bc29d4446e54c6cd8412a2767a"]
    said = "Ids of `segment_ids/two segments`: 11,419,244,762,583,961,377 mod 7 is 4, that of the "
    said += "other is 2. Read the other way round these would be 1 and 3 (mod 3 all are alike)."
    yield home_case("hash among seven", said, seven, make_request(8, hashed), 8)
    parent = make_segment(IDS[0], [8])
    pool = make_pool(3, 4, 4, segments=[parent])
    said = "Its parent, at 2, has no child: it lives at 0."
    yield home_case("first child", said, pool, make_request(12, IDS, [8], 4, 1), 4)
    child = make_segment(segment_id(1, 9), [1], IDS[0])
    pool = make_pool(3, 4, 4, segments=[parent, child])
    other = make_request(12, [IDS[0], segment_id(2, 5), IDS[2]], [8], 4, 1)
    said = "Its parent has a child already: it lives where its hash says, at 2; the next one's "
    said += "parent is not published yet, so that lives one further, at 0."
    yield home_case("second child", said, pool, other, 8)
    said = "Another has published its first segment meanwhile, with a child. Here it is computed, "
    said += "too, at 2; so the second one is a first child as far as this request knows: at 0."
    late = make_request(8, [IDS[0], segment_id(2, 5)])
    yield home_case("published by another", said, pool, late, 8)
    said = "Six rows of twelve: two are in the second segment, which is no open tail, as it has an "
    said += "id. It lives at 0, whatever tails are there: 3 and 2 rows are no more than 6."
    args = empty, three, 6, [3, 0, 0], [3, 0, 0], 6
    yield home_case("a chunk ends inside", said, *args)
    cached = make_request(8, [IDS[0], child["id"]], [8, 1], 7, 2)
    said = "All 8 tokens are published: the last row is computed again, for its logits, in the "
    said += "published slot, and puts nothing."
    yield home_case("only logits", said, pool, cached, 1)


def tail_cases():
    """Homes of open tails."""
    empty = make_pool(3, 4, 4)
    six = make_request(6, IDS[2:])
    said = "Six tokens, C = 4: the tail, with two of them, lives one after its parent at 1, as "
    said += "tails are as many everywhere."
    yield home_case("open tail", said, empty, six, 6)
    said = "It lives where tails are fewest, at 0, though its parent is at 1."
    yield home_case("tails even out", said, empty, six, 6, tails=[0, 2, 1])
    said = "Two tokens have no full segment: the tail lives where tails are fewest, of equals at "
    said += "the first from 0 on: 1."
    yield home_case("a tail alone", said, empty, make_request(2), 2, tails=[2, 1, 1])
    said = "0 and 1 have `most` rows: it lives at 2, though there are more tails."
    alone = make_request(1)
    yield home_case("away from crowds", said, empty, alone, 1, [6, 6, 5], [0, 0, 3], 6)
    said = "Its tail has a slot: no new one is taken, the run goes on in it."
    going_on = make_request(4, IDS[:1], [5], 3, prompt=3)
    yield home_case("the tail goes on", said, make_pool(3, 4, 4, [5]), going_on, 1)


def busy_home_cases():
    """Instances that have rows enough already."""
    empty = make_pool(3, 4, 4)
    one = make_request(4, IDS[:1])
    said = "Home 2 would have 4 + 4 rows, over 6: the segment lives at 1, which has fewest."
    yield home_case("home is full", said, empty, one, 4, [3, 2, 4], most=6)
    said = "0 and 1 have 2 each; the first from home 2 on, around the end, is 0."
    yield home_case("of equals the next", said, empty, one, 4, [2, 2, 4], most=6)
    said = "Home 2 has room for 4 rows exactly."
    yield home_case("just fits", said, empty, one, 4, [0, 0, 2], most=6)
    said = "The slot is at 1, which has room for 2 of 4 rows; the others should be computed at 0, "
    said += "which has fewest, and will be put."
    with_slot = make_request(4, IDS[:1], [4])
    yield home_case(
        "a cut run", said, make_pool(3, 4, 4, [4]), with_slot, 4, [1, 4, 2], most=6
    )
    said = "All have `most` rows: all four rows go where fewest are, and the segment lives there."
    yield home_case("no room at all", said, empty, one, 4, [6, 7, 6], most=6)


def slot_cases():
    """Where a slot comes from, if home has none."""
    request = make_request(8, IDS[:2])
    said = "No slot is free at 2: one of 1 is taken, where most are free. The next home is one "
    said += "after that slot: 2 again. Then as many are free at 0 as at 1: 0 is first."
    pool = make_pool(3, 4, 4, taken=[0, 8, 9, 10, 11])
    yield home_case("home has no slot", said, pool, request, 8)
    old = make_segment(segment_id(0, 7), [5], touched=1)
    replicated = make_segment(segment_id(0, 8), [6, 2], touched=3)
    pool = make_pool(3, 4, 4, range(12), [old, replicated], lru=[old["id"]], extras=[2])
    said = "Nothing is free. What was touched earliest leaves: slot 5 (at 1), then slot 2, a "
    said += "replica (at 3). Both serve, though home is elsewhere."
    yield home_case("eviction gives a slot", said, pool, request, 8)
    said = "Tails are fewest at 1, which has no slot. 2 has most slots: the tail counts there."
    pool = make_pool(3, 4, 4, taken=[0, 4, 5, 6, 7])
    yield home_case("a tail elsewhere", said, pool, make_request(2), 2, tails=[1, 0, 2])
    said = "The full segment has a slot, its tail has none: null, and no tail more."
    args = make_pool(3, 4, 4, range(11)), make_request(6, IDS[:1]), 6
    yield home_case("a tail without a slot", said, *args, tails=[1, 0, 2])
    said = "One slot is free, then there is none: null; the first one stays with the request."
    yield home_case("all is pinned", said, make_pool(3, 4, 4, range(11)), request, 8)


# ── sealing ──────────────────────────────────────────────────────────────────────────────────────


def answer_sealing(given: dict) -> dict:
    """What happens when rows have been written and fill segments (§4.1): each full segment is
    published, in order, in the slot where it is. If its id is published already (another request
    was faster), its own slot goes to the end of its instance's free list, and the table says the
    first replica of the other. Either way the request pins it, and touches it (see eviction; the
    clock is not counted up).

    - input: `pool`, `request`, `rows` that were written, from `done` on
    - output: `done`; `published`, how many of its segments are; its `table`; `free`; `duplicates`,
      how many slots were given back; `new`, what is published now, as [[id, slot]], in order;
      `held` [N], by instance the segments of its table that have any KV then: segment i if i · C
      is less than `done`"""
    balancer = balancer_of(given["pool"])
    request = request_of(balancer, given["request"])
    before = set(balancer.tree.segments)
    balancer.commit(request, given["rows"])
    new = [segment for id, segment in balancer.tree.segments.items() if id not in before]
    return dict(
        done=request.done,
        published=len(request.segments),
        table=request.table[: request.num_slots].tolist(),
        free=balancer.free,
        duplicates=balancer.duplicates,
        new=[[segment.id.hex(), segment.slot] for segment in new],
        held=balancer.held[request.held_row].tolist(),
    )


def sealing_case(name, shows, pool, request, rows) -> Case:
    fields = "done published table free duplicates new held"
    return exact_case(name, shows, fields, pool=pool, request=request, rows=rows)


def sealing_cases() -> list[Case]:
    return [*filling_cases(), *duplicate_cases()]


def filling_cases():
    """Segments that are new."""
    pool = make_pool(3, 4, 4, [5, 6])
    one = make_request(4, IDS[:1], [5])
    said = "Four rows fill the segment: it is published in its slot."
    yield sealing_case("filled", said, pool, one, 4)
    said = "Three rows of four publish nothing, but the segment has tokens now."
    yield sealing_case("not full", said, pool, one, 3)
    said = "Its fourth token is an answer's: the segment is published like any."
    decoding = make_request(5, IDS[:1], [5, 6], 3, prompt=3)
    yield sealing_case("filled by a decode", said, pool, decoding, 1)
    published = [make_segment(IDS[0], [8]), make_segment(IDS[1], [1], IDS[0])]
    cached = make_request(8, IDS[:2], [8, 1], 7, 2)
    said = "A fully cached prompt computes its last row for its logits: nothing is filled."
    yield sealing_case(
        "its row again", said, make_pool(3, 4, 4, segments=published), cached, 1
    )


def duplicate_cases():
    """Segments that another request has published meanwhile."""
    first = make_segment(IDS[0], [8])
    second = make_segment(IDS[1], [1], IDS[0])
    pool = make_pool(3, 4, 4, [5, 6], [first])
    said = "Its id is in slot 8 already: slot 5 is free again, and the table says 8."
    yield sealing_case("another was faster", said, pool, make_request(4, IDS[:1], [5]), 4)
    said = "The first is a duplicate; the second is published, a child of the other's first."
    yield sealing_case("one of two", said, pool, make_request(8, IDS[:2], [5, 6]), 8)
    pool = make_pool(3, 4, 4, [5, 9], [first, second])
    said = "The first was hit, the second has been published meanwhile, the third is begun."
    three = make_request(10, IDS[:2], [8, 5, 9], 4, 1)
    yield sealing_case("the second of three", said, pool, three, 6)
    pool = make_pool(3, 4, 4, [5], [make_segment(IDS[0], [8, 2])], extras=[2])
    said = "The other one has two replicas: the table says the first."
    yield sealing_case("a replicated one", said, pool, make_request(4, IDS[:1], [5]), 4)


# ── eviction ─────────────────────────────────────────────────────────────────────────────────────


def answer_eviction(given: dict) -> dict:
    """Which slots leave, in order (§4.4).

    A clock counts admissions and releases; it begins at the largest `touched`. An admission pins
    the segments that it hits, first to last; a release unpins those of its request, last to first.
    Either touches each of them: `touched` becomes the clock (which is counted up before), and its
    further replicas go to the young end of `extras`, in the order made. A segment that nobody pins
    any more goes to the young end of `lru`; a pin takes it out.

    An eviction looks at the segment of the oldest slot of `extras`, and at the oldest of `lru`, and
    takes the one that was touched earlier, of equals that of `extras`. It gives the slot of that
    segment's last replica, which leaves `extras`, too: replicas leave in reverse of the order they
    were made in. When the first one leaves, the segment does. Without either the answer is null.

    - input: `pool`; `events`, in order: {"admit": request, "ids": all of its segments, which are
      published} or {"release": request}; `count` of evictions after them
    - output: `slots`, one for each eviction"""
    balancer = balancer_of(given["pool"])
    requests = {}
    for event in given["events"]:
        if "admit" in event:
            ids = event["ids"]
            length = len(ids) * balancer.segment_tokens + 1
            request = dict(id=event["admit"], length=length, ids=ids)
            requests[event["admit"]] = arriving(balancer, request)
            balancer.admit(requests[event["admit"]], len(ids))
        else:
            balancer.release(requests[event["release"]])
    return dict(slots=[balancer.tree.evict() for _ in range(given["count"])])


def leaving_case(name, shows, segments, events, count, **pool) -> Case:
    """If not said otherwise, the last segment was released first."""
    lru = [segment["id"] for segment in segments[::-1]]
    pool = make_pool(3, 4, 4, segments=segments, **dict(lru=lru) | pool)
    return exact_case(name, shows, "slots", pool=pool, events=events, count=count)


def admit(request: int, *ids: str) -> dict:
    return dict(admit=request, ids=list(ids))


def release(request: int) -> dict:
    return dict(release=request)


def eviction_cases() -> list[Case]:
    return [*leaf_first_cases(), *replica_leaves_cases()]


def leaf_first_cases():
    """Segments a, b, c behind each other, and d, the other child of b."""
    a, b, c, d = (segment_id(0, number) for number in range(10, 14))
    chain = [make_segment(a, [0]), make_segment(b, [5], a), make_segment(c, [1], b)]
    fork = [*chain, make_segment(d, [6], b)]
    yield leaving_case("nothing", "An empty pool has nothing to evict.", [], [], 1)
    said = "One reader leaves: its last segment is the first to go, its first one the last."
    yield leaving_case("leaf first", said, chain, [admit(1, a, b, c), release(1)], 4)
    said = "A reader of a and b stays: only c may leave."
    events = [admit(1, a, b, c), admit(2, a, b), release(1)]
    yield leaving_case("pinned", said, chain, events, 2)
    said = "c was released before d, so it goes first; the stem of both goes last."
    both = [admit(1, a, b, c), admit(2, a, b, d)]
    yield leaving_case("branches", said, fork, [*both, release(1), release(2)], 5)
    said = "The same, released the other way round."
    yield leaving_case("released later", said, fork, [*both, release(2), release(1)], 5)
    said = "c was released first, but hit again: d goes before it."
    events = [*both, release(1), release(2), admit(3, a, b, c), release(3)]
    yield leaving_case("hit again", said, fork, events, 5)


def replica_leaves_cases():
    """Segments that have several replicas."""
    a, b = segment_id(0, 10), segment_id(0, 11)
    copied = [make_segment(a, [0, 4, 8]), make_segment(b, [5, 9], a)]
    said = "All were touched at once: replicas go first, by `extras`, but each time the last made "
    said += "of that segment; then leaf and parent."
    events = [admit(1, a, b), release(1)]
    yield leaving_case("replicas first", said, copied, events, 6, extras=[4, 8, 9])
    said = "a is pinned: its two further replicas may leave all the same, its first one may not."
    yield leaving_case(
        "of what is pinned", said, copied[:1], [admit(1, a)], 3, extras=[4, 8]
    )
    said = "b was touched before a was, so it leaves first; then the replica of a, then a."
    aged = [make_segment(a, [0, 4], touched=5), make_segment(b, [5], touched=2)]
    yield leaving_case("an older segment", said, aged, [], 3, extras=[4])
    said = "a, the oldest of lru, leaves before the oldest of extras, which is b's: first a's last "
    said += "replica, in slot 4, then its first one; then those of b."
    both = [make_segment(b, [5, 9], touched=2), make_segment(a, [0, 4], touched=1)]
    yield leaving_case("its last replica", said, both, [], 4, extras=[9, 4])
    said = "The clock goes on from 3: a is touched at 4, when it is pinned. So b leaves before a's "
    said += "further replica; then only a's first one is left, which is pinned."
    aged = [make_segment(b, [5], touched=3), make_segment(a, [0, 4], touched=2)]
    yield leaving_case("the clock goes on", said, aged, [admit(1, a)], 3, extras=[4])


# ── admission ────────────────────────────────────────────────────────────────────────────────────


CALLS = "match", "awaited", "fits", "admit", "reserve", "commit", "release"


def answer_admission(given: dict) -> dict:
    """What a request meets from its arrival to its end (§4.1): calls in their order, each with its
    result, or null.

    - `match`: how many of its segments, the first ones, are published. The next three are given
      this as `matched`.
    - `awaited`: whether the segment behind those is being filled by another: by the first request
      that was admitted with it among its `ids`, but not among what it matched; until that request
      has published it, or is released. (Others with this segment do not take its place.)
    - `fits`: whether the slots that are free or can be had, less those that are `promised`, suffice
      for the request's segments behind those that match, ceil(length / C) - `matched`. To be had
      is one slot for each segment of `lru` that is not among those that match, and all `extras`.
    - `admit`: the clock and the number of `admissions` are counted up. If that number is a multiple
      of 16 · N, all heat is halved, `hits`, too. Then each segment that matches gets 1 more heat,
      is pinned and touched (see eviction), and `hits` gets as much more as these are. `done` is
      their tokens, but one less than `length` at most.
    - `reserve`: slots for the next `rows` (see placement; nothing is planned, there are no other
      tails, and no limit `most`). The result is the slot of each of its runs, or null.
    - `commit`: that `rows` are written (see sealing). A segment that is published now has heat 0.
    - `release`: slots of segments that are not published go to the ends of the free lists, in order
      of the table. Then the clock is counted up, and the others are unpinned (see eviction).

    - input: `pool`; `admissions` so far; `requests`, which are all to come: `id`, `length`, `ids`;
      `calls`, each with `call`, `request` and what it is given
    - output: `results`; what is so afterwards: `requests`, a table by id: `id`, `done`,
      `published`, `shared`, `table` (0 and empty of those that do not run); `segments`, a table by
      id: `id`, `heat`, `touched`, `pins`, how many requests pin it; `free`, `lru`, `extras`, `hits`
    """
    balancer = balancer_of(given["pool"])
    tree = balancer.tree
    tree.admissions = given["admissions"]
    requests = {entry["id"]: arriving(balancer, entry) for entry in given["requests"]}
    results = [result_of(balancer, requests, **call) for call in given["calls"]]
    states = [state_of(request) for _, request in sorted(requests.items())]
    segments = [tree.segments[id] for id in sorted(tree.segments)]
    columns = "id", "done", "published", "shared", "table"
    return dict(
        results=results,
        requests={name: [state[name] for state in states] for name in columns},
        segments=dict(
            id=[segment.id.hex() for segment in segments],
            heat=[segment.heat for segment in segments],
            touched=[segment.touched for segment in segments],
            pins=[segment.pins for segment in segments],
        ),
        free=balancer.free,
        lru=[id.hex() for id in tree.lru],
        extras=list(tree.extras),
        hits=tree.root.heat,
    )


def result_of(balancer, requests, call, request, **arguments):
    if call not in CALLS:
        raise ValueError(f"call {call!r}: some of {', '.join(CALLS)} are expected")
    result = getattr(balancer, call)(requests[request], **arguments)
    return [run.slot for run in result] if isinstance(result, list) else result


def admission_case(name, shows, pool, requests, calls, admissions=0) -> Case:
    """requests: of each its length and ids, numbered from 1; calls: (call, request, what it is
    given)."""
    listed = [
        dict(id=id, length=length, ids=ids)
        for id, (length, ids) in enumerate(requests, 1)
    ]
    calls = [
        dict(call=call, request=request, **others) for call, request, others in calls
    ]
    given = dict(pool=pool, admissions=admissions, requests=listed, calls=calls)
    fields = "results requests segments free lru extras hits"
    return exact_case(name, shows, fields, **given)


def fill(request, rows) -> list[tuple]:
    """Calls that reserve and commit its next rows."""
    return [(call, request, dict(rows=rows)) for call in ("reserve", "commit")]


def arrive(request, matched) -> list[tuple]:
    """Calls of a request that comes and matches so much."""
    return [("match", request, {}), ("admit", request, dict(matched=matched))]


def admission_cases() -> list[Case]:
    return [*hit_cases(), *waiting_cases(), *end_cases()]


A, B = segment_id(0, 10), segment_id(1, 11)  # published, B behind A
X, Y = segment_id(2, 12), segment_id(0, 13)  # not published, X behind B or A


def pool_of_two(**others) -> dict:
    """3 instances with 4 slots each, C = 4."""
    first = make_segment(A, [0, 8], heat=5.0, touched=7)
    second = make_segment(B, [5], A, 3.0, touched=6)
    state = dict(segments=[first, second], lru=[B, A], extras=[8], hits=20.0)
    return make_pool(3, 4, 4, **state | others)


def hit_cases():
    """What an admission does to what it hits."""
    said = "Two of three segments match: each is one hotter, pinned, and touched at 8. The clock "
    said += "was at 7. Eight tokens are done."
    yield admission_case("a hit", said, pool_of_two(), [(13, [A, B, X])], arrive(1, 2))
    said = "The 48th admission to 3 instances: heat of 5 and 3 is halved, then 1 more (3.5, 2.5); "
    said += "hits of 20 are halved, then 2 more (12)."
    one = [(9, [A, B])]
    yield admission_case("heat is halved", said, pool_of_two(), one, arrive(1, 2), 47)
    said = "The 49th halves nothing. All 8 tokens are cached: 7 are done, as the last row is "
    said += "computed for its logits."
    cached = [(8, [A, B])]
    yield admission_case("all is cached", said, pool_of_two(), cached, arrive(1, 2), 48)
    said = "1 reads A and B, 3 reads A; 2 has read both, and is gone. So A is shared, B is not."
    calls = [*arrive(1, 2), *arrive(2, 2), *arrive(3, 1), ("release", 2, {})]
    three = [(9, [A, B]), (9, [A, B]), (8, [A, X])]
    yield admission_case("who shares", said, pool_of_two(), three, calls)


def waiting_cases():
    """Whether a request that comes should wait."""
    ask = "awaited", 3, dict(matched=2)
    same = [(13, [A, B, X])] * 4
    said = "1 fills X, so 3 waits for it; until X is published, and 3 matches it."
    calls = [*arrive(1, 2), ask, *fill(1, 3), ask, *fill(1, 1), ask, ("match", 3, {})]
    asked_again = [*calls, ("awaited", 3, dict(matched=3))]
    yield admission_case("awaited", said, pool_of_two(), same, asked_again)
    said = "1 was admitted with X first. That 2 is gone changes nothing; once 1 is gone, 4 fills X, "
    said += "but is not waited for."
    calls = [call for request in (1, 2, 4) for call in arrive(request, 2)]
    calls += [ask, ("release", 2, {}), ask, ("release", 1, {}), ask]
    yield admission_case("not awaited any more", said, pool_of_two(), same, calls)
    said = "2 fills X before 1 does, which was admitted with it first. So 1 reads it in the slot of "
    said += "2, and its own slot is free."
    calls = [*arrive(1, 2), *arrive(2, 2), *fill(1, 2), *fill(2, 4), *fill(1, 2)]
    yield admission_case("the other is faster", said, pool_of_two(), same, calls)
    said = "Two slots are free; those of A (two) and B can be had. 20 tokens take five slots: they "
    said += "fit, but not if one is promised. 20 tokens that match A and B take three: the free "
    said += "ones, and A's further replica. Once A and B are pinned, the first 20 fit no more."
    pool = pool_of_two(taken=[1, 2, 3, 4, 6, 9, 10])
    other = (20, [X, Y, *(segment_id(0, number) for number in range(14, 17))])
    long = (20, [A, B, *other[1][:3]])

    def fits(request, matched, promised):
        return "fits", request, dict(matched=matched, promised=promised)

    asked = [fits(1, 0, 0), fits(1, 0, 1), fits(2, 2, 0), fits(2, 2, 1)]
    pinned = [*asked, *arrive(2, 2), fits(1, 0, 0), fits(2, 2, 0)]
    yield admission_case("what fits", said, pool, [other, long], pinned)


def end_cases():
    """What a request leaves behind."""
    said = "X is published, its tail is not: that slot is free again. X, B and A are in lru, in "
    said += "this order, and touched at 9."
    calls = [*arrive(1, 2), *fill(1, 5), ("release", 1, {})]
    yield admission_case("released", said, pool_of_two(), [(14, [A, B, X])], calls)
    said = "Its four segments are not full: their slots are free again, in order of the table."
    calls = [*arrive(1, 0), ("reserve", 1, dict(rows=16)), ("release", 1, {})]
    yield admission_case("given up", said, pool_of_two(), [(16, [X, Y, *IDS[:2]])], calls)
    said = "Request 1 takes the slots of B and Y, which leave, and gives them back. So A has no "
    said += "child any more, and the segment of 2 behind it lives one after A, at 1, not where its "
    said += "hash says, at 2."
    first = make_segment(A, [0], touched=3)
    child = make_segment(B, [2], A, touched=1)
    other = make_segment(Y, [4], touched=2)
    state = dict(segments=[first, child, other], lru=[B, Y, A])
    pool = make_pool(3, 2, 4, taken=[1, 3, 5], **state)
    calls = [*arrive(1, 0), ("reserve", 1, dict(rows=8)), ("release", 1, {})]
    calls += [*arrive(2, 1), *fill(2, 4)]
    two = [(8, [IDS[1], IDS[2]]), (8, [A, X])]
    yield admission_case("an evicted child", said, pool, two, calls)


KINDS = dict(
    segment_ids=Kind(segment_id_cases, answer_segment_ids),
    placement=Kind(placement_cases, answer_placement),
    sealing=Kind(sealing_cases, answer_sealing),
    eviction=Kind(eviction_cases, answer_eviction),
    admission=Kind(admission_cases, answer_admission),
)


if __name__ == "__main__":
    print(__doc__)
