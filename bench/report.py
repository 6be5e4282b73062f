"""The tables and figures of the READMEs: measured by one command, written by another.

    python bench/report.py --measure lakes-64 lakes-256     # or all, without names
    python bench/report.py

The first runs experiments, each a command of the programs here, and writes one file of each,
bench/results/NAME.json: the command, what printed its figures (commit, machine, date), how long it
took, and all that it printed. What is there already, of the same command and the same code, is left
as it is. (`--again` measures it again.) Mooncake's conversation trace is not part of the project;
experiments that need it are told by `--trace FILE` where it is.

The second reads these files and writes each table of README.md and bench/README.md between its
two marks,

    <!-- table: NAME --> … <!-- /table -->

and, where Matplotlib is, the figures; also the table of options, which is that of --help. So no
table says what was not measured: a test compares them. Which records another version of the code
has measured is said, too.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import compare  # noqa: E402
import drawing  # noqa: E402
import real_ranks  # noqa: E402
import provenance  # noqa: E402
import run_cluster  # noqa: E402
from model import cut  # noqa: E402
from options import Parser, file_name, run_main  # noqa: E402
from results import commit  # noqa: E402

RESULTS = HERE / "results"
FIGURES = HERE / "figures"
PAGES = [HERE.parent / "README.md", HERE / "README.md"]
TRACE = "conversation_trace.jsonl"  # as commands call Mooncake's conversation trace

LOOGLE = "compare.py --json --workload loogle --capacity-tokens 400000"
ABLATIONS = "--policies tokenlake,read-alone,hash,unreplicated,ship,tokenlake:fcfs"
POLICIES = "--policies tokenlake,router,router:fcfs,pd:1x3,pd:3x1"
FIGURES_FILE = "figures.json"  # of a program that does not print its figures


def large_fleet(instances: int, policy: str) -> str:
    """15 requests/s for every 16 instances, with 100,000 tokens of cache each."""
    return (
        f"simulate.py --policy {policy} --instances {instances} --num-requests 10000 "
        f"--rate {instances * 15 // 16} --capacity-tokens {100_000 * instances} "
        f"--max-batch {128 * instances}"
    )


READS = "simulate.py --capacity-tokens 400000 --num-requests 400 --rate 6 --policy"
REPLAY = f"replay.py --json --trace {TRACE}"
# By name: what is run, without `python bench/`.
EXPERIMENTS = {
    "replay-hash-alone": f"{REPLAY} --instances 8 --placement hash --replicate-factor 0",
    "replay-hash": f"{REPLAY} --instances 8 --placement hash",
    "replay": f"{REPLAY} --instances 8",
    "replay-16": f"{REPLAY} --instances 16",
    "schedulers": f"simulate.py --table --json --trace {TRACE} --model llama-3.1-8b --tp 1 "
    "--num-requests 200 --capacity-tokens 1000000 --chunk-tokens 1024 --max-batch 128 --rate 4",
    "planning": "plan.py --table --json",
    "planning-unshared": "plan.py --instances 64 --requests 64 --segments 200 --json",
    "loogle": f"{LOOGLE} --num-requests 1000 --rate 4 --rates 1,2,3,4,5,6 "
    "--policies tokenlake,router,router:fcfs,pd:3x1,pd:1x3 --seeds 3",
    "loogle-200k": "compare.py --json --workload loogle --capacity-tokens 200000 "
    f"--num-requests 500 --rate 4 --rates 4 {POLICIES} --seeds 2",
    "hits": "compare.py --json --workload loogle --capacity-tokens 800000 "
    "--capacities 200000,400000 --num-requests 500 --rate 1 --rates 1 --seeds 1 "
    "--policies tokenlake,router,pd:1x3,pd:3x1",
    "scbench": "compare.py --json --workload scbench --capacity-tokens 1120000 "
    f"--num-requests 600 --rate 0.5 --rates 0.5 {POLICIES} --seeds 1",
    "toolagent": "compare.py --json --workload toolagent --capacity-tokens 400000 "
    f"--num-requests 1000 --rate 4 --rates 4 {POLICIES} --seeds 1",
    "mixed": "compare.py --json --workload mixed --capacity-tokens 1120000 "
    f"--num-requests 300 --rate 0.25 --rates 0.25 {POLICIES} --seeds 1",
    "sharegpt": "compare.py --json --workload sharegpt --capacity-tokens 400000 "
    f"--num-requests 2000 --rate 32 --rates 32 {POLICIES} --seeds 3",
    "conversation": f"compare.py --json --workload {TRACE} --model llama-3.1-8b --hardware h200 "
    "--tp 1 --instances 8 --num-requests 400 --capacity-tokens 6890000 "
    "--capacities 1720000,3440000,6890000 --rate 16 --rates 2,8 "
    "--policies tokenlake,router,pd:2x6,pd:6x2 --seeds 1",
    "elastic": f"{LOOGLE} --num-requests 300 --rate 4 --rates 0.5,1,2,3,4 --seeds 1 "
    "--policies pd:1x3,tokenlake:pd:1x3,pd:3x1,tokenlake:pd:3x1,tokenlake",
    "ablations": f"{LOOGLE} --num-requests 600 --rate 4 --rates 4 --seeds 1 {ABLATIONS}",
    "ablations-hot": "compare.py --json --workload toolagent --capacity-tokens 400000 "
    f"--num-requests 600 --rate 6 --rates 6 --seeds 1 {ABLATIONS}",
    "lakes-16": large_fleet(16, "tokenlake"),
    "lakes-64": large_fleet(64, "tokenlake"),
    "lakes-256": large_fleet(256, "tokenlake"),
    "lakes-256-8x32": large_fleet(256, "lakes:8x32"),
    "lakes-256-router": large_fleet(256, "router"),
    "lakes-1024-32x32": large_fleet(1024, "lakes:32x32"),
    "reads": f"{READS} tokenlake",
    "reads-router": f"{READS} router",
    "reads-alone": f"{READS} read-alone",
    "validation": "simulate.py --validate",
    "validation-4": "simulate.py --validate",
    "real": "compare.py --real --json --policies tokenlake,lakes:2x2,router,pd:1x3,pd:3x1",
    "peers": f"peers.py --json {FIGURES_FILE}",
    "demo": "run_cluster.py",
}
RANKS = {"real": 4, "validation-4": 4, "demo": 4}  # of the experiments that take several
TEXTS = ["demo"]  # experiments that print no JSON


# Measuring.


def program_of(name: str) -> Path:
    """The file that an experiment runs: of bench/, or beside it."""
    program, *_ = EXPERIMENTS[name].split()
    return next(file for file in (HERE / program, HERE.parent / program) if file.exists())


def command_of(name: str) -> str:
    """An experiment's command, as a reader would type it."""
    launch = "python"
    if name in RANKS:
        launch = f"torchrun --standalone --nproc-per-node={RANKS[name]}"
    _, *arguments = EXPERIMENTS[name].split(" ", 1)
    program = program_of(name).relative_to(HERE.parent).as_posix()
    return " ".join([launch, program, *arguments])


def measure(name: str, trace: str | None) -> dict:
    """An experiment's record, of which all but `result` says how it came about. Raises RuntimeError
    if the program fails."""
    launch = [sys.executable]
    if name in RANKS:
        launch += ["-m", "torch.distributed.run", "--standalone"]
        launch += [f"--nproc-per-node={RANKS[name]}"]
    _, *arguments = shlex.split(EXPERIMENTS[name])
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        if trace:
            os.symlink(os.path.abspath(trace), Path(folder, TRACE))
        done = subprocess.run(
            [*launch, program_of(name), *arguments],
            cwd=folder,
            capture_output=True,
            text=True,
        )
        file = Path(folder, FIGURES_FILE)
        figures = file.read_text() if file.exists() else done.stdout
    if done.returncode:
        last = (done.stderr.strip() or "it said nothing").splitlines()[-1]
        raise RuntimeError(f"{name}: exit status {done.returncode}: {last}")
    return dict(
        command=command_of(name),
        commit=commit(),
        code=digest_of_code(name),
        machine=provenance.machine(),
        date=time.strftime("%Y-%m-%d", time.gmtime()),
        seconds=round(time.perf_counter() - started),
        result=[figures] if name in TEXTS else parse(figures),
    )


def parse(text: str) -> list:
    """The JSON values that a program has given, one after another."""
    decoder = json.JSONDecoder()
    values = []
    text = text.strip()
    while text:
        value, end = decoder.raw_decode(text)
        values.append(value)
        text = text[end:].lstrip()
    return values


def digest_of_code(name: str) -> str:
    """Of the program that an experiment runs."""
    return provenance.digest_of_code(program_of(name))


def is_current(name: str, record: dict) -> bool:
    """Whether an experiment's record is of its command, and of this code."""
    return record["command"] == command_of(name) and record["code"] == digest_of_code(name)


def measure_all(names: list[str], trace: str | None, again: bool):
    """Writes the record of each; one that is cut short writes none."""
    records = read_records()
    for name in names:
        if name in records and is_current(name, records[name]) and not again:
            print(f"{name}: is there already; --again measures it again", flush=True)
            continue
        before = f", {records[name]['seconds']} s the last time" if name in records else ""
        print(f"{name}: is measured{before}", flush=True)
        record = measure(name, trace)
        RESULTS.mkdir(exist_ok=True)
        partial = RESULTS / f"{name}.partial"
        partial.write_text(json.dumps(record, indent=1) + "\n")
        partial.replace(RESULTS / f"{name}.json")
        print(f"{name}: {record['seconds']} s", flush=True)


def read_records() -> dict:
    """All records there are, by experiment. Raises ValueError for a file that is none."""
    records = {}
    for name in EXPERIMENTS:
        file = RESULTS / f"{name}.json"
        if file.exists():
            try:
                records[name] = json.loads(file.read_text())
            except ValueError as error:
                raise ValueError(f"{file.name}: not JSON ({error})") from None
    return records


# Tables. Each is made of records, in the order in which TABLES names them.


def markdown(head: list[str], rows: list[list]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def short(value: float | None, digits: int = 3) -> str:
    """A number with so many significant digits, and all that stand before its point."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - int(np.floor(np.log10(abs(value)))))
    return f"{value:,.{decimals}f}"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"


def tokens(number: int) -> str:
    """13,000 as 13k, 1,120,000 as 1.12M."""
    return f"{number / 1e6:.3g}M" if number >= 10**6 else f"{number / 1e3:.3g}k"


def option(record: dict, name: str) -> str:
    """What a record's command gives an option."""
    words = shlex.split(record["command"])
    return words[words.index(name) + 1]


def goodput(entry: dict | None) -> str:
    """P90 goodput of a policy's entry in a comparison; None: it was not compared."""
    if entry is None:
        return "–"
    rate = entry["p90_goodput"]
    rate = rate["mean"] if isinstance(rate, dict) else rate
    return "no limit" if rate > compare.NO_LIMIT else short(rate)


def at_rate(entry: dict, rate: float) -> dict:
    """The point of a policy's curve."""
    return next(point for point in entry["curve"] if point["rate"] == rate)


def options_table() -> str:
    """The options of run_cluster.py, as --help has them."""
    rows = []
    for group, options in run_cluster.OPTIONS.items():
        rows.append([f"*{group}*", ""])
        for name, type, metavar, _, help in options:
            value = f" {metavar}" if metavar else ""
            if type is run_cluster.SWITCH:
                name = f"{name}`, `--no-{name[2:]}"
            elif type is not run_cluster.FLAG and not metavar:
                value = f" {{{type.expected.removeprefix('one of ')}}}"
            rows.append([f"`{name}{value}`", help])
    profile = run_cluster.PROFILE
    rows.append([f"`--profile [{profile['metavar']}]`", profile["help"]])
    return markdown(["option of run_cluster.py", ""], rows)


def balance_table(*records: dict) -> str:
    """What holds a trace evenly: homes, and copies of heavy hitters."""
    rows = []
    for record in records:
        (result,) = record["result"]
        command = record["command"]
        homes = "by hash" if "--placement hash" in command else "striped"
        copies = "no" if "--replicate-factor 0" in command else "yes"
        hits = f"{100 * result['hit_rate']:.1f} %"
        load_cv = short(result["cache_load_cv"], 2)
        rows.append(
            [option(record, "--instances"), homes, copies, hits, load_cv, result["replicas_max"]]
        )
    head = "instances, homes, heavy hitters copied, hit rate, CV of cache reads, most replicas"
    return markdown(head.split(", "), rows)


def schedulers_table(record: dict) -> str:
    rows = []
    loads = (row for row in record["result"] if row["load"] != "demo")
    for (load, rate), group in groupby(loads, lambda row: (row["load"], row["rate"])):
        label = load.replace("_", " ")
        if rate:
            label += f", {rate:g} requests/s"
        for row in group:
            ttft = short(row["mean_ttft_ms"] / 1e3, 2)
            tbt = short(row["mean_tpot_ms"], 2)
            idle = percent(row["idle_fraction"])
            duration = f"{row['duration']:.1f}"
            rows.append([label, row["scheduler"], duration, ttft, tbt, idle])
            label = ""
    head = "load, scheduler, duration s, mean TTFT s, mean TPOT ms, idle"
    return markdown(head.split(", "), rows)


def planning_table(shared: dict, unshared: dict) -> str:
    rows = []
    cases = [(row, "everywhere") for row in shared["result"]]
    cases += [(row, "none") for row in unshared["result"]]
    for row, replicas in cases:
        sizes = [row["instances"], row["requests"], row["segments"]]
        median = short(row["plan_ms_median"], 2)
        with_digest = short(row["with_digest_ms_median"], 2)
        rows.append([*sizes, replicas, median, with_digest])
    head = "instances, requests per instance, segments per request, replicas of one segment, "
    head += "median ms, with the digest"
    return markdown(head.split(", "), rows)


def loogle_table(record: dict) -> str:
    (result,) = record["result"]
    rows = []
    for policy, entry in result["policies"].items():
        relaxed = at_rate(entry, 1)
        busy = at_rate(entry, 4)
        rows.append(
            [
                policy,
                goodput(entry),
                short(relaxed["normalised_ttft"]),
                short(busy["normalised_ttft"]),
                short(busy["mean_tpot_ms"], 2),
                f"{busy['cache_load_cv']:.2f}",
                percent(busy["hit_rate"]),
            ]
        )
    head = [
        "",
        "P90 goodput, requests/s",
        "TTFT at 1 request/s, ms per token",
        "at 4 requests/s: TTFT",
        "TPOT ms",
        "CV of cache reads",
        "hit rate",
    ]
    return markdown(head, rows)


def loads_table(*records: dict) -> str:
    names = "tokenlake router router:fcfs pd:1x3 pd:3x1".split()
    rows = []
    for record in records:
        (result,) = record["result"]
        config = result["config"]
        capacity = tokens(config["capacity_tokens"])
        seeds = "one seed" if config["seeds"] == 1 else f"{config['seeds']} seeds"
        label = f"{config['workload']}, {capacity} ({config['num_requests']:,}, {seeds})"
        rows.append([label, *(goodput(result["policies"].get(name)) for name in names)])
    return markdown(["", *names], rows)


def capacities_table(record: dict, cell: Callable = goodput) -> str:
    """A cell of a policy's entry for each capacity."""
    (result,) = record["result"]
    policies = result["policies"]
    rows = []
    for entries in zip(*(entry["capacities"] for entry in policies.values())):
        capacity = tokens(entries[0]["capacity_tokens"])
        rows.append([capacity, *map(cell, entries)])
    return markdown(["cache, tokens", *policies], rows)


def hits_table(record: dict) -> str:
    return capacities_table(record, lambda entry: percent(entry["hit_rate"]))


def elastic_table(record: dict) -> str:
    (result,) = record["result"]
    rows = []
    for policy, entry in result["policies"].items():
        ttft = short(at_rate(entry, 2)["normalised_ttft"])
        rows.append([policy, goodput(entry), ttft])
    head = ["", "P90 goodput, requests/s", "TTFT at 2 requests/s, ms per token"]
    return markdown(head, rows)


def ablations_table(*records: dict) -> str:
    columns = {
        "tokenlake": "as it is",
        "read-alone": "each reads for itself",
        "hash": "homes by hash",
        "unreplicated": "no replication",
        "ship": "always shipping",
        "tokenlake:fcfs": "first come, first served",
    }
    rows = []
    for record in records:
        (result,) = record["result"]
        goodputs = [goodput(result["policies"][policy]) for policy in columns]
        rows.append([result["config"]["workload"], *goodputs])
    return markdown(["", *columns.values()], rows)


def lakes_table(*records: dict) -> str:
    rows = []
    for record in records:
        (summary,) = record["result"]
        rows.append(
            [
                option(record, "--instances"),
                option(record, "--policy"),
                option(record, "--rate"),
                f"{100 * summary['slo_attainment']:.1f} %",
                short(summary["mean_ttft_ms"], 2),
                short(summary["mean_tpot_ms"], 2),
                percent(summary["hit_rate"]),
                f"{summary['cache_load_cv']:.2f}",
                short(summary["plan_ms_median"], 2),
                short(summary["sent_mib"], 2),
                percent(summary["idle_fraction"]),
            ]
        )
    head = "instances, policy, requests/s, keep the SLO, TTFT ms, TPOT ms, hits, CV, "
    head += "planning ms, MiB sent, idle"
    return markdown(head.split(", "), rows)


def reads_table(*records: dict) -> str:
    rows = []
    for record in records:
        (summary,) = record["result"]
        terabytes = short(summary["kv_bytes_read"] / 1e12)
        rows.append([option(record, "--policy"), terabytes, percent(summary["hit_rate"])])
    return markdown(["policy", "KV read, TB", "hit rate"], rows)


def validation_table(*records: dict) -> str:
    rows = []
    for record in records:
        (result,) = record["result"]
        ranks = re.search(r"nproc-per-node=(\d+)|$", record["command"])[1] or 1
        error = percent(result["median_error"])
        rows.append([ranks, f"{result['correlation']:.2f}", error])
    return markdown(["ranks", "correlation", "median error"], rows)


def demo_output(record: dict) -> str:
    (text,) = record["result"]
    return "\n".join(["```", text.rstrip("\n"), "```"])


def real_table(record: dict) -> str:
    rows = map(real_ranks.show_real, record["result"])
    return "\n".join(["```", real_ranks.REAL_HEADER, *rows, "```"])


def peers_table(record: dict) -> str:
    """Medians of all rounds; of loads that have other variants, too."""
    (result,) = record["result"]
    cells = {}
    for number, load in enumerate(result["loads"]):
        for row in load["rows"]:
            mine = cells.setdefault(row["label"], ["–"] * 3 * len(result["loads"]))
            columns = "seconds to_one_by_one to_best_peer".split()
            medians = [f"{np.median(row[column]):.2f}" for column in columns]
            mine[3 * number : 3 * number + 3] = medians
    rows = [[label, *row] for label, row in cells.items()]
    head = [""]
    for load in result["loads"]:
        head += [f"{load['load']}: seconds", "× one by one", "× best of theirs"]
    return markdown(head, rows)


class Table(NamedTuple):
    render: Callable  # of the records, to Markdown
    experiments: list[str]


# By the name that the marks in a page give.
TABLES = {
    "options": Table(options_table, []),
    "balance": Table(
        balance_table, ["replay-hash-alone", "replay-hash", "replay", "replay-16"]
    ),
    "schedulers": Table(schedulers_table, ["schedulers"]),
    "planning": Table(planning_table, ["planning", "planning-unshared"]),
    "loogle": Table(loogle_table, ["loogle"]),
    "loads": Table(
        loads_table, ["loogle-200k", "scbench", "toolagent", "mixed", "sharegpt"]
    ),
    "hits": Table(hits_table, ["hits"]),
    "conversation": Table(capacities_table, ["conversation"]),
    "elastic": Table(elastic_table, ["elastic"]),
    "ablations": Table(ablations_table, ["ablations", "ablations-hot"]),
    "lakes": Table(
        lakes_table, [name for name in EXPERIMENTS if name.startswith("lakes-")]
    ),
    "reads": Table(reads_table, ["reads", "reads-router", "reads-alone"]),
    "validation": Table(validation_table, ["validation", "validation-4"]),
    "demo": Table(demo_output, ["demo"]),
    "real": Table(real_table, ["real"]),
    "peers": Table(peers_table, ["peers"]),
}
MARKED = re.compile(r"<!-- table: (\S+) -->\n(.*?)<!-- /table -->", re.DOTALL)


def missing(names: list[str], records: dict) -> str | None:
    """What tables lack, and how it is made; None if nothing."""
    wanted = [experiment for name in names for experiment in TABLES[name].experiments]
    lacking = [experiment for experiment in wanted if experiment not in records]
    if not lacking:
        return None
    files = ", ".join(f"{name}.json" for name in lacking)
    makes = f"python bench/report.py --measure {' '.join(lacking)}"
    return f"bench/results has no {files}; `{makes}` makes what is missing"


def fill(page: Path, records: dict) -> str:
    """A page with its tables as the records give them. Raises ValueError if one is missing, or a
    mark is not as it should be."""
    text = page.read_text()
    names = [name for name, _ in MARKED.findall(text)]
    if not len(names) == text.count("<!-- table:") == text.count("<!-- /table -->"):
        said = "<!-- table: NAME --> and <!-- /table --> are expected, each on a line, in turn"
        raise ValueError(f"{page.name}: {said}")
    for name in names:
        if name not in TABLES:
            said = f"{', '.join(TABLES)} are there"
            raise ValueError(f"{page.name}: no table is called {name}; {said}")
    if said := missing(names, records):
        raise ValueError(said)

    def table(match):
        name = match[1]
        render, experiments = TABLES[name]
        rendered = render(*(records[experiment] for experiment in experiments))
        return f"<!-- table: {name} -->\n{rendered}\n<!-- /table -->"

    return MARKED.sub(table, text)


def write_tables(records: dict):
    """Of all pages; says which others could be there, and what is old. Raises ValueError as `fill`
    does, before anything is written."""
    filled = [fill(page, records) for page in PAGES]
    for page, text in zip(PAGES, filled):
        page.write_text(text)
    marked = {name for text in filled for name, _ in MARKED.findall(text)}
    unmarked = [name for name in TABLES if name not in marked]
    for name in unmarked:
        if not missing([name], records):
            print(f"no page has <!-- table: {name} --> to <!-- /table -->")
    if said := missing(unmarked, records):
        print(said)
    if old := [name for name in records if not is_current(name, records[name])]:
        print(f"of an earlier state of the code: {', '.join(old)}")


def draw_figures(records: dict):
    """Those of the comparison on loogle."""
    if "loogle" not in records:
        return
    try:
        drawing.draw(records["loogle"]["result"][0], FIGURES, compare.NO_LIMIT)
    except ModuleNotFoundError:
        print("no figures without Matplotlib (pip install matplotlib)", file=sys.stderr)


# The command line.


def check_measured(names: list[str], trace: str | None):
    """Raises ValueError for a name that is none, or a trace that is not there."""
    for name in names:
        if name not in EXPERIMENTS:
            known = cut(" ".join(EXPERIMENTS), 200)
            raise ValueError(f"--measure {cut(name, 20)}: there are {known}")
    traced = [name for name in names if TRACE in EXPERIMENTS[name]]
    if traced and not trace:
        said = f"{', '.join(traced)} need Mooncake's {TRACE}; where it is, is expected"
        raise ValueError(f"--trace: {said}")
    if trace:
        with open(trace, "rb"):
            pass


def main(arguments: list[str]) -> int:
    parser = Parser(description="Measure what the READMEs say, and write their tables.")
    add = parser.add_argument
    measured = "experiments to measure; without names: all"
    add("--measure", nargs="*", metavar="NAME", help=measured)
    add("--again", action="store_true", help="also what is there already")
    trace = "with --measure: Mooncake's conversation trace"
    add("--trace", type=file_name, metavar="FILE", help=trace)
    options = parser.parse_args(arguments)
    try:
        if options.measure is not None:
            names = options.measure or [*EXPERIMENTS]
            check_measured(names, options.trace)
            measure_all(names, options.trace, options.again)
        else:
            records = read_records()
            write_tables(records)
            draw_figures(records)
    except RuntimeError as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        raise  # see run_main
    except (OSError, ValueError) as error:
        parser.refuse(error)
    return 0


if __name__ == "__main__":
    run_main(main)
