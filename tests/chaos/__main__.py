"""`python -m tests.chaos --seconds 600`: a long chaos run; exit code 1 if the books do not balance."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests.chaos.run import Chaos, default_seed


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=None, help="of an earlier run, to have the same troubles again")
    parser.add_argument("--folder", type=Path, default=None, help="where logs and journals stay; default: nowhere")
    given = parser.parse_args()
    seed = default_seed() if given.seed is None else given.seed
    print(f"seed {seed}", flush=True)
    if given.folder is not None:
        given.folder.mkdir(parents=True, exist_ok=True)
        return 0 if Chaos(seed, given.seconds, given.folder).run() else 1
    with tempfile.TemporaryDirectory() as folder:
        return 0 if Chaos(seed, given.seconds, Path(folder)).run() else 1


if __name__ == "__main__":
    sys.exit(main())
