"""The C++ kernels and their launchers: each file is the fast path, on a CPU, of the op whose name it has.

A launcher checks nothing: it is called by the op's public function, for tensors that the op's choice of backend allows.
"""
