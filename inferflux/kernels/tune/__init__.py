"""`inferflux kernels tune`: the sizes of the Triton kernels, measured on the GPU at hand.

`knobs` say what is tried and on which workloads, `trial` checks, times and chooses, `child` does that in a process of
its own, `apart` watches such processes, `report` writes down what they told, `command` is the command line.
"""
