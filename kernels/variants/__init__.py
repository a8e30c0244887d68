"""The variants of the kernels: tile sizes by GPU, precision and D, and all that `aot` compiles."""
