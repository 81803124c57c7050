"""Benchmarks of imagestream against peers, run alternately on the same machine.

Each module answers one question; `python -m benchmarks` runs them and prints a table of ratios.
"""
