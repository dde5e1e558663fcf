"""The research bench: how fast each op of each backend is here, and how near the machine's own limits that is.

`workloads` say what is run and what it cannot do without, `roofline` measures the machine, `measure` takes the times,
`report` and `plot` write them down, `command` is the command line.
"""
