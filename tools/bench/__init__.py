"""Benchmarks: `python tools/bench NAME`. Each module here that does not begin with an underscore is one of them.

A benchmark module has a docstring (its first line is the help), `add_arguments(parser)` and `run(arguments) -> Result`.
"""
