"""The Triton kernels of the ops and their launchers: the fast path on a GPU."""
