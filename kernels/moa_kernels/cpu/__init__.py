"""Span attention on CPUs: a C++ library without dependencies, called through its plain C interface.

`source/` holds the library, `build` finds or compiles it, `library` loads it, `calls` hands tensors over, and `ops` are
the operations of `moa_kernels` by it.
"""
