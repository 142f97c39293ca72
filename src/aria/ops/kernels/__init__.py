"""Kernels for CUDA, in Triton and Gluon. Nothing outside this folder imports Triton.

Each module registers its kernels with the operations that they implement, and stands in the list
:data:`aria.ops.registry.KERNELS`.
"""
