"""The Triton kernels themselves: forward pass, its sums, backward pass, and what they share."""
