"""How often `hici.eval.bootstrap.paired_difference` calls two equal methods different, by simulation.

    python benchmarks/intervals.py

The differences of R seeds on W windows are drawn as a seed's part + a window's part + the pair's own noise, all normal
with mean zero: there is no difference to find, and an interval of 95 % may miss zero in 5 % of the draws. The table has
the share that does, by the spread of the seeds in units of that of the windows, for the interval over windows alone and
for the verdict, which also asks the interval over windows and seeds.
"""

from __future__ import annotations

import argparse

import numpy as np

from compare_report import table
from hici.eval.bootstrap import paired_difference


def false_positives(
    runs: int, windows: int, spread: float, noise: float, *, draws: int, resamples: int, seed: int
) -> tuple[float, float]:
    """Shares of `draws` called different: by the interval over windows alone, and by the verdict."""
    generator = np.random.default_rng([seed, runs, windows])
    alone = verdict = 0
    for _ in range(draws):
        seeds_R1, windows_W = generator.normal(0, spread, (runs, 1)), generator.normal(0, 1, windows)
        difference_RW = seeds_R1 + windows_W + generator.normal(0, noise, (runs, windows))
        found = paired_difference(difference_RW, np.zeros((runs, windows)), resamples=resamples)
        assert found.interval is not None, "one window"
        alone += not found.interval[0] <= 0 <= found.interval[1]
        verdict += found.distinguishable
    return alone / draws, verdict / draws


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--runs", type=int, nargs="+", default=[2, 3, 5], help="seeds (default 2 3 5)")
    add("--windows", type=int, default=24, help="at least 2 (default 24)")
    add("--spreads", type=float, nargs="+", default=[0, 0.1, 0.3, 0.5, 1, 3], help="of the seeds (default 0 to 3)")
    add("--noise", type=float, default=0.3, help="spread of a pair's own noise (default 0.3)")
    add("--draws", type=int, default=10_000, help="default 10000")
    add("--resamples", type=int, default=1000, help="of each bootstrap (default 1000)")
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.windows < 2 or min(args.runs) < 2 or args.draws < 1:
        parser.error("--windows and --runs must be at least 2, --draws at least 1")
    rows = []
    for spread in args.spreads:
        found = [
            false_positives(runs, args.windows, spread, args.noise, draws=args.draws, resamples=args.resamples,
                            seed=args.seed)
            for runs in args.runs
        ]  # fmt: skip
        rows.append([f"{spread:g}", *(f"{100 * share:.1f}" for pair in found for share in pair)])
    head = [f"{runs} seeds: {what}" for runs in args.runs for what in ("windows alone, %", "verdict, %")]
    print(table(["spread of seeds / of windows", *head], rows))


if __name__ == "__main__":
    main()
