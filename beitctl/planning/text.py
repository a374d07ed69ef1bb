"""A plan for people: short aligned tables of at most 80 columns, units everywhere."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from beitctl.report import progress

WIDTH = 80
UNKNOWN = "unknown"


def text(plan: Mapping[str, Any]) -> str:
    """The whole plan."""
    return "\n".join(line.rstrip() for line in _lines(plan)) + "\n"


def _lines(plan: Mapping[str, Any]) -> Iterator[str]:
    card = plan["gpu"]
    yield f"{plan['recipe']} [{plan['table']}] on {plan['gpus']} x {card['title'] if card else 'unknown GPU'}"
    yield from _table("parameters", _parameters(plan))
    yield from _step(plan["step"])
    yield from _table("work of a step", _work(plan))
    yield from _table("memory of a GPU", _memory(plan["memory"]))
    if "exact" in plan:
        yield from _exact(plan["exact"], plan["memory"])
    yield from _table("time", _time(plan))
    yield from _table("disk", _disk(plan["disk"]))
    yield from _table("loader", _loader(plan["loader"]))
    yield from _table("network, one GPU in a step", _network(plan["network"]))
    yield from _data(plan["data"])
    yield from _listed("does not work", plan["problems"])
    yield from _listed("works, but", plan["warnings"])
    yield from _listed("one of these makes the memory fit", plan["fixes"])
    yield from _listed("assumptions", plan["assumptions"])


Rows = Sequence[tuple[str, str]]


def _table(title: str, rows: Rows) -> Iterator[str]:
    yield from ("", title)
    first = max(len(name) for name, _ in rows)
    numbers = [value.partition(" ")[0] for _, value in rows]
    second = max(len(number) for number in numbers)
    for (name, value), number in zip(rows, numbers, strict=True):
        yield f"  {name:<{first}}  {number:>{second}} {value.partition(' ')[2]}"


def _listed(title: str, texts: Sequence[str]) -> Iterator[str]:
    if texts:
        yield from ("", title)
    for each in texts:
        yield from textwrap.wrap(each, WIDTH, initial_indent="  - ", subsequent_indent="    ")


def _parameters(plan: Mapping[str, Any]) -> Rows:
    counts = plan["parameters"]
    shown = {name: count for name, count in counts.items() if count or name == "total"}
    if shown.get("trainable") == shown["total"]:
        shown.pop("trainable")
    return [(name.replace("_", " "), f"{count:,}") for name, count in shown.items()]


def _step(step: Mapping[str, Any]) -> Iterator[str]:
    """Samples, rows and predictions by objective."""
    keys = ("samples", "pictures", "rows", "predicted_patches", "predicted_tokens")
    heads = ("samples", "pictures", "rows", "pred. patches", "pred. tokens")
    named = {**step["objectives"], "total": step}
    first = min(20, max(len(name) for name in named))
    yield from ("", "a step over all GPUs")
    yield f"  {'':<{first}}" + "".join(f"{head:>{_wide(head)}}" for head in heads)
    for name, found in named.items():
        cells = (f"{found[key]:>{_wide(head)},}" for key, head in zip(keys, heads, strict=True))
        yield f"  {name[:first]:<{first}}" + "".join(cells)
    yield (
        f"  one GPU: {step['passes']:,} {'pass' if step['passes'] == 1 else 'passes'} of at most "
        f"{step['micro_samples']:,} samples; {step['steps']:,} steps"
    )


def _wide(head: str) -> int:
    return max(len(head), 9) + 2


def _work(plan: Mapping[str, Any]) -> Rows:
    flops = plan["flops"]
    names = ("patches", "projections", "experts", "attention", "heads", "forward", "training")
    titles = {"training": "forward + backward", "patches": "patch embedding", "experts": "expert FFNs"}
    amounts = {titles.get(name, name): flops[name] for name in names}
    amounts["with full recompute"] = flops["training"] + flops["recompute"]
    amounts["forward + backward, a GPU"] = flops["per_gpu"]
    size, unit = _unit(flops["training"])
    return [(name, f"{count / size:,.3f} {unit}") for name, count in amounts.items()]


def _memory(memory: Mapping[str, Any]) -> Rows:
    skipped = ("activations", "total", "judged_by", "shard", "copies", "limit", "fits")
    groups = f"{memory['copies']:,} {'copy' if memory['copies'] == 1 else 'copies'}"
    shared = f"{memory['shard']:,} {'GPU' if memory['shard'] == 1 else 'GPUs'}, {groups}"
    rows = [("states shared by", shared)]
    rows += [(k.replace("_", " "), gib(v)) for k, v in memory.items() if k not in skipped and v]
    rows += [(f"activations, {saved}", gib(size)) for saved, size in memory["activations"].items()]
    rows += [(f"total, {saved}", gib(size)) for saved, size in memory["total"].items()]
    if memory["limit"] is None:
        return [*rows, ("of", UNKNOWN)]
    spare = memory["limit"] - memory["total"][memory["judged_by"]]
    verdict = f"fits, {gib(spare)} to spare" if memory["fits"] else f"does not fit, {gib(-spare)} over"
    return [*rows, ("of", f"{gib(memory['limit'])}: {verdict} ({memory['judged_by']})")]


def _exact(exact: Mapping[str, Any], memory: Mapping[str, Any]) -> Iterator[str]:
    """The count next to the estimate of blocks that are not compiled."""
    title = "memory of a GPU, counted (uncompiled blocks, fake tensors; without the reserve)"
    if "problem" in exact:
        yield from _listed(title, [f"not counted: {exact['problem']}"])
        return
    kept = "recompute" if memory["judged_by"] == "recompute" else "eager"
    states, peak = exact["states"], exact["peak"]
    together = memory["total"][kept] - memory["reserve"]
    compared = {name: (size, memory[name]) for name, size in states.items()}
    rows = [(f"at the peak: {name}", gib(size)) for name, size in peak.items() if size and name not in states]
    compared["all at the peak"] = (exact["total"], together)
    rows += [(name, f"{gib(size)}; estimate {gib(other)}") for name, (size, other) in compared.items()]
    yield from _table(title, [(name.replace("_", " "), value) for name, value in rows])


def _time(plan: Mapping[str, Any]) -> Rows:
    time = plan["time"]
    if time["step_seconds"] is None:
        return [("a step", UNKNOWN), ("whole", UNKNOWN)]
    return [
        ("a step", f"{_seconds(time['step_seconds'])} at {time['mfu']:.0%} of nominal"),
        ("speed", f"{time['samples_per_second']:,.0f} samples/s"),
        ("whole", _seconds(86_400 * time["days"])),
        ("GPU time", f"{_seconds(86_400 * time['gpu_days'])} of one GPU"),
    ]


def _disk(disk: Mapping[str, Any]) -> Rows:
    rows = [
        ("one checkpoint", _gb(disk["checkpoint"])),
        ("all that are kept", f"{_gb(disk['checkpoints'])}, {_gb(disk['checkpoints_at_most'])} while saving"),
        ("weights at the end", _gb(disk["weights"])),
    ]
    store = disk["token_store"]
    if store is None:
        return rows
    each = f"{store['bytes_per_picture'] / 1e3:.1f} kB a picture, {store['views']} views"
    known = UNKNOWN if store["bytes"] is None else _gb(store["bytes"])
    return [*rows, ("token store", f"{known} ({each})")]


def _loader(loader: Mapping[str, Any]) -> Rows:
    rows = [("a step", f"{loader['pictures_per_step']:,} pictures")]
    if loader["pictures_per_second"] is None:
        return [*rows, ("needed", UNKNOWN)]
    return [
        *rows,
        ("needed", f"{loader['pictures_per_second']:,.0f} pictures/s"),
        ("needed, a GPU", f"{loader['pictures_per_second_per_gpu']:,.0f} pictures/s"),
        ("cores, a GPU", f"{loader['cores_per_gpu']:,.2f} at {loader['pictures_per_core']} pictures/s each"),
    ]


def _network(network: Mapping[str, Any]) -> Rows:
    rate = network["gigabytes_per_second"]
    return [
        ("weights", _gb(network["all_gather"])),
        ("gradients, in the group", _gb(network["reduce_scatter"])),
        ("gradients, other groups", _gb(network["all_reduce"])),
        ("together", _gb(network["total"]) + ("" if rate is None else f", {_gb(1e9 * rate)}/s to hide it")),
    ]


def _data(data: Mapping[str, Any]) -> Iterator[str]:
    yield from ("", "data")
    first = min(20, max(len(name) for name in data))
    for name, found in data.items():
        held = found["examples"]
        there = "source not there" if held is None else f"{held:,} examples, {found['epochs']:,.1f} epochs"
        yield f"  {name[:first]:<{first}}  {found['samples_seen']:>15,} samples seen; {there}"


def _unit(count: float) -> tuple[float, str]:
    """The unit in which an amount of work has one to three digits before the point."""
    size, *units = 1.0, "FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"
    for unit in units[:-1]:
        if count < 1000 * size:
            return size, unit
        size *= 1000
    return size, units[-1]


def gib(size: float) -> str:
    """Bytes in the largest binary unit of which there is a tenth."""
    return _bytes(size, 1024, ("KiB", "MiB", "GiB"))


def _gb(size: float) -> str:
    """Bytes in the largest decimal unit of which there is a tenth."""
    return _bytes(size, 1000, ("kB", "MB", "GB", "TB"))


def _bytes(size: float, step: int, units: Sequence[str]) -> str:
    if not size:
        return "0 B"
    amount, unit = size / step, units[0]
    for larger in units[1:]:
        if amount < 0.1 * step:
            break
        amount, unit = amount / step, larger
    return f"{amount:,.2f} {unit}"


def _seconds(seconds: float) -> str:
    """A time from microseconds to days."""
    if seconds >= 60:
        return f"{seconds / 86_400:,.2f} days" if seconds >= 8640 else progress.duration(seconds)
    size, unit = next((one for one in ((1.0, "s"), (1e-3, "ms")) if seconds >= one[0]), (1e-6, "µs"))
    return f"{progress.number(seconds / size)} {unit}"
