"""Figures of a comparison: latency over rate, cache reads over time, hits over capacity.

They have no background, and colours of a middle tone: a page may be light or dark. Matplotlib is
imported where it is used; it is not required.
"""

from pathlib import Path

import numpy as np

# A line each: colours of a middle tone, on white as on black, and a marker and a dash for who tells
# no colours apart.
COLOURS = "#2e86d1 #d5600f #1a9e74 #b565a7 #a8861d #7f7f7f".split()
MARKERS = "osDv^P"
DASHES = "-", "--", "-.", ":"
INK = "#787d85"  # of text and axes
MOST_LINES = 8  # that a legend names


def pyplot():
    """Matplotlib, which is not required, to draw into files. There is no background, so that a page
    may have any."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    inked = "text.color axes.labelcolor axes.edgecolor xtick.color ytick.color grid.color"
    plt.rcParams.update(
        {
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.3,
            "figure.constrained_layout.use": True,
            "figure.titlesize": "medium",
            "axes.titlesize": "medium",
            "legend.frameon": False,
            "savefig.transparent": True,
            "svg.hashsalt": "tokenlake",  # the same figure is the same file
            **dict.fromkeys(inked.split(), INK),
        }
    )
    return plt


def draw(result: dict, folder: Path, no_limit: float):
    """The figures, after Figures 9 to 12 of the paper. no_limit: a goodput over that is none that
    was found."""
    plt = pyplot()
    config = result["config"]
    policies = result["policies"]
    workload = Path(config["workload"]).stem.replace("$", r"\$")  # for formulas
    setting = f"{workload}, {config['num_requests']:,} requests, {name_fleet(config)}"
    title = f"{setting}, {config['capacity_tokens']:,} tokens of cache"
    seeds = "one seed" if config["seeds"] == 1 else f"mean of {config['seeds']} seeds"
    save(draw_latency(plt, policies), f"{title}; {seeds}", folder / "latency.svg")
    curve = next(iter(policies.values()))["curve"]
    shown = f"lines: seed {config['seed']}; CV: {seeds}"
    at_rate = f"{title}\nat {curve[len(curve) // 2]['rate']:g} requests/s; {shown}"
    save(draw_balance(plt, policies), at_rate, folder / "balance.svg")
    if any("capacities" in entry for entry in policies.values()):
        figure = draw_capacity(plt, policies, no_limit)
        save(figure, f"{setting}; {seeds}", folder / "capacity.svg")


def save(figure, title: str, path: Path):
    figure.suptitle(title)
    figure.savefig(path, metadata={"Date": None})


def draw_latency(plt, policies: dict):
    """Attainment and latency over rate."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.9))
    attainment, ttft, tbt = axes
    for axis, key in zip(axes, ("slo_attainment", "normalised_ttft", "mean_tpot_ms")):
        plot_curves(axis, policies, "curve", "rate", key)
        axis.set_xlabel("requests/s")
    attainment.set_ylabel("share of requests that keep the SLO")
    attainment.axhline(0.9, color=INK, linestyle=(0, (1, 3)))
    along_axis = attainment.get_yaxis_transform()
    attainment.text(1, 0.89, "goal: 0.9", transform=along_axis, ha="right", va="top")
    attainment.set_ylim(0, 1.03)
    ttft.set_ylabel("TTFT, ms per input token")
    ttft.set_yscale("log")
    tbt.set_ylabel("time between tokens, ms")
    add_legend(figure, attainment)
    return figure


def add_legend(figure, axis, title: str | None = None):
    """Below all panels, of the lines in one of them."""
    handles, labels = axis.get_legend_handles_labels()
    place = "outside lower center"
    figure.legend(handles, labels, loc=place, ncols=MOST_LINES, title=title)


def draw_balance(plt, policies: dict):
    """Cache reads per instance over time."""
    columns = min(3, len(policies))
    rows = -(-len(policies) // columns)
    figsize = (4 * columns, 1.1 + 2.5 * rows)
    figure, axes = plt.subplots(
        rows, columns, squeeze=False, sharey=True, figsize=figsize
    )
    for axis in axes.ravel()[len(policies) :]:
        axis.remove()
    for axis, (policy, entry) in zip(axes.ravel(), policies.items()):
        plot_reads(axis, np.array(entry["reads"]).T / 1e6)
        middle = entry["curve"][len(entry["curve"]) // 2]
        axis.set_title(f"{policy}: CV {cell(middle['cache_load_cv'], '.2f')}")
        axis.set_xlabel("seconds")
    for first in axes[:, 0]:
        first.set_ylabel("million tokens of cache\nread in 10 s")
    if len(axes[0][0].lines) <= MOST_LINES:
        of_pd = " (of pd:PxD the first P compute prompts, the others decode)"
        named = of_pd if any("pd:" in policy for policy in policies) else ""
        add_legend(figure, axes[0][0], f"instances{named}")
    return figure


def plot_reads(axis, reads: np.ndarray):
    """A line per instance. reads: [instances, windows of 10 s]"""
    for instance, values in enumerate(reads):
        axis.plot(
            np.arange(len(values)) * 10,
            values,
            color=COLOURS[instance % len(COLOURS)],
            linestyle=DASHES[instance % len(DASHES)],
            linewidth=1.4,
            label=str(instance),
        )


def draw_capacity(plt, policies: dict, no_limit: float):
    """Hits and goodput over capacity."""
    figure, axes = plt.subplots(1, 2, figsize=(8.5, 3.9))
    hits, goodputs = axes
    found = highest_found(policies, no_limit)
    level = 1.2 * found or 1.0  # of what is unlimited
    lowered = lower(policies, level)
    for axis, key in zip(axes, ("hit_rate", "p90_goodput")):
        plot_curves(axis, lowered, "capacities", "capacity_tokens", key, x_unit=1e3)
        axis.set(xlabel="cache, thousand tokens", ylim=(0, None))
    hits.set_ylabel("hit rate")
    goodputs.set_ylabel("P90 goodput, requests/s")
    if lowered != policies:
        name_level(goodputs, found, level)
    add_legend(figure, hits)
    return figure


def highest_found(policies: dict, no_limit: float) -> float:
    """Of all goodputs, the highest that is one."""
    points = (point for entry in policies.values() for point in entry["capacities"])
    goodputs = (point["p90_goodput"] for point in points)
    return max((goodput for goodput in goodputs if goodput <= no_limit), default=0.0)


def lower(policies: dict, level: float) -> dict:
    """The policies, with goodputs that are `level` at most. Beside one that is unlimited, which is
    thousands, others would be a line at 0."""

    def lowered(point):
        return {**point, "p90_goodput": min(point["p90_goodput"], level)}

    return {
        policy: {**entry, "capacities": [*map(lowered, entry["capacities"])]}
        for policy, entry in policies.items()
    }


def name_level(axis, highest: float, level: float):
    """What is unlimited stands on a dotted line; numbers end at the highest one."""
    axis.set_ylim(0, 1.05 * level)
    axis.axhline(level, color=INK, linestyle=(0, (1, 3)))
    ticks = [tick for tick in axis.get_yticks() if tick <= highest]
    axis.set_yticks([*ticks, level], [*(f"{tick:g}" for tick in ticks), "unlimited"])


def plot_curves(axis, policies: dict, curve: str, x: str, y: str, x_unit: float = 1):
    """A line per policy; dotted, with hollow markers, in its colour what serves in order of
    arrival."""
    families = []
    for policy, entry in policies.items():
        family = policy.removesuffix(":fcfs")
        if family not in families:
            families.append(family)
        number = families.index(family)
        points = [p for p in entry[curve] if p[y] is not None]
        axis.plot(
            [p[x] / x_unit for p in points],
            [p[y] for p in points],
            color=COLOURS[number % len(COLOURS)],
            marker=MARKERS[number % len(MARKERS)],
            markersize=5,
            fillstyle="full" if policy == family else "none",
            linestyle="-" if policy == family else ":",
            label=policy,
        )


def name_fleet(config: dict) -> str:
    hardware = config["hardware"].upper()
    return f"{config['instances']} instances of {config['tp']} {hardware}, {config['model']}"


def cell(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


if __name__ == "__main__":
    print(__doc__)
