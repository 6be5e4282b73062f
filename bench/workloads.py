"""Generated loads, written as traces: JSON lines, a request each.

    python bench/workloads.py loogle --rate 1 --num-requests 300 --seed 0 > t.jsonl

Arrivals are Poisson, `--rate` requests per second. What is shared is shared in whole blocks of 512
tokens, so a shared part is rounded up to blocks:

    loogle     a document (lognormal, mean 24k, σ 0.5, at least 4k) and a question of 50–300 tokens;
               24 documents are active, each for 4–12 questions; answers of 10–200
    scbench    sessions over a context (lognormal, mean 227k, σ 0.5, at least 20k) of 5 turns; a
               turn adds the answer and 30–200 tokens, 5 s after the answer; answers of 20–150
    sharegpt   a system prompt of 1,536 and a message (lognormal, μ 5.3, σ 1, at most 2,400);
               answers lognormal (μ 5.1, σ 0.8, at most 1,000)
    toolagent  one of three families' prefixes, 12 / 15 / 18 blocks for 48 / 38 / 14 % of requests,
               and an own part (lognormal, mean 2k, σ 0.8); answers of 50–400
    mixed      loogle, scbench and sharegpt, a third of the requests each

A later turn repeats the whole blocks of the one before; its last, started block counts as new.
"""

import json
import math
import sys
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from options import Parser, number, run_main  # noqa: E402
from traces import TraceForm  # noqa: E402

BLOCK = TraceForm().block  # tokens of a hash id


class Turn(NamedTuple):
    """A request of a session."""
    blocks: list[int]  # hash ids of the prompt
    prompt_tokens: int
    answer_tokens: int


def lognormal(rng, mean: float, sigma: float) -> int:
    return int(rng.lognormal(math.log(mean) - sigma**2 / 2, sigma))


def make_turn(new_blocks, shared: list[int], own_tokens: int, answer_tokens: int) -> Turn:
    """A request whose prompt is shared blocks and `own_tokens` after them."""
    own_blocks = new_blocks(-(-own_tokens // BLOCK))
    prompt_tokens = len(shared) * BLOCK + own_tokens
    return Turn(shared + own_blocks, prompt_tokens, answer_tokens)


# Each yields sessions, lists of turns, without end. new_blocks(n): n hash ids that are new.


def loogle(rng, new_blocks):
    documents = []  # blocks, and questions that are still to come
    while True:
        while len(documents) < 24:
            tokens = max(4000, lognormal(rng, 24_000, 0.5))
            blocks = new_blocks(-(-tokens // BLOCK))
            questions = int(rng.integers(4, 13))
            documents.append([blocks, questions])
        document = documents[rng.integers(24)]
        document[1] -= 1
        if document[1] == 0:
            documents.remove(document)
        question_tokens = int(rng.integers(50, 301))
        answer_tokens = int(rng.integers(10, 201))
        yield [make_turn(new_blocks, document[0], question_tokens, answer_tokens)]


def scbench(rng, new_blocks):
    while True:
        length = max(20_000, lognormal(rng, 227_000, 0.5))  # of the session so far
        whole_blocks = []  # of the turn before
        turns = []
        for _ in range(5):
            length += int(rng.integers(30, 201))
            own_tokens = length - len(whole_blocks) * BLOCK
            answer_tokens = int(rng.integers(20, 151))
            turn = make_turn(new_blocks, whole_blocks, own_tokens, answer_tokens)
            turns.append(turn)
            whole_blocks = turn.blocks[: length // BLOCK]
            length += answer_tokens
        yield turns


def sharegpt(rng, new_blocks):
    system_prompt = new_blocks(3)
    while True:
        message_tokens = 1 + int(rng.lognormal(5.3, 1))
        answer_tokens = 1 + int(rng.lognormal(5.1, 0.8))
        yield [
            make_turn(
                new_blocks,
                system_prompt,
                min(2400, message_tokens),
                min(1000, answer_tokens),
            )
        ]


def toolagent(rng, new_blocks):
    prefixes = [new_blocks(blocks) for blocks in (12, 15, 18)]
    while True:
        prefix = prefixes[rng.choice(3, p=(0.48, 0.38, 0.14))]
        own_tokens = 1 + lognormal(rng, 2000, 0.8)
        answer_tokens = int(rng.integers(50, 401))
        yield [make_turn(new_blocks, prefix, own_tokens, answer_tokens)]


def mixed(rng, new_blocks):
    parts = [
        loogle(rng, new_blocks),
        scbench(rng, new_blocks),
        sharegpt(rng, new_blocks),
    ]
    while True:  # a session of scbench is five requests
        part = rng.choice(3, p=(5 / 11, 1 / 11, 5 / 11))
        yield next(parts[part])


WORKLOADS = {
    "loogle": loogle,
    "scbench": scbench,
    "sharegpt": sharegpt,
    "toolagent": toolagent,
    "mixed": mixed,
}


def generate(name: str, num_requests: int, rate: float, seed: int):
    """Lines of the trace, as dictionaries. rate: requests per second."""
    rng = np.random.default_rng((seed, 7))
    hash_ids = count()

    def new_blocks(number):
        return list(islice(hash_ids, number))

    sessions = WORKLOADS[name](rng, new_blocks)
    arrival_ms = 0.0
    remaining = num_requests
    for session_id in count():
        gap_ms = rng.exponential(1000 / rate)
        turns = next(sessions)[:remaining]
        arrival_ms += gap_ms * len(turns)
        for turn in turns:
            line = dict(
                timestamp=round(arrival_ms, 1),
                input_length=turn.prompt_tokens,
                output_length=turn.answer_tokens,
                hash_ids=turn.blocks,
            )
            if len(turns) > 1:
                line |= dict(session_id=session_id, think_ms=5000)
            yield line
        remaining -= len(turns)
        if remaining == 0:
            return


def parse_options(arguments: list[str]):
    parser = Parser(description="Write a generated load as a trace.")
    add = parser.add_argument
    add("name", choices=WORKLOADS)
    rate = "requests per second (default 1)"
    add("--rate", type=number(float, 1e-6, 1e6), default=1.0, help=rate)
    requests = number(int, 1, 10_000_000)
    add("--num-requests", type=requests, default=300, help="default 300")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0)
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = parse_options(arguments)
    for line in generate(options.name, options.num_requests, options.rate, options.seed):
        print(json.dumps(line))
    return 0


if __name__ == "__main__":
    run_main(main)
