"""Benchmarks, run by ``make bench``, or ``python -m benchmarks [--list] [--only NAME]``.

Every module in this folder is one benchmark, unless its name starts with an underscore. The first line of its
docstring says what it measures; its function ``run()`` measures and returns the table to print: a
``rich.table.Table`` or a plain string.
"""
