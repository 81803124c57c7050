"""Mutation testing of the core modules: `python -m tests.mutants` or `make mutants`.

A mutant is the module with one small fault: an inverted comparison, a limit off by one, a removed `raise`. A mutant
survives if the module's tests still pass; it then needs a test or a reason.

The usual tools are unsuitable: mutmut omits constants, class attributes and decorated functions, and thus limits and
properties; Cosmic Ray starts a process for each mutant, which takes seconds to import the dependencies of the tests.
This tool imports them once and forks for each mutant.
"""
