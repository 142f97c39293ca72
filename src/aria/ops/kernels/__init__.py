"""Triton kernels. Imported only by the operations that launch them, so that the package needs no Triton to import."""
