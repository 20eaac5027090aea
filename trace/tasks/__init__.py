"""Embedded tasks: questions made on the spot, with answers, worked solutions and a rule that finds the first error.

A task decides its questions and its kinds of errors. It must not know how its questions are sampled, graded or
trained on, and it keeps no state: a data position is just an index.
"""
