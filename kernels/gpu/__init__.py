"""Triton kernels: attention over boxes of the grid (`boxes`) and over block lists (`lists`), forward and backward.

Imported only when triton is there and asked for. `common` is what the two share. The kernels were written and are
tested on machines without a GPU: every shipped configuration is compiled ahead of time for Hopper, and the kernels run
in Triton's interpreter against the float64 reference. Nothing here has been timed, so no speed is claimed anywhere:
configurations were chosen by what the compiler reports (registers, spills, shared memory) and by counting the tiles
they visit.
"""
