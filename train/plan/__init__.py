"""What a run will need, before it runs: will it fit, how should it be laid out, how long, how much.

`plan(cfg, info)` is the layout to run, `search` all of them, `changes` what would make an experiment fit, `all_hardware` a
row per tier; `render` and `render_all` are their text. `info` is `Prepared.info`, where data is prepared already.

The parts: `trace.py` runs a step of the real model under fake tensors; `shapes.py` is what it leaves; `subject.py` traces an
experiment and keeps the trace; `memory.py` and `timing.py` are arithmetic on it; `machines.py` and `constants.py` are the
hardware; `search.py` decides. Nothing here imports torch until a trace has to be taken.
"""

from __future__ import annotations

from train.plan.search import Change, Plan, Row, all_hardware, changes, plan, search
from train.plan.show import render, render_all

__all__ = ["Change", "Plan", "Row", "all_hardware", "changes", "plan", "render", "render_all", "search"]
