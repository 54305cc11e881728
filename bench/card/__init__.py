"""The parts of bench/gpu.py: what runs on a card, each stage in a process of its own, and what is made of the rows.

stages       what there is to run and in which order; a stage is a list of cases
worker       the process that runs a stage's cases and hands its rows over
record       the rows, kept in a file as they come
process      other programs, and how they are stopped
clock        how a call is timed on a card: captured, rotated, alternating
correctness  the build, the tests on the card, compute-sanitizer
sanitized    what compute-sanitizer watches
ceilings  layers  conversions  packing  solver  model    the stages that time
targets      what is wanted of the card, and whether it was measured
report  figures   the rows as text and as drawings
"""
