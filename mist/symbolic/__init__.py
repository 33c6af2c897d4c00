"""Symbolic room: a traced model and a runtime -> time and memory of any stage, as expressions.

`stage` builds them, `compile` prints them as programs (both with sympy), `program` runs them.
"""
