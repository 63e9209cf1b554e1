"""Stand-ins for packages of kernels, with their functions' names and parameters: they compute by torch on a CPU.

Each notes its calls in `CALLS`. Tests put them on the path of a process of their own, under the packages' names.
"""
