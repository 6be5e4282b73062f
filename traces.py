"""What comes? The lines of a trace, checked, and the requests that are made of them. No torch.

    file ─ read_trace ─▶ TraceLines ─ arrive(tokens) ─▶ Requests
                          who waits     what stands in
                          for whom      for hash ids

A line is a JSON object, as in Mooncake's traces. Its prompt is given by ids of blocks (`hash_ids`:
equal ids are equal tokens), by the ids of its tokens (`input_ids`), by its text (`prompt`, where
there is a tokenizer), or by its length alone: then it shares nothing.

*Sessions.* A turn is sent when its predecessor is answered and `think_ms` have passed, and not
before its timestamp. Lines of one `session_id` follow each other. Where lines have a `chat_id`,
each follows the one that its `parent_chat_id` names, and several may follow the same one. A turn
by tokens or text continues what was said before; one by blocks is complete as it is.

A trace holds no tokens for a block's id, so something stands in for them: `RandomTokens` of a
model's vocabulary where a model serves them, `NumberedTokens` where nothing but equality counts.

Time counts from the first line: a trace may be a slice of another, or have Unix times.
"""

import json
from array import array
from dataclasses import dataclass, field
from itertools import islice
from typing import Callable, NamedTuple

import numpy as np

from balancer import Request


# ms of a unit that timestamps may have.
TIME_UNITS = {"ms": 1, "s": 1000}


class TraceForm(NamedTuple):
    """How a trace is meant, which its lines do not say."""
    block: int = 512  # tokens of a hash id; Mooncake has 512, Bailian 16
    unit_ms: int = 1  # of a timestamp; other times are in ms always
    scale: int = 1  # lengths, and the block, are divided by it

    @property
    def scaled_block(self) -> int:
        return self.block // self.scale

    @classmethod
    def of(cls, options) -> "TraceForm":
        """As --trace-block, --trace-time-unit and, where a program has it, --trace-scale say."""
        usual = cls()
        return cls(
            block=options.trace_block or usual.block,
            unit_ms=TIME_UNITS[options.trace_time_unit or "ms"],
            scale=getattr(options, "trace_scale", None) or usual.scale,
        )


# ── what stands in for tokens ────────────────────────────────────────────────────────────────────


class RandomTokens:
    """Tokens of a vocabulary, from generators: each hash id has one, seeded by (seed, id)."""
    def __init__(self, vocab_size: int, block: int, seed: int):
        self.vocab_size = vocab_size
        self.block = block
        self.seed = seed

    def of_block(self, hash_id: int, length: int) -> list[int]:
        """The first tokens of a block: a prompt may end in it."""
        # A generator is not seeded by a negative number: those count down from 2**65, where no
        # positive one of 64 bits comes to.
        return self._draw(hash_id % 2**65, length)

    def of_request(self, index: int, length: int) -> list[int]:
        """The prompt of a request that shares nothing, by its index: no hash id seeds it."""
        return self._draw(2**65 + index, length)

    def _draw(self, number, length):
        rng = np.random.default_rng((self.seed, number))
        return rng.integers(self.vocab_size, size=length).tolist()


# Numbered tokens are negative, as none of a vocabulary is. Those of blocks begin at the first, those
# of requests that share nothing at the second; answers count from −1 down.
FIRST_OF_BLOCKS = -(2**62)
FIRST_OF_REQUESTS = -(2**61)


class NumberedTokens:
    """Integers of 64 bits that only one block, request or answer has: they are like nobody's tokens
    of a vocabulary, and no model can read them."""
    def __init__(self, block: int):
        self.block = block
        self.block_numbers = {}  # by hash id: any 64 bits, so blocks are numbered as they come
        self.next_own = FIRST_OF_REQUESTS

    def of_block(self, hash_id: int, length: int) -> array:
        number = self.block_numbers.setdefault(hash_id, len(self.block_numbers))
        return self._count(FIRST_OF_BLOCKS + self.block * number, length)

    def of_request(self, index: int, length: int) -> array:
        first = self.next_own
        self.next_own += length
        return self._count(first, length)

    @staticmethod
    def of_answer(index: int) -> int:
        """Each token of a request's answer."""
        return -1 - index

    @staticmethod
    def _count(first, length):
        return array("q", np.arange(first, first + length).tobytes())


# ── lines ────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class TraceLine:
    """A request of a trace, lengths scaled, and what became of it."""
    index: int  # request id: which request of the trace, from 0
    where: str  # file:line
    # Which it waits for, of its session.
    previous: "TraceLine | None" = field(repr=False)
    session_id: str | int | None  # of chats: the first one's chat_id
    salt: str
    timestamp: float  # ms since the first line's
    think_ms: float
    # Of a turn that continues another it is an upper bound: an answer may end early.
    input_length: int
    output_length: int
    input_ids: list[int] | None = None  # its own; a turn's, behind all before
    hash_ids: list[int] | None = None
    next_turns: list["TraceLine"] = field(default_factory=list, repr=False)
    turns_to_come: int = field(default=0, repr=False)  # of these, that have not been sent yet
    # From its arrival on, until nobody wants its tokens any more.
    request: Request | None = field(default=None, repr=False)

    @property
    def total(self) -> int:
        """Tokens of prompt and answer, at most."""
        return self.input_length + self.output_length

    @property
    def is_continued(self) -> bool:
        """Whether a later turn's prompt begins with this one's tokens."""
        return any(turn.input_ids is not None for turn in self.next_turns)

    def arrive(self, tokens: RandomTokens | NumberedTokens) -> Request:
        """Makes its request; `tokens` stand in for what the line does not hold."""
        if self.input_ids is not None:
            prompt = [*(self.previous.request.tokens if self.previous else []), *self.input_ids]
        elif self.hash_ids is not None:
            # The last block may be cut.
            starts = range(0, self.input_length, tokens.block)
            lengths = [min(tokens.block, self.input_length - start) for start in starts]
            blocks = map(tokens.of_block, self.hash_ids, lengths)
            prompt = next(blocks)
            for block in blocks:
                prompt += block
        else:
            prompt = tokens.of_request(self.index, self.input_length)
        self.request = Request(
            self.index, prompt, len(prompt) + self.output_length, self.salt
        )
        return self.request

    def leave(self) -> "TraceLine | None":
        """It is sent, so its prompt holds its predecessor's tokens. Returns the predecessor if no
        other turn is going to want them."""
        previous = self.previous
        if previous:
            previous.turns_to_come -= 1
            if previous.turns_to_come == 0:
                return previous


def predecessors(lines: list[TraceLine]) -> list[int | None]:
    """Whom each line follows, by index: a line's repr does not say."""
    return [line.previous and line.previous.index for line in lines]


def warn_of_long_segments(lines, form: TraceForm, segment_tokens: int, warn):
    """Of what prompts with blocks share only whole segments hit."""
    has_blocks = any(line.hash_ids is not None for line in lines)
    if has_blocks and segment_tokens > form.scaled_block:
        said = f"is more than the trace's blocks of {form.scaled_block} tokens have"
        warn(
            f"--segment-tokens {segment_tokens} {said}: of what prompts share, only whole "
            "segments hit"
        )


# ── what a line may say ──────────────────────────────────────────────────────────────────────────


class Key(NamedTuple):
    """What the value of a key must be, as a function and in words, and what it is if absent."""
    allows: Callable
    expected: str
    default: object = None


def _is_integer(value, lowest, end):
    return type(value) is int and lowest <= value < end


def _is_number(value, lowest):
    return type(value) in (int, float) and lowest <= value < 2**53


LENGTH = Key(lambda value: _is_integer(value, 1, 2**53), "a positive integer below 2**53")
TIME = Key(lambda value: _is_number(value, -(2**53)), "a number from -2**53 to 2**53")
PAUSE = Key(lambda value: _is_number(value, 0), "a number of ms from 0 to 2**53")
NAME = Key(lambda value: type(value) in (str, int), "a string or an integer")
TEXT = Key(lambda value: type(value) is str, "a string")
LIST = Key(lambda value: type(value) is list and len(value) > 0, "a list of integers, not empty,")
# Of the elements of a list.
TOKEN = Key(lambda value: _is_integer(value, 0, 2**63), "an integer from 0 to 2**63 - 1")
HASH_ID = Key(
    lambda value: _is_integer(value, -(2**63), 2**64), "an integer of 64 bits, signed or not,"
)
ELEMENTS = {"input_ids": TOKEN, "hash_ids": HASH_ID}
# How a prompt is given, by the key that tells; what comes first goes before.
PROMPTS = {
    "input_ids": {"input_ids": LIST},
    "input_length": {"input_length": LENGTH, "hash_ids": LIST},
    "prompt": {"prompt": TEXT},
}
# How a turn finds its predecessor, likewise.
SESSIONS = {
    "session_id": {"session_id": NAME},
    "chat_id": {"chat_id": NAME, "parent_chat_id": NAME},
}
SESSION_KEYS = [key for way in SESSIONS.values() for key in way]
OTHERS = {
    "timestamp": TIME,
    "output_length": LENGTH,
    "think_ms": PAUSE,
    "delay": PAUSE,  # another spelling of think_ms
    "salt": TEXT._replace(default=""),
}
KNOWN = [key for way in (*PROMPTS.values(), *SESSIONS.values(), OTHERS) for key in way]
MOST_WARNINGS = 10  # of keys that are ignored
NO_PARENT = (None, -1, "-1")  # Bailian's traces have −1


# ── the reader ───────────────────────────────────────────────────────────────────────────────────


def no_tokenizer(prompt, begins):
    said = "prompt is text, and there is no tokenizer"
    raise ValueError(f"{said}; token ids (input_ids) are expected")


class Session(NamedTuple):
    """Where a line stands."""
    previous: TraceLine | None  # whom it follows
    id: str | int | None
    own_name: tuple | None  # by which others find it, if they can follow it


class Reader:
    """Checks lines one by one, and knows whom a turn may follow."""
    def __init__(self, name, form: TraceForm, warn, encode):
        self.name = name
        self.form = form
        self.warn = warn  # is told of what is ignored
        self.encode = encode  # text, whether it begins a session → token ids; or ValueError
        self.lines = []
        # By salt, key and id: tenants do not know of each other's.
        self.last_of_session = {}
        self.ignored = set()  # keys that were warned of
        self.orphans = []  # lines that follow a chat which is not there
        self.first_time = None
        self.last_time = None

    def read(self, number, text):
        """Takes the next line of the file. Raises ValueError naming it."""
        where = f"{self.name}:{number}"
        try:
            raw = _parse(text)
            _require_one_way(raw)
            keys = _keys_of(raw)
            line = self._make_line(_check(raw, keys), where)
            self._warn_of_ignored(raw, keys, where)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        self.lines.append(line)

    def _warn_of_ignored(self, raw, keys, where):
        """Says once of each key that nothing is done with it: public traces have keys of their own,
        and others are misspelt."""
        for key in raw:
            if key in keys or key in self.ignored or len(self.ignored) > MOST_WARNINGS:
                continue
            said = f"unknown key {_shown(key)} is ignored"
            if not self.ignored:
                said += f" (known are {', '.join(KNOWN)})"
            if key in KNOWN:
                said = f"{key} is ignored, as another key says it"
            self.ignored.add(key)
            if len(self.ignored) > MOST_WARNINGS:
                said = "more keys are ignored, of which nothing is said"
            self.warn(f"{where}: {said}")
        self._warn_of_idle_pause(raw, where)

    def _warn_of_idle_pause(self, raw, where):
        """There is no answer that it could follow."""
        pause = "think_ms" if "think_ms" in raw else "delay"
        no_session = not any(key in raw for key in SESSION_KEYS)
        if pause in raw and no_session and pause not in self.ignored:
            self.ignored.add(pause)
            self.warn(f"{where}: {pause} is ignored, as the line has no session")

    def _make_line(self, values: dict, where) -> TraceLine:
        previous, session_id, own_name = self._find_session(values, where)
        scale = self.form.scale
        input_ids = self._token_ids(values, previous)
        if input_ids is None:
            self._check_blocks(values)
            input_length = -(-values["input_length"] // scale)
        else:
            if scale > 1:
                raise ValueError("tokens and text cannot be scaled; drop --trace-scale")
            input_length = len(input_ids) + (previous.total if previous else 0)
        line = TraceLine(
            index=len(self.lines),
            where=where,
            previous=previous,
            session_id=session_id,
            salt=values["salt"],
            timestamp=self._time(values, previous),
            think_ms=_think_ms(values),
            input_length=input_length,
            output_length=-(-values["output_length"] // scale),
            input_ids=input_ids,
            hash_ids=values.get("hash_ids"),
        )
        if previous:
            previous.next_turns.append(line)
            previous.turns_to_come += 1
        if own_name:
            self.last_of_session[own_name] = line
        return line

    def _find_session(self, values, where) -> Session:
        salt = values["salt"]
        name = values.get("session_id")
        if name is not None:
            own_name = salt, "session_id", name
            return Session(self.last_of_session.get(own_name), name, own_name)
        chat = values.get("chat_id")
        parent = values.get("parent_chat_id")
        previous = None
        if parent not in NO_PARENT:
            previous = self.last_of_session.get((salt, "chat_id", parent))
            if previous is None:
                self.orphans.append(where)
        own_name = None if chat is None else (salt, "chat_id", chat)
        return Session(previous, previous.session_id if previous else chat, own_name)

    def warn_of_orphans(self):
        """A slice of a trace lacks chats, and ids may be misspelt."""
        if self.orphans:
            said = "follow a parent_chat_id that no line before has with this salt, so they begin chats"
            self.warn(f"{len(self.orphans)} lines {said} (the first is {self.orphans[0]})")

    def _token_ids(self, values, previous):
        """Those of its own, or None."""
        if "prompt" not in values:
            return values.get("input_ids")
        input_ids = self.encode(values["prompt"], previous is None)
        if not input_ids:
            raise ValueError("prompt has no tokens; one at least is expected")
        return input_ids

    def _check_blocks(self, values):
        """hash_ids, if there are any, have to fit input_length."""
        if values["hash_ids"] is None:
            return
        length = values["input_length"]
        given = len(values["hash_ids"])
        blocks = -(-length // self.form.block)
        if given != blocks:
            said = f"hash_ids lists {given} blocks; input_length {length} makes {blocks}"
            raise ValueError(f"{said} of {self.form.block} tokens (--trace-block)")

    def _time(self, values, previous) -> float:
        """ms since the first line's. A turn without a time has its predecessor's."""
        time = values["timestamp"]
        if time is None:
            if previous:
                return previous.timestamp
            said = f"timestamp is missing; {TIME.expected} is expected"
            raise ValueError(f"{said} (only a session's later turns may lack it)")
        if self.first_time is None:
            self.first_time = self.last_time = time
        if time < self.last_time:
            said = f"timestamp {time} is before the previous line's {self.last_time}"
            raise ValueError(f"{said}; lines in order of time are expected")
        self.last_time = time
        return (time - self.first_time) * self.form.unit_ms


def read_trace(
    source,
    name: str,
    form: TraceForm = TraceForm(),
    limit: int | None = None,
    warn=lambda said: None,
    encode=no_tokenizer,
) -> list[TraceLine]:
    """The first `limit` requests of a trace, checked; `source` yields its lines, bytes or text, of
    which blank ones do not count. Raises ValueError: file:line, what is wrong, what is right. warn
    and encode: see Reader."""
    reader = Reader(name, form, warn, encode)
    for number, text in enumerate(source, 1):
        if len(reader.lines) == limit:
            break
        if number == 1:
            text = _drop_mark(text)
        if text.strip():
            reader.read(number, text)
    reader.warn_of_orphans()
    if not reader.lines:
        raise ValueError(f"{name}: is empty; one JSON object per line is expected")
    return reader.lines


def open_trace(option: str, path, *arguments, **options) -> list[TraceLine]:
    """`read_trace` of a file, which `option` names. ValueError also if it can't be read."""
    try:
        with open(path, "rb") as file:
            return read_trace(file, str(path), *arguments, **options)
    except OSError as error:
        raise ValueError(f"{option} {path}: {error.strerror}") from None


def _drop_mark(text):
    """Editors of some systems begin a file with a byte order mark."""
    return text.removeprefix("\ufeff" if isinstance(text, str) else b"\xef\xbb\xbf")


def _parse(text) -> dict:
    """What a line says; null says nothing."""
    if text[:2] == b"\x1f\x8b":
        raise ValueError("compressed by gzip; text is expected (zcat makes that)")
    try:
        raw = json.loads(text)
    except json.JSONDecodeError as error:
        said = f"not JSON ({error.msg} at column {error.colno})"
        raise ValueError(f"{said}; one object per line is expected") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error}); one object per line is expected") from None
    if not isinstance(raw, dict):
        is_list = isinstance(raw, list) and raw
        hint = " (`jq -c '.[]'` makes lines of an array)" if is_list else ""
        raise ValueError(f"a JSON object is expected{hint}")
    return {key: value for key, value in raw.items() if value is not None}


def _require_one_way(raw):
    """Raises ValueError if a line says the same twice."""
    if "input_ids" in raw and ("hash_ids" in raw or "input_length" in raw):
        said = "input_ids stands in place of input_length and hash_ids"
        raise ValueError(f"{said}; one or the other is expected")
    if "prompt" in raw and "input_length" in raw:
        said = "prompt stands in place of input_length and hash_ids"
        raise ValueError(f"{said}; one or the other is expected")
    if "think_ms" in raw and "delay" in raw:
        raise ValueError("delay is another name of think_ms; one or the other is expected")


def _keys_of(raw) -> dict[str, Key]:
    """The keys that count in a line: of ways to say the same, those of the first that is there."""
    prompt = next((key for key in PROMPTS if key in raw), "input_length")
    session = "session_id" if "session_id" in raw else "chat_id"
    return PROMPTS[prompt] | SESSIONS[session] | OTHERS


def _check(raw, keys) -> dict:
    """The values of the keys that count, each as it must be; None where one may be absent."""
    values = {}
    for key, rule in keys.items():
        value = values[key] = raw.get(key, rule.default)
        if key in raw:
            _require(rule, key, value)
        elif key in ("input_length", "output_length"):
            raise ValueError(f"{key} is missing; {rule.expected} is expected")
        if key in raw and key in ELEMENTS:
            for i, element in enumerate(value):
                _require(ELEMENTS[key], f"{key}[{i}]", element)
    return values


def _require(rule, what, value):
    if not rule.allows(value):
        raise ValueError(f"{what} is {_shown(value)}; {rule.expected} is expected")


def _think_ms(values) -> float:
    pause = values["think_ms"] if values["delay"] is None else values["delay"]
    return pause or 0


def _shown(value) -> str:
    """A value as JSON, in at most 80 characters, and no more of it is looked at."""
    text = "".join(islice(json.JSONEncoder().iterencode(value), 81))
    return text if len(text) <= 80 else text[:79] + "…"


# ── a trace of our own ───────────────────────────────────────────────────────────────────────────


def demo_trace(num_requests, vocab_size, seed):
    """Lines: sessions of three turns behind three system prompts, some more popular than others."""
    rng = np.random.default_rng((seed, 1))
    start = 0.0
    systems = [rng.integers(vocab_size, size=n).tolist() for n in (208, 144, 96)]
    for index in range(num_requests):
        ids = rng.integers(vocab_size, size=rng.integers(24, 72)).tolist()
        if index % 3 == 0:
            start += rng.exponential(100)
            ids = systems[rng.choice(3, p=(0.6, 0.3, 0.1))] + ids
        line = dict(
            timestamp=round(start, 1),
            session_id=index // 3,
            input_ids=ids,
            output_length=int(rng.integers(8, 25)),
            think_ms=100,
        )
        yield json.dumps(line)


if __name__ == "__main__":
    print(__doc__)
