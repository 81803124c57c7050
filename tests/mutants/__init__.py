"""Mutation testing of the modules that everything rests on: `python -m tests.mutants`, or `make mutants`.

A mutant is the module with one small fault: a comparison turned round, a limit off by one, a `raise` removed. If the
module's tests still pass, nothing would notice that fault: the mutant survived, and needs a test or a reason.

The usual tools do not fit. mutmut leaves out constants, class attributes and decorated functions, so limits and
properties; Cosmic Ray starts a process for each mutant, which here takes seconds to import what the tests need. This
one imports that once and forks for each mutant.
"""
