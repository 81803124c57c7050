"""Batch jobs over the tables: audit, maintenance, replay, scoring again, export; and the demo."""
