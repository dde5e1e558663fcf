"""`inferflux kernels tune`: an autotuner for the sizes of the Triton kernels.

`knobs` lists the candidates and their workloads; `trial` checks, times and chooses; `worker` does that in a process of
its own, and `workers` supervises these; `report` formats the result; `command` is the command line.
"""
