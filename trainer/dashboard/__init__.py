"""A live page over a folder of runs: `qatapult dashboard`. Read-only."""
