"""The objective on a CPU, in tiles of similarities that stay in the cache: `impl="tiled"`."""
