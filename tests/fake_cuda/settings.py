"""What is proved on a fake GPU, and the faults planted to check the proof. Imports nothing."""

_ALL = dict(encoder_momentum=0.999, clip_grad=1.0, drop_path=0.1, drop=0.1, memory_dtype="bf16")

SETTINGS = {
    "eager bf16": dict(engine="eager", precision="bf16"),
    "eager bf16, momentum encoder": dict(engine="eager", precision="bf16", encoder_momentum=0.999),
    "eager bf16, all": dict(engine="eager", precision="bf16", **_ALL),
    "eager bf16, nonzero_mean": dict(engine="eager", precision="bf16", contrastive="nonzero_mean"),
    "eager bf16, LAMB": dict(engine="eager", precision="bf16", opt="lamb"),
    "eager bf16, apex": dict(engine="eager", precision="bf16", opt="apex-fused-lamb"),
    "eager bf16-weights": dict(engine="eager", precision="bf16-weights"),
    "eager bf16-weights, all": dict(engine="eager", precision="bf16-weights", **_ALL),
    "eager fp32": dict(engine="eager", precision="fp32"),
    "eager fp32, all": dict(engine="eager", precision="fp32", **_ALL),
    "eager bf16, drop path alone": dict(engine="eager", precision="bf16", drop_path=0.1),
    "eager bf16, plain loss": dict(engine="eager", precision="bf16", loss_impl="reference"),
    "graph bf16": dict(engine="graph", precision="bf16"),
    "graph bf16, all": dict(engine="graph", precision="bf16", **_ALL),
    "graph bf16-weights": dict(engine="graph", precision="bf16-weights"),
    "graph bf16-weights, all, nonzero_mean": dict(
        engine="graph", precision="bf16-weights", contrastive="nonzero_mean", **_ALL
    ),
    "graph fp32, momentum encoder": dict(engine="graph", precision="fp32", encoder_momentum=0.999),
    "graph bf16, SGD": dict(engine="graph", precision="bf16", opt="sgd"),
    "graph bf16, apex": dict(engine="graph", precision="bf16", opt="apex-fused-adam"),
    "graph bf16, plain loss": dict(engine="graph", precision="bf16", loss_impl="reference"),
    "graph bf16, a loss of the user": dict(
        engine="graph", precision="bf16", objective="scripts/examples/own_loss.py:supervised_contrastive"
    ),
}

# The faults of `planted`: a part of the message, and of the line of code that it names.
PLANTED = {
    ".item()": ("the host waits for a value: aten._local_scalar_dense", "self.pointer.item()"),
    "boolean mask": ("the host waits for a value: aten.nonzero", "labels[labels >= 0]"),
    "if tensor": ("the host waits for a value: aten._local_scalar_dense", "if norm > 1e9"),
    ".cpu()": ("a copy that waits: cuda to cpu", ".cpu()"),
    "index on the host": ("aten.index.Tensor: a host tensor (3,)", "self.labels[torch.zeros("),
    "operands on two devices": ("two different devices", "labels + torch.zeros("),
    "fp32 images into bf16 weights": ("Input type (float) and bias type (c10::BFloat16)", "forward_features(images)"),
    "synchronize": ("the host waits for the device", "torch.cuda.synchronize()"),
    "register_fake of other strides": ("its register_fake says", "contrastive_koleo_backward("),
    "launch with a host tensor": ("row_labels_ptr is in host memory", "grad_kernel["),
    "tensor made from a number": ("a copy that waits: cpu to cuda", "torch.tensor([1.0]"),
    "masks from pageable memory": ("a copy that waits: cpu to cuda", "self.masks.copy_(masks"),
    "synchronize in a capture": ("not permitted when stream is capturing", "torch.cuda.synchronize()"),
    "new buffers each step": ("the body reads another address", "out.view(bits)"),
    "capture without a warm-up": ("1 bodies", ""),
}

# The waits of `streams_proof`: the case that must notice, the function, what is left out of it and
# what takes its place, and the file of the access that another one then does not wait for.
_WAIT = ("fastirt.loading.train_loader:TrainLoader._batch", "images.stream.wait()", "pass")
_WARM_UP, _RECORDED = "fastirt.step.cuda_graph:Capture._warm_up", "fastirt.loading.prefetch:_recorded"
LEFT_OUT = {
    "the capture's stream does not wait for the batch": (
        *("no cache", _WARM_UP, "self._stream.wait_stream(current)", "pass", "fastirt/step/step_input.py"),
    ),
    "the next batch does not wait for the capture's stream": (
        *("no cache", _WARM_UP, "current.wait_stream(self._stream)", "pass", "kernels/gather.py"),
    ),
    "a replay on the capture's stream": (
        *("no cache", "fastirt.step.cuda_graph:Capture.__call__", "self._graph.replay()"),
        *("with self.stream(): self._graph.replay()", "kernels/gather.py"),
    ),
    "images are handed over before they are there": ("no cache", *_WAIT, "fastirt/loading/prefetch.py"),
    "gathered images are handed over before they are there": ("host cache", *_WAIT, "kernels/gather.py"),
    "picks are handed over before they are there": ("device cache", *_WAIT, "fastirt/loading/prefetch.py"),
    "an image is valid before it is in the cache": (
        *("device cache", "fastirt.loading.cached_images:CachedImages._keep", "self.stream.wait()", "pass"),
        "fastirt/loading/image_cache.py",
    ),
    "an evaluation batch is handed over before it is there": (
        *("evaluation", "fastirt.loading.eval_loader:EvalLoader._padded", "stream.wait()", "pass"),
        "fastirt/loading/prefetch.py",
    ),
    **{
        f"the allocator does not know who reads {tensor}": ("each tensor read", _RECORDED, code, "", reader)
        for tensor, code, reader in (
            ("labels", "batch.labels, ", "tests/fake_cuda/streams_proof.py"),
            ("starts", "views.starts, ", "kernels/gather.py"),
            ("widths", "views.widths, ", "kernels/gather.py"),
            ("picks", "views.picks, ", "kernels/gather.py"),
            ("images", ", views.per_batch", "kernels/gather.py"),
        )
    },
}
# Waits of the same modules that order nothing between streams, or that a fake GPU cannot show.
OTHER_WAITS = [
    # before a capture, where torch.cuda.graph waits once more; and before a graph is freed
    *[("fastirt.step.cuda_graph", "torch.cuda.synchronize(self.device)")] * 2,
    # DeviceStream.wait itself: its three callers are left out above
    ("fastirt.loading.prefetch", "self._stream.synchronize()"),
    # crops of evaluation in the host's memory, which the host reads
    ("fastirt.loading.cached_images", "self.stream.wait()"),
    # for five tensors, which are left out above
    ("fastirt.loading.prefetch", "tensor.record_stream(torch.cuda.current_stream(tensor.device))"),
]
