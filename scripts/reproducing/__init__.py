"""Runs that anyone can repeat, a file for each part of scripts/reproduce.py.

steps.py: a step of a path: skipped when its output is there and whole, run, stopped
digits.py: the quickstart's path
published.py: the path of a recipe on the published data, with its forecast and the published scores
ledger.py: a line for each finished run
"""
