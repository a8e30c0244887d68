"""The eager step: against the arithmetic written out, at non-finite values, without waiting."""

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastirt.kernels.reference import koleo, pair_loss
from fastirt.model.build import build_encoder
from fastirt.step.optimizer import learning_rate
from fastirt.step.step_counters import LOSS_NAMES
from tests.helpers import make_batch, make_step, run_steps, tiny_config
from tests.kernels.cases import FAST


def snapshot(step):
    return {name: value.clone() for name, value in step.state_dict().items()}


@pytest.mark.parametrize("contrastive", ["anchor_sum", "nonzero_mean"])
@pytest.mark.parametrize("momentum", [None, 0.9])
def test_ten_steps_equal_the_arithmetic_written_out(contrastive, momentum):
    config = tiny_config(
        contrastive=contrastive, encoder_momentum=momentum, memory_start=2, clip_grad=0.5, sched="cosine", warmup_iter=3
    )
    step = make_step(config)
    torch.manual_seed(0)
    encoder = build_encoder(config.model, 16).train()
    keys = build_encoder(config.model, 16).train()
    keys.load_state_dict(encoder.state_dict())
    decay = [p for n, p in encoder.named_parameters() if p.ndim > 1 and "cls_token" not in n and "pos_embed" not in n]
    rest = [p for p in encoder.parameters() if not any(p is q for q in decay)]
    adamw = torch.optim.AdamW([{"params": rest, "weight_decay": 0}, {"params": decay, "weight_decay": 5e-4}], lr=1e-3)
    ring, slots = [(torch.zeros(step.encoder.embed_dim), -1)] * 20, 0

    for number in range(10):
        batch = make_batch(number)
        step(batch)
        x = ((batch.images.float() / 255 - 0.5) / 0.5).permute(0, 3, 1, 2)
        z = encoder(x)
        own = torch.arange(8)
        loss = pair_loss(z, batch.labels, z, batch.labels, self_index=own, reduction=contrastive) + 0.7 * koleo(z)
        if number >= 2:
            stored = (z if momentum is None else keys(x)).detach()
            where = [(slots + i) % 20 for i in range(8)]
            for i, slot in enumerate(where):
                ring[slot] = (stored[i], int(batch.labels[i]))
            slots += 8
            cols = torch.stack([entry[0] for entry in ring])
            col_labels = torch.tensor([entry[1] for entry in ring])
            own = torch.tensor(where) if momentum is None else None
            loss = loss + pair_loss(z, batch.labels, cols, col_labels, self_index=own, reduction=contrastive)
        for group in adamw.param_groups:
            group["lr"] = learning_rate(number, config.optim)
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), 0.5)
        adamw.step()
        with torch.no_grad():
            for k, q in zip(keys.parameters(), encoder.parameters()):
                k.copy_(0.9 * k + 0.1 * q)

    assert step.counters.steps_summed == 10
    assert step.counters.first_bad_step == -1
    # AdamW turns rounding of tiny gradients into steps of the size of the learning rate.
    for (name, ours), theirs in zip(step.encoder.named_parameters(), encoder.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5, msg=name)
    if momentum is not None:
        for ours, theirs in zip(step.networks.momentum_encoder.parameters(), keys.parameters()):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)
    assert step.memory.labels.tolist() == [entry[1] for entry in ring]


@pytest.mark.parametrize("opt, precision", [("adamw", "fp32"), ("lamb", "fp32"), ("adamw", "bf16-weights")])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_non_finite_step_changes_nothing_and_stays_flagged(opt, precision, where):
    step = make_step(tiny_config(opt=opt, precision=precision, encoder_momentum=0.9))
    for number in range(3):
        step(make_batch(number))
    before = snapshot(step)
    if where == "loss":
        original, step.forward_pass.objective.lambda_reg = step.forward_pass.objective.lambda_reg, float("nan")
    else:
        handle = step.networks.compute_encoder.vit.cls_token.register_hook(lambda grad: grad * float("inf"))
    step(make_batch(3))
    if where == "loss":
        step.forward_pass.objective.lambda_reg = original
    else:
        handle.remove()
    step(make_batch(4))  # finite again, yet still held
    after = snapshot(step)
    assert after.pop("first_bad_step") == 3
    for name, value in after.items():
        assert name == "sums" or torch.equal(value, before[name]), name


ASKING = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.is_nonzero.default,
}


def test_the_step_never_asks_the_device_for_a_number():
    asked = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in ASKING:
                asked.append(func)
            return func(*args, **(kwargs or {}))

    # The tiles of a CPU ask it, which no device waits for.
    step = make_step(tiny_config(encoder_momentum=0.9, clip_grad=1.0, drop_path=0.2, loss_impl="reference"))
    step(make_batch(0))
    with Watch():
        step(make_batch(1))
    assert not asked


def test_drop_path_is_a_function_of_seed_and_step():
    runs = []
    for noise in (1, 2):
        step = make_step(tiny_config(drop_path=0.5, drop=0.1, encoder_momentum=0.9))
        torch.manual_seed(noise)  # the global generator must not matter
        for number in range(3):
            step(make_batch(number))
        runs.append(snapshot(step))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_bf16_autocast_keeps_float32_weights_and_learns():
    step = make_step(tiny_config(precision="bf16", memory_dtype="bf16", lambda_reg=0.0, lr=3e-4))
    batch = make_batch(0)
    losses = []
    for number in range(12):
        step.counters.sums.zero_()
        step(dataclasses.replace(batch, step=number))
        losses.append(step.counters.sums[LOSS_NAMES.index("contrastive_batch")].item())
    assert all(p.dtype == torch.float32 for p in step.encoder.parameters())
    assert step.memory.embeddings.dtype == torch.bfloat16
    assert losses[-1] < losses[0]


@pytest.mark.compile
@pytest.mark.parametrize("engine", ["eager", "compile"])
def test_bf16_weights_follow_autocast_over_fp32_masters(engine):
    """The masters stay fp32 and get fp32 updates smaller than a bf16 weight could show; curves part
    by bf16's rounding."""
    curves = []
    for precision in ("bf16", "bf16-weights"):
        how = engine if precision == "bf16-weights" else "eager"
        step = make_step(tiny_config(precision=precision, encoder_momentum=0.9, drop_path=0.2, engine=how))
        start = [w.detach().clone() for w in step.networks.weights]
        curves.append(run_steps(step, 0, 6))
        assert all(
            w.dtype == torch.float32 for w in [*step.encoder.parameters(), *step.networks.momentum_encoder.parameters()]
        )
        assert all(not torch.equal(w, s) for w, s in zip(step.networks.weights, start))
        assert step.counters.first_bad_step == -1
    assert {name.split(".")[0] for name in step.state_dict()} == {"encoder", "twin", "memory", "first_bad_step", "sums"}
    copy = step.networks.bf16_copies[0]
    copy.copy_weights()
    assert all(
        torch.equal(w, m.to(torch.bfloat16)) for w, m in zip(copy.encoder.parameters(), step.encoder.parameters())
    )
    torch.testing.assert_close(curves[0][:, :-1], curves[1][:, :-1], rtol=0.1, atol=0.05)
    # The gradient's norm parts sooner: by 7 % on one CPU, 11 % on another with other bf16 products.
    torch.testing.assert_close(curves[0][:, -1], curves[1][:, -1], rtol=0.2, atol=0.05)


def test_learning_rates_warm_up_and_follow_the_cosine():
    optim = tiny_config(max_iter=100, lr=1.0, warmup_iter=10).optim
    assert [learning_rate(s, optim) for s in (0, 4, 9, 10, 99)] == pytest.approx([0.1, 0.5, 1.0, 1.0, 1.0])
    cosine = tiny_config(max_iter=110, lr=1.0, warmup_iter=10, sched="cosine").optim
    assert [learning_rate(s, cosine) for s in (9, 10, 60, 110)] == pytest.approx([1.0, 1.0, 0.5, 0.0])


def test_weight_decay_spares_biases_norms_tokens_and_positions():
    step = make_step(tiny_config())
    names = {id(p): n for n, p in step.encoder.vit.named_parameters()}
    spared = {names[id(p)] for g in step.optimizer.param_groups if g["weight_decay"] == 0 for p in g["params"]}
    decayed = {names[id(p)] for g in step.optimizer.param_groups if g["weight_decay"] > 0 for p in g["params"]}
    assert {"cls_token", "pos_embed", "norm.weight", "blocks.0.attn.qkv.bias"} <= spared
    assert all(n.endswith("weight") and "norm" not in n for n in decayed)
    assert spared | decayed == set(names.values())


@pytest.mark.parametrize("contrastive", ["anchor_sum", "nonzero_mean"])
def test_training_on_kernels_or_tiles_follows_the_reference(contrastive):
    """Eight steps with a memory that wraps: the losses differ by rounding, which the optimizer
    passes on, not by more."""
    device = "cuda" if torch.cuda.is_available() else "cpu"  # there in the interpreter
    curves = []
    for impl in ("reference", *FAST):
        step = make_step(tiny_config(contrastive=contrastive, loss_impl=impl, memory_start=2), device=device)
        curves.append(run_steps(step, 0, 8, device))
        assert step.counters.first_bad_step == -1
        assert (curves[-1][3:, LOSS_NAMES.index("contrastive_memory")] > 0).all()
    for curve in curves[1:]:
        torch.testing.assert_close(curve, curves[0], rtol=2e-4, atol=1e-6)
