"""The C++ kernels: FAMILY/OP.cpp is the fast path, on a CPU, of the op in leanstep/kernels/FAMILY/OP.py.

Kernels and their launchers check nothing. The op's public function checks its arguments and chooses the backend first.
"""
