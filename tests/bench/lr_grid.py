"""What `tlx lr-find` suggests beside what a grid of trainings gives.

``python tests/bench/lr_grid.py CONFIG PHASE [KEY=VALUE ...] [--rates 1e-4,1e-3] [--seeds 3]``

Each rate is trained to the end of the plan with each seed, the other phases as configured. Printed are the metric that
chooses weights, at its best, by rate; and the suggestions of each rule over the same seeds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from tlx.plan.config import load
from tlx.train.command import train
from tlx.train.lr_curve import RULES
from tlx.train.lr_find import LrFindOptions, lr_find

RATES = "1e-4,3e-4,1e-3,3e-3,1e-2,3e-2,1e-1"
QUIET = ("track.report=false", "checkpoint.keep.last=1")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("config", type=Path)
    parser.add_argument("phase")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--rates", default=RATES)
    parser.add_argument("--seeds", type=int, default=3)
    wanted = parser.parse_args()
    own = [*wanted.overrides, *QUIET]
    (found,) = lr_find(load(wanted.config, own), LrFindOptions(phase=wanted.phase, seeds=wanted.seeds))
    for rule in RULES:
        suggestion = found.suggestion(rule)
        print(f"{rule}: {suggestion.rate:.2g} ({', '.join(f'{rate:.1e}' for rate in suggestion.known)})", flush=True)
    lines = [f"| lr of {wanted.phase} | mean | " + " | ".join(f"seed {n}" for n in range(wanted.seeds)) + " |"]
    lines.append("|---" * (wanted.seeds + 2) + "|")
    for rate in wanted.rates.split(","):
        values = []
        for seed in range(wanted.seeds):
            with tempfile.TemporaryDirectory() as place:
                said = [*own, f"phases.{wanted.phase}.lr={rate}", f"seed={seed}", f"run={place}/run"]
                values.append(train(wanted.config, said)["best"]["value"])
        cells = " | ".join(f"{value:.1%}" for value in values)
        lines.append(f"| {rate} | {statistics.mean(values):.1%} | {cells} |")
        print(lines[-1], flush=True)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
