"""The Triton kernels: forward pass, its sums, backward pass, and what they share.

In their signatures N counts rows, C columns of the batch, M slots of the memory and D numbers of a
vector; a tile has BM rows, BN columns and chunks of BD numbers.
"""
