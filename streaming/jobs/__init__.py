"""Batch jobs over the tables: audit, maintenance, replay, rescoring, erasure, export, capacity planning, and the demo.

Each job is a function that a command of the same name calls; `rewrite.py` replaces files of a table for several of
them.
"""
