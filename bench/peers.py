"""How fast is this beside Hugging Face transformers: the same checkpoint, the same requests?

    python bench/peers.py                                # a small random Llama, two loads
    python bench/peers.py --model DIR --sharing on --rounds 5 --json FILE

All requests are there from the start, answers are greedy, each has as many tokens. With sharing
prompts begin with one of a few prefixes; without, each is its own, as long. The peers, from what
most do to the best that one can do by hand (`bench/transformers_peer.py` has them):

    generate()                one request at a time: the others are compared with it
    generate(), batches of B
    by hand, batches of B     a greedy loop, and a cache that is written in place
    prefix once               by hand, one at a time, on KV of the prefix that is computed once
    prefix once, batches of B

Ours is run_cluster.py under torchrun. In each round all take turns, one process after another;
ratios are made within a round. Loading and imports do not count, nor does a warm-up of the peers
(of ours, which has none, all counts). The peers have all threads; so has one rank
(OMP_NUM_THREADS), and of several each has its share of all cores, as run_cluster.py deals them.

Answers have to be those of generate(), token for token. Where one differs, the logits of both
tokens are computed again: a near tie is shown, anything else is an error, exit status 1.

vLLM and other engines are not among the peers: they want a GPU, where none was at hand to try.
torch.compile is not, either.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentTypeError
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from model import load_config, random_weights, shown  # noqa: E402
from options import Parser, file_name, number, output_file, run_main  # noqa: E402
from provenance import describe_machine  # noqa: E402

OURS = "tokenlake"
# A token that differs is a near tie if the logits of both are this close: so much is rounding.
TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-3,
    torch.float16: 0.05,
    torch.bfloat16: 0.4,
}
WAYS = {"generate": "generate()", "hand": "by hand", "prefix": "prefix once"}


class Variant(NamedTuple):
    """Who serves, and how: `size` is a batch of the peers', or our number of ranks."""
    way: str  # of WAYS, or OURS
    size: int

    @property
    def label(self) -> str:
        if self.way == OURS:
            return f"{OURS}, {self.size} rank{'s' * (self.size > 1)}"
        batches = f", batches of {self.size}" if self.size > 1 else ""
        return WAYS[self.way] + batches


ONE_BY_ONE = Variant("generate", 1)


class Difference(NamedTuple):
    """An answer that differs from that of ONE_BY_ONE."""
    label: str
    request: int
    position: int  # of the first token that differs
    gap: float  # see Peer.score_gap


# ── what is served ───────────────────────────────────────────────────────────────────────────────


def write_model(folder: Path, options):
    """A random Llama, as Hugging Face folders are."""
    config = dict(
        model_type="llama",
        architectures=["LlamaForCausalLM"],
        vocab_size=options.vocab_size,
        hidden_size=options.hidden_size,
        intermediate_size=options.intermediate_size,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        head_dim=options.head_dim,
        max_position_embeddings=longest_request(options),
        tie_word_embeddings=False,
        torch_dtype="float32",
    )
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    config = load_config(folder)
    weights = random_weights(config, options.seed, torch.float32, "cpu").by_name(config)
    # Some are views of one tensor, which it refuses.
    weights = {name: weight.clone() for name, weight in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def longest_request(options) -> int:
    own = options.own_tokens * (2 if options.uneven else 1)
    return options.prefix_tokens + own + options.output_tokens


def make_load(options, vocab_size, sharing: bool) -> dict:
    """The fields of transformers_peer.Load. Without sharing each prompt has a prefix of its own."""
    rng = np.random.default_rng((options.seed, 3))
    requests = options.num_requests
    num_prefixes = options.prefixes if sharing else requests

    def draw(count):
        return rng.integers(vocab_size, size=count).tolist()

    prefixes = [draw(options.prefix_tokens) for _ in range(num_prefixes)]
    own = [options.own_tokens] * requests
    if options.uneven:
        own = rng.integers(1, 2 * options.own_tokens + 1, size=requests).tolist()
    prefix = [index % num_prefixes for index in range(requests)]
    return dict(
        prompts=[prefixes[number] + draw(count) for number, count in zip(prefix, own)],
        prefix=prefix,
        prefix_tokens=options.prefix_tokens,
        output_tokens=options.output_tokens,
    )


def choose_variants(options, sharing: bool) -> list[Variant]:
    """All that make sense for a load: no batch larger than there are requests for it."""
    sizes = sorted({min(size, options.num_requests) for size in options.batch})
    variants = [ONE_BY_ONE]
    variants += [Variant(way, size) for way in ("generate", "hand") for size in sizes]
    if sharing:
        alike = -(-options.num_requests // options.prefixes)
        sizes = sorted({1, *(min(size, alike) for size in sizes)})
        variants += [Variant("prefix", size) for size in sizes]
    variants += [Variant(OURS, ranks) for ranks in options.ranks]
    return list(dict.fromkeys(variants))


# ── how it is served ─────────────────────────────────────────────────────────────────────────────


def in_a_process(work, *arguments):
    """What `work` returns, from a process that is gone afterwards."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(work, *arguments).result()


def where(options) -> tuple:
    """Device, type and threads of the peers."""
    return options.device, options.dtype, options.threads


def make_peer(folder, load: dict, where):
    # Here alone, as it brings transformers.
    from transformers_peer import Load, Peer

    return Peer(folder, Load(**load), *where)


def serve_by_peers(folder, load: dict, variants, where) -> list[tuple]:
    """Seconds and answers of each variant."""
    peer = make_peer(folder, load, where)
    peer.warm_up()
    return [peer.timed(*variant) for variant in variants]


def find_gaps(folder, load: dict, pairs, where) -> list[float]:
    """Peer.score_gap of each (request, answer, other answer)."""
    peer = make_peer(folder, load, where)
    return [peer.score_gap(*pair) for pair in pairs]


def serve_by_us(folder, load: dict, ranks, options) -> tuple:
    """Seconds and answers of run_cluster.py, as a user runs it."""
    with tempfile.TemporaryDirectory() as name:
        trace = Path(name, "trace.jsonl")
        output = Path(name, "out")
        rest = dict(timestamp=0, output_length=load["output_tokens"])
        lines = [json.dumps(dict(input_ids=ids, **rest)) for ids in load["prompts"]]
        trace.write_text("\n".join(lines))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={ranks}", str(HERE.parent / "run_cluster.py")]
        command += ["--model", str(folder), "--trace", str(trace), "--speed", "inf"]
        command += ["--output", str(output), *our_options(load, options)]
        environment = dict(os.environ)
        if ranks == 1:  # several share all cores
            environment["OMP_NUM_THREADS"] = str(options.threads)
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise RuntimeError(f"run_cluster.py has failed:\n{done.stderr[-4000:]}")
        seconds = json.loads((output / "summary.json").read_text())["duration"]
        records = map(json.loads, (output / "requests.jsonl").read_text().splitlines())
        answers = {record["request_id"]: record["output_ids"] for record in records}
    return seconds, [answers[index] for index in range(len(answers))]


def our_options(load: dict, options) -> list[str]:
    """Each rank has room for all, as each of the peers has."""
    C = options.segment_tokens
    longest = max(map(len, load["prompts"])) + load["output_tokens"]
    values = {
        "segment-tokens": C,
        "chunk-tokens": options.chunk_tokens,
        "max-batch": options.max_batch,
        "slots": len(load["prompts"]) * -(-longest // C),
        "device": options.device,
        "dtype": options.dtype,
    }
    return [text for key, value in values.items() for text in (f"--{key}", str(value))]


def serve_rounds(folder, load: dict, variants, options):
    """Seconds [rounds] of each variant, and the answers that it gave: once, if always the same."""
    seconds = {variant: [] for variant in variants}
    answers = {variant: [] for variant in variants}
    peers = [variant for variant in variants if variant.way != OURS]
    for turn in range(options.rounds):
        served = in_a_process(serve_by_peers, folder, load, peers, where(options))
        results = dict(zip(peers, served))
        for variant in variants:
            if variant.way == OURS:
                results[variant] = serve_by_us(folder, load, variant.size, options)
        for variant, (took, given) in results.items():
            seconds[variant].append(took)
            if given not in answers[variant]:
                answers[variant].append(given)
        print(f"round {turn + 1} of {options.rounds} is done", file=sys.stderr)
    return seconds, answers


# ── what came of it ──────────────────────────────────────────────────────────────────────────────


def find_differences(folder, load: dict, answers: dict, options) -> list[Difference]:
    expected = answers[ONE_BY_ONE][0]
    found = [
        (variant.label, request, expected[request], answer)
        for variant, all_given in answers.items()
        for given in all_given
        for request, answer in enumerate(given)
        if answer != expected[request]
    ]
    if not found:
        return []
    pairs = [item[1:] for item in found]
    gaps = in_a_process(find_gaps, folder, load, pairs, where(options))
    differences = []
    for (label, request, answer, other), gap in zip(found, gaps):
        alike = [a == b for a, b in zip(answer, other)]
        differences.append(Difference(label, request, alike.index(False), gap))
    return differences


def summarise(load: dict, seconds: dict, differences) -> list[dict]:
    """A row for each variant. Ratios are other seconds over its own, a round each."""
    tokens = len(load["prompts"]) * load["output_tokens"]
    one_by_one = np.array(seconds[ONE_BY_ONE])
    peers = [took for variant, took in seconds.items() if variant.way != OURS]
    best = np.min(peers, 0)
    rows = []
    for variant, took in seconds.items():
        took = np.array(took)
        other = {d.request for d in differences if d.label == variant.label}
        rows.append(
            dict(
                label=variant.label,
                seconds=took.tolist(),
                output_throughput=tokens / float(np.median(took)),
                to_one_by_one=(one_by_one / took).tolist(),
                to_best_peer=(best / took).tolist(),
                equal=len(load["prompts"]) - len(other),
            )
        )
    return rows


def describe(options) -> str:
    """What is measured, on what, with which settings: the lines above the tables."""
    model = Path(options.model).name if options.model else (
        f"a random Llama, {options.layers} layers of hidden {options.hidden_size}"
    )
    own = f"{'up to twice ' if options.uneven else ''}{options.own_tokens} own tokens"
    return (
        f"How fast is run_cluster.py beside transformers {version('transformers')}? Seconds until "
        "all requests are answered, and how many times\nas fast that is as generate() one by one, "
        f"and as the best of theirs: median (least–most) of rounds: {options.rounds}.\n"
        f"{model}, {options.dtype}; prompts of {options.prefix_tokens} prefix and {own}, answers of "
        f"{options.output_tokens}.\nRun with {options.threads} threads on "
        f"{describe_machine(options.device)}."
    )


HEAD = (
    f"{'served by':<26}{'seconds':>25}{'output':>10}{'x one by one':>20}{'x best of theirs':>20}"
    f"  equal\n"
    f"{'':<26}{'s':>25}{'tokens/s':>10}{'times':>20}{'times':>20}  answers"
)


def show(name: str, load: dict, rows: list[dict], differences, limit):
    requests = len(load["prompts"])
    print(f"\n{name}: {requests} requests\n{HEAD}")

    def cell(values):
        return f"{np.median(values):.2f} ({min(values):.2f}–{max(values):.2f})"

    for row in rows:
        print(
            f"{row['label']:<26}{cell(row['seconds']):>25}{row['output_throughput']:>10,.0f}"
            f"{cell(row['to_one_by_one']):>20}{cell(row['to_best_peer']):>20}"
            f"  {row['equal']}/{requests}"
        )
    for found in differences:
        kind = "a near tie" if found.gap < limit else "WRONG"
        place = f"request {found.request} differs at token {found.position}"
        print(f"  {found.label}: {place}: {kind}, logits differ by {found.gap:.1e}")
    sys.stdout.flush()


# ── the program ──────────────────────────────────────────────────────────────────────────────────


def counts(lowest, highest):
    """The type of an option: integers in a range, by commas."""
    one = number(int, lowest, highest)

    def parse(text):
        if not re.fullmatch(r"\d{1,9}(,\d{1,9}){0,15}", text):
            said = "up to 16 integers, by commas, are expected"
            raise ArgumentTypeError(f"{shown(text)}: {said}")
        return sorted({one(part) for part in text.split(",")})

    return parse


# fmt: off
SIZES = [  # option, lowest, highest, default, help
    ("--layers", 1, 1000, 8, "of the random model, as the next six"),
    ("--hidden-size", 1, 2**16, 512, None),
    ("--intermediate-size", 1, 2**18, 1408, None),
    ("--heads", 1, 1024, 8, None),
    ("--kv-heads", 1, 1024, 4, None),
    ("--head-dim", 2, 1024, 64, None),
    ("--vocab-size", 2, 2**20, 4096, None),
    ("--num-requests", 1, 100_000, 48, None),
    ("--prefixes", 1, 100_000, 2, "that requests share"),
    ("--prefix-tokens", 1, 2**20, 512, None),
    ("--own-tokens", 1, 2**20, 32, "of each prompt, behind its prefix"),
    ("--output-tokens", 1, 2**20, 32, None),
    ("--segment-tokens", 1, 2**20, 64, "ours"),
    ("--chunk-tokens", 1, 2**20, 512, "ours"),
    ("--max-batch", 1, 2**20, 48, "ours"),
    ("--rounds", 1, 1000, 3, None),
    ("--seed", 0, 2**63 - 1, 0, None),
]
# fmt: on


def parse_options(arguments: list[str]):
    parser = Parser(description="Serve a load here and by transformers, in turn.")
    add = parser.add_argument
    add("--model", type=file_name, help="Hugging Face folder of a Llama; default: random")
    for name, lowest, highest, default, help in SIZES:
        said = ", ".join(filter(None, [help, f"default {default}"]))
        add(name, type=number(int, lowest, highest), default=default, help=said)
    add("--uneven", action="store_true", help="own tokens from 1 to twice as many")
    add("--sharing", choices=("on", "off", "both"), default="both")
    batches = counts(1, 100_000)
    add("--batch", type=batches, default=[16, 24, 48], help="of the peers (16,24,48)")
    add("--ranks", type=counts(1, 64), default=[1, 2], help="ours (1,2)")
    cores = os.cpu_count() or 1
    add("--threads", type=number(int, 1, 4096), default=cores, help="default: all cores")
    add("--device", choices=("cpu", "cuda"), help="default: a GPU if any")
    dtypes = [str(dtype).removeprefix("torch.") for dtype in TOLERANCE]
    add("--dtype", choices=dtypes, default="float32")
    add("--json", type=output_file, metavar="FILE", help="a file for all figures")
    options = parser.parse_args(arguments)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if problem := find_problem(options, cores):
        parser.refuse(problem)
    try:
        options.config = load_config(Path(options.model)) if options.model else None
    except ValueError as error:
        parser.refuse(f"--model: {error}")
    longest = longest_request(options)
    positions = options.config.max_positions if options.config else longest
    if longest > positions:
        said = f"requests of {longest} tokens, the model has {positions} positions"
        parser.refuse(f"--prefix-tokens: {said}")
    if not importlib.util.find_spec("transformers"):
        parser.refuse("transformers is not installed; it is what is compared with")
    return options


def find_problem(options, cores) -> str | None:
    """What does not fit together, in a line."""
    if options.heads % options.kv_heads:
        return f"--heads {options.heads}: a multiple of --kv-heads {options.kv_heads} is expected"
    if options.head_dim % 2:
        return f"--head-dim {options.head_dim}: an even number is expected"
    if options.prefixes > options.num_requests:
        said = f"no more than --num-requests {options.num_requests} are expected"
        return f"--prefixes {options.prefixes}: {said}"
    if options.threads != cores and max(options.ranks) > 1:
        said = f"several ranks share all {cores} cores; with fewer --ranks 1 is expected"
        return f"--threads {options.threads}: {said}"
    if options.device == "cuda" and not torch.cuda.is_available():
        return "--device cuda: no CUDA device is visible; cpu is expected"
    longest = longest_request(options)
    if options.segment_tokens > longest:
        said = f"no more than the {longest} of a request are expected"
        return f"--segment-tokens {options.segment_tokens}: {said}"
    return None


def compare(folder, sharing: bool, options) -> dict:
    """Serves a load by all variants, prints its table, and returns all figures."""
    vocab_size = options.config.vocab_size if options.config else options.vocab_size
    load = make_load(options, vocab_size, sharing)
    variants = choose_variants(options, sharing)
    seconds, answers = serve_rounds(folder, load, variants, options)
    differences = find_differences(folder, load, answers, options)
    rows = summarise(load, seconds, differences)
    name = f"{options.prefixes} shared prefixes" if sharing else "nothing shared"
    limit = TOLERANCE[getattr(torch, options.dtype)]
    show(name, load, rows, differences, limit)
    found = [difference._asdict() for difference in differences]
    wrong = sum(not difference.gap < limit for difference in differences)
    return dict(load=name, rows=rows, differences=found, wrong=wrong)


def main(arguments: list[str]) -> int:
    options = parse_options(arguments)
    report = dict(
        options={name: str(value) for name, value in vars(options).items()},
        versions={name: version(name) for name in ("torch", "transformers")},
        began=time.time(),
        loads=[],
    )
    loads = {"on": [True], "off": [False], "both": [True, False]}[options.sharing]
    print(describe(options), flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(options.model or Path(name, "model"))
        if not options.model:
            write_model(folder, options)
        for sharing in loads:
            report["loads"].append(compare(folder, sharing, options))
            if options.json:  # after each: the next may fail
                options.json.seek(0)
                json.dump(report, options.json, indent=1)
                options.json.flush()
    return int(any(load["wrong"] for load in report["loads"]))


if __name__ == "__main__":
    run_main(main)
