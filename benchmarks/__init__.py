"""Benchmarks: each script checks the answer and the kernel that ran, then times in turns with float; `make bench`."""
