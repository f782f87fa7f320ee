"""`kvloom bench`: what the library costs, beside what a user of torch and transformers would run instead.

A file that is named as a command (kernels, decode, prefill, memory) measures rows and makes them a table. Contenders
always take turns in one process (`timing.alternate`); memory alone needs a process each.
"""
