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
