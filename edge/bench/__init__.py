"""Measuring speed and memory, of this runtime and of stock llama.cpp on the same file.

cases      what is measured: one case is one line of the table
cgroup     memory cgroups: a cap the kernel keeps, and its own peak figure
page_cache pages of the model file left in memory, and how to drop them
worker     one case in a process of its own: ours (engine_worker) or stock (llamacpp_worker)
session    runs workers, interleaves the two engines, collects rows
results    samples to medians, pairs to ratios, rows to JSON and CSV
"""
