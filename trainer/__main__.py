"""`accelerate launch -m qatapult.trainer RECIPE …` is `qatapult train RECIPE …` on every process."""

from __future__ import annotations

import sys

from qatapult.trainer.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    main()
