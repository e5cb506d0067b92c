"""A plan as text: what fits and why, where memory and time go, a row per tier. Strings only.

Owns: `render` (one experiment's plans), `render_all` (all hardware), and the published figures that stand beside a plan.

Does not own: what is planned (`search.py`). Prints nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from train.plan import constants
from train.plan.search import Change, Plan, Row
from train.plan.timing import MFU_FORMULA

WIDTH = 44  # of a bar
BATCH = "micro x accum x ranks = batch"
LETTERS = "▓▒░█▚▞◆◇●○"


def render(plans: Sequence[Plan], changes: Sequence[Change] = (), *, others: int = 5) -> str:
    """The first plan in full, then the next `others` in a line each; where nothing fits, what would."""
    best = plans[0]
    lines = [_head(best), "", *_memory(best), "", *_time(best)]
    if not best.fits:
        lines += ["", f"Does not fit: {best.reason}."]
        lines += _changes(changes)
    fitting = [p for p in plans[1:] if p.fits][:others]
    if fitting:
        rows = [_layout_cells(p) for p in [best, *fitting]]
        lines += ["", "Layouts, by the time of the whole run:", *_table([_LAYOUT, *rows])]
    if best.fits:
        lines += ["", "To name it: " + " ".join(best.overrides())]
    if best.assumed:
        lines += ["Assumed, until data is prepared: " + "; ".join(best.assumed) + "."]
    return "\n".join(lines)


def render_all(experiment: str, rows: Sequence[Row]) -> str:
    """A line per tier: fits or not, how it would run, what it costs, and what changed from the line above."""
    table = [["hardware", "fits", "layout", BATCH, "GiB of", "tokens/s", "MFU", "days", "USD", "changed"]]
    before: Plan | None = None
    for row in rows:
        shown = row.plan if row.change is None else row.change.plan
        cells = _layout_cells(shown)
        change = " ".join(row.change.overrides) if row.change is not None else ""
        differs = change or ("" if before is None else _changed(before, shown))
        if not row.plan.fits:
            differs = f"with {change}" if change else "nothing tried fits: " + row.plan.reason
        held = f"{shown.peak_memory_gib:.1f} of {shown.limit_gib:.0f}"
        fits, days, usd = "yes" if row.plan.fits else "no", _days(shown.hours), _money(shown.usd)
        table.append([row.hardware, fits, cells[0], cells[1], held, cells[4], cells[5], days, usd, differs])
        before = shown
    lines = [
        f"{experiment}: the same experiment on every tier; no line changes what is learned unless it says so.",
        "",
        *_table(table),
    ]
    kinds = dict.fromkeys(
        name for row in rows for name in sorted(row.plan.memory_gib, key=lambda n: -row.plan.memory_gib[n])
    )
    by_kind = [
        [kind, *(f"{row.plan.memory_gib[kind]:.1f}" if kind in row.plan.memory_gib else "-" for row in rows)]
        for kind in kinds
    ]
    lines += ["", "GiB of a device at its peak, by kind:", *_table([["", *(row.hardware for row in rows)], *by_kind])]
    lines += _published(experiment, rows)
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------------------------


def _head(p: Plan) -> str:
    trained = "" if p.trainable == p.parameters else f", {_count(p.trainable)} of them trained"
    return (
        f"{'Fits' if p.fits else 'Does not fit'} {p.hardware} ({p.ranks} {'device' if p.ranks == 1 else 'devices'}, "
        f"{p.limit_gib:.1f} GiB each): {_count(p.parameters)} parameters{trained}, {p.precision}."
    )


def _memory(p: Plan) -> list[str]:
    names = sorted(p.memory_gib, key=lambda name: -p.memory_gib[name])
    bar, scale = "", WIDTH / max(p.limit_gib, p.peak_memory_gib)
    for letter, name in zip(LETTERS * 2, names):
        bar += letter * round(p.memory_gib[name] * scale)
    lines = [
        f"Memory of a device at its peak ({p.moment}): {p.peak_memory_gib:.2f} of {p.limit_gib:.1f} GiB",
        f"  [{bar[:WIDTH]:<{WIDTH}}]",
    ]
    lines += [f"  {letter} {name:<32} {p.memory_gib[name]:9.2f} GiB" for letter, name in zip(LETTERS * 2, names)]
    if p.host_gib:
        held = ", ".join(f"{name} {value:.0f}" for name, value in p.host_gib.items())
        lines.append(f"  host of a node: {sum(p.host_gib.values()):.0f} of {p.host_limit_gib:.0f} GiB ({held})")
    return lines


def _time(p: Plan) -> list[str]:
    rate = f"{p.tokens_per_s:,.0f} tokens/s" if p.tokens_per_s is not None else f"{p.samples_per_s:,.1f} samples/s"
    parts = sorted(p.step_parts_s.items(), key=lambda item: -item[1])
    lines = [f"Step: {_seconds(p.step_s)}, {rate}, MFU {p.mfu:.0%}"]
    lines += [f"  {name:<34} {value / p.step_s:6.0%}" for name, value in parts if value / p.step_s >= 0.005]
    if p.hours is not None and p.device_hours is not None and p.kwh is not None:
        cost = "" if p.usd is None else f", {_money(p.usd)}"
        lines.append(
            f"Run: {p.steps:,} steps, {_hours(p.hours)}, {p.device_hours:,.1f} device-hours, {p.kwh:,.1f} kWh{cost}"
        )
    lines.append(f"MFU: {MFU_FORMULA}.")
    return lines


def _changes(changes: Sequence[Change]) -> list[str]:
    if not changes:
        return ["Nothing that was tried makes it fit: rows, adapters, the other tiers, more nodes."]
    lines = ["What would fit, the cheapest first:"]
    for change in changes:
        what = " (changes what is learned)" if change.learns else ""
        time = "" if change.plan.hours is None else f", {_hours(change.plan.hours)}"
        lines.append(
            f"  {' '.join(change.overrides):<40} {change.plan.strategy}, {change.plan.peak_memory_gib:.1f} GiB{time}, "
            f"{_money(change.plan.usd)}{what}"
        )
    return lines


def _published(experiment: str, rows: Sequence[Row]) -> list[str]:
    known = constants.PUBLISHED.get(experiment)
    if known is None:
        return []
    name, hours, note = known
    widest = rows[-1].plan
    lines = ["", f"{name}, published: {hours:,} GPU-hours on A100-80GB ({note})."]
    if widest.device_hours is not None:
        off = widest.device_hours / hours - 1
        lines.append(
            f"Planned on {rows[-1].hardware}: {widest.device_hours:,.0f} GPU-hours ({off:+.0%}), {_money(widest.usd)}."
        )
    total, quoted = constants.LLAMA2_HOURS, constants.LLAMA2_QUOTED_USD
    price = widest.usd / widest.device_hours if widest.usd and widest.device_hours else None
    if price is not None:
        lines.append(
            f"The often quoted ${quoted / 1e6:.0f}m for Llama 2: its four models took {total:,} GPU-hours, "
            f"${total * price / 1e6:.1f}m at ${price:.2f} an hour; ${quoted / 1e6:.0f}m would be ${quoted / total:.2f} an hour."
        )
    return lines


_LAYOUT = ["layout", BATCH, "GiB", "step", "tokens/s", "MFU", "run", "USD"]


def _layout_cells(p: Plan) -> list[str]:
    levers = [p.strategy]
    if p.offload != "none":
        levers.append(f"{p.offload} offload" + (" of weights too" if p.offload_parameters else ""))
    if p.activation_checkpointing:
        levers.append(
            "checkpointing" if p.activation_checkpointing == 1 else f"checkpointing 1/{p.activation_checkpointing}"
        )
    if p.chunked_loss:
        levers.append("chunked loss")
    if p.compile:
        levers.append("compiled")
    covered = p.micro_batch_size * p.gradient_accumulation_steps * p.ranks
    batch = f"{p.micro_batch_size} x {p.gradient_accumulation_steps} x {p.ranks} = {p.global_batch_size}"
    batch += "" if covered == p.global_batch_size else f" (+{covered - p.global_batch_size} empty)"
    rate = f"{p.tokens_per_s:,.0f}" if p.tokens_per_s is not None else f"{p.samples_per_s:,.0f}/s"
    hours = _hours(p.hours) if p.hours is not None else "?"
    layout, held = " + ".join(levers), f"{p.peak_memory_gib:.1f}"
    return [layout, batch, held, _seconds(p.step_s), rate, f"{p.mfu:.0%}", hours, _money(p.usd)]


def _changed(before: Plan, now: Plan) -> str:
    """What differs between two layouts, none of which changes the math."""
    levers = {"ranks": "ranks", "strategy": "strategy", "micro-batch": "micro_batch_size", "offload": "offload",
              "checkpointing": "activation_checkpointing", "chunked loss": "chunked_loss", "compiled": "compile",
              "precision": "precision"}  # fmt: skip
    pairs = ((name, getattr(before, key), getattr(now, key)) for name, key in levers.items())
    return ", ".join(f"{name} {a} -> {b}" for name, a, b in pairs if a != b)


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def _count(n: float) -> str:
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= limit:
            return f"{n / limit:.3g}{unit}"
    return str(int(n))


def _seconds(s: float) -> str:
    return f"{s * 1e3:.0f} ms" if s < 1 else f"{s:.2f} s" if s < 100 else f"{s:,.0f} s"


def _hours(hours: float) -> str:
    if hours < 1 / 60:
        return f"{hours * 3600:.0f} s"
    return f"{hours * 60:.0f} min" if hours < 2 else f"{hours:.1f} h" if hours < 48 else f"{hours / 24:,.1f} days"


def _days(hours: float | None) -> str:
    return "?" if hours is None else f"{hours / 24:,.1f}" if hours >= 2.4 else f"{hours / 24:.3f}"


def _money(usd: float | None) -> str:
    return "-" if usd is None else f"${usd:,.2f}" if usd < 100 else f"${usd:,.0f}"
