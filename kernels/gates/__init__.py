"""What `fastirt.kernels.aot` demands of a compiled kernel, read off the compiler's texts."""
