"""Experiments at CPU size: what training two sections costs and gives, and which recipe gives most.

    python -m bench.experiments            train and measure all that is not done; continues
    python -m bench.experiments --list     the command of every run

Results: `bench/results/experiments/`, shown by `docs/results.md`.
"""
