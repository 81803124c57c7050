"""Importing this module registers every command; the commands import what they need only when they run."""
