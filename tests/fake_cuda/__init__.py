"""Proofs of the GPU path on a fake GPU, each in a process of its own.

`benchmarks.fake_cuda` is the device: tensors without values, streams and graphs that write down
what they are told. `watch` checks each operator, custom operator and launch on it: whether the host
waits for the device, what crosses between host and device, dtypes, layouts.

`python -m tests.fake_cuda.run MODULE` runs `step_proof`, `planted`, `input_proof`, `readout_proof`,
`save_proof`, `collectives_proof`, `compile_proof`, `generated_proof` or `streams_proof`; the tests
do the same. Neither values, nor kernels' own code, nor what NCCL, DALI and CUDA's allocator do is
shown. DistributedDataParallel is replaced by a stand-in, since its C++ part asks the driver for
events.
"""
