"""What runs beside the GPU: the worker, its host, the supervisor of tasks, and the data side.

Nothing here imports `flowfn`, and importing a module here costs little more than the standard library.
"""
