"""Five ways of tuning on two GLUE tasks and 24 languages, a rate for each, three seeds: the small size of glue-deberta.

    python benchmarks/small_glue.py --data FOLDER [--work FOLDER] [--jobs N]

The same runs as `spectune reproduce glue-deberta --small --data FOLDER`; goes on when started again. FOLDER
holds sst2_train, sst2_dev, stsb_train, stsb_dev and stsb_test, each .jsonl.gz, with GLUE's columns. Writes
benchmarks/results/small_glue.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from recorded_sweep import record_sweep

from spectune.papers import load_experiment, prepare

RESULTS = Path(__file__).parent / "results" / "small_glue.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("small_glue"))
    parser.add_argument("--jobs", type=int, default=2)
    asked = parser.parse_args()
    ready = prepare(load_experiment("glue-deberta"), asked.work, small=True, data=asked.data)
    record_sweep(ready.sweep, asked.work, RESULTS, ready.published, asked.jobs)


if __name__ == "__main__":
    main()
