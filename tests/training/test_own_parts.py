"""Data sets, augmentations and losses of a user: what they get, how they resume and scale over
ranks, and what is refused of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastirt.config.random_streams import Purpose, stream
from fastirt.config.user_code import load_object, portable, with_digest
from fastirt.datasets import load_dataset
from fastirt.distributed.ranks import Ranks
from fastirt.errors import UserError
from fastirt.loading.augment import Draws, OwnAugmentation
from fastirt.objective.global_loss import MemoryShard
from fastirt.objective.own_loss import OwnGlobalLoss, OwnLoss
from tests.helpers import (
    CPU,
    ROOT,
    assert_same_weights,
    last_line,
    loss_rows,
    make_step,
    read_config,
    read_metrics,
    run_cli,
    run_steps,
    same_bits,
    tiny_config,
    train_few,
    write_images,
)

EXAMPLES = ROOT / "scripts/examples"
JITTER, LOSS = f"{EXAMPLES}/own_augmentation.py:jitter", f"{EXAMPLES}/own_loss.py:supervised_contrastive"
RECORDS = f"{EXAMPLES}/own_data_set.py:products"
PARTS = ("--augment", JITTER, "--objective", LOSS)


@pytest.fixture
def code(tmp_path):
    """Writes a file of a user; a name of its own, since a process imports a file once."""
    return lambda text, name="own.py": _write(tmp_path / name, text)


def _write(file: Path, text: str) -> Path:
    file.write_text("import torch\n" + text)
    return file


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    write_images(root, 12, 4)
    listed = [{"photo": f"class{c:02d}/{i}.jpg", "product": f"p{c}"} for c in range(12) for i in range(4)]
    (root / "photos.json").write_text(json.dumps(listed))
    return root / "photos.json"


def test_own_records(photos):
    catalog = load_dataset(RECORDS, str(photos))
    assert (len(catalog.train), len(catalog.query), catalog.gallery) == (32, 16, None)
    assert {catalog.class_names[label] for label in catalog.query.labels} == {"p0", "p11", "p4", "p7"}
    assert catalog.dataset == "products" and catalog.place == "own_data_set.py:products"
    assert catalog.train.paths[0] == str(photos.parent / "class01/0.jpg")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return [('a.jpg', 'a')]", "record 1: .* is not"),
        ("return [('class00/0.jpg', 'a', 'trian')]", "record 1: unknown split 'trian'"),
        ("return [('class00/0.jpg', 'a', 'train')] * 2", "record 2|row 2"),
        ("return [('x.jpg', 'a', 'train')]", "no file 'x.jpg'"),
        ("return []", "no records"),
        ("return 1 / 0", "ZeroDivisionError.*line 3"),
    ],
)
def test_what_is_wrong_with_records_is_named(photos, code, body, words):
    with pytest.raises(UserError, match=words):
        load_dataset(f"{code(f'def f(path):{chr(10)}    {body}')}:f", str(photos), training=None)


def test_names_that_are_refused(code):
    file = code("def f(x): return x\nn = 3")
    for text, words in (
        (f"{file}:g", "has no g; it has f"),
        (f"{file}x.py:f", "no such file"),
        (f"{file}:", "FILE.py:NAME"),
        ("nowhere.at.all:f", "no module nowhere"),
        ("subprocess:getoutput", "part of Python"),
        (f"{json.__file__}:load", "part of Python"),
        (f"{code('import nowhere', 'b.py')}:f", "ModuleNotFoundError.*line 2"),
    ):
        with pytest.raises(UserError, match=words):
            load_object("--augment", text)
    for text in ("", "nothing", f"{file}:", ":f"):
        with pytest.raises(UserError, match="--augment .*: name a function as FILE.py:NAME"):
            with_digest("--augment", text)
    noted = with_digest("--augment", f"{file}:f")
    assert portable(noted).startswith("own.py:f@") and load_object("--augment", noted)(2) == 2
    assert load_object("--augment", "tests.helpers:same_bits") is same_bits
    with pytest.raises(UserError, match="no function"):
        OwnAugmentation(f"{file}:n", 0)


def test_draws_are_a_function_of_seed_step_and_position():
    def numbers(first, count, step=3):
        draws = Draws(7, step, first, count, CPU)
        return draws.uniform(2), draws.normal(), draws.integers(0, 9, 2, 2)

    for whole, part in zip(numbers(0, 8), numbers(5, 2)):
        assert torch.equal(whole[5:7], part)
    assert not torch.equal(numbers(0, 8)[0], numbers(0, 8, step=4)[0])
    expected = stream(7, Purpose.AUGMENT, 3, 0).random((8, 2), dtype=np.float32)
    assert torch.equal(numbers(0, 8)[0], torch.from_numpy(expected))


def test_an_augmentation_of_parts_is_that_of_the_batch():
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8))
    jitter, kept = OwnAugmentation(JITTER, 5), images.clone()
    whole = jitter(images, 2, 0)
    assert torch.equal(torch.cat([jitter(images[:5], 2, 0), jitter(images[5:], 2, 5)]), whole)
    assert torch.equal(images, kept) and not torch.equal(whole, images)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return images.float()", "returned .* torch.float32"),
        ("return images[:, 1:]", r"returned \(4, 7, 8, 3\)"),
        ("return images.numpy()", "returned ndarray"),
        ("return images ^ torch.randint(0, 2, images.shape, dtype=torch.uint8)", "two calls .* differ"),
        ("return images.flip(0)", "depends on the other images"),
        ("return images + nothing", "NameError.*own.py, line 3"),
    ],
)
def test_augmentations_that_are_refused(code, body, words):
    own = OwnAugmentation(f"{code(f'def f(images, draws):{chr(10)}    {body}')}:f", 0)
    images = torch.arange(4 * 8 * 8 * 3).reshape(4, 8, 8, 3).to(torch.uint8)
    with pytest.raises(UserError, match=words):
        own(images, 0, 0)


def vectors(n, seed=0):
    z = F.normalize(torch.randn(n, 16, generator=torch.Generator().manual_seed(seed)), dim=1)
    return z, torch.arange(n) % 3


def test_each_rank_has_the_loss_and_gradient_of_the_whole_batch():
    loss = OwnLoss(load_object("--objective", LOSS), LOSS)
    (z, labels), (memory, memory_labels) = vectors(8), vectors(12, 1)
    memory_labels[4:6] = -1
    shard = MemoryShard(memory, memory_labels, torch.arange(8), False)
    whole = z.clone().requires_grad_()
    expected = loss(whole, labels, *shard[:3])
    expected.total.backward()
    for rank in range(2):
        own = z[4 * rank : 4 * rank + 4].clone().requires_grad_()
        found = OwnGlobalLoss(loss, Ranks(rank, 2))(own, z, labels, shard)
        found.total.backward()
        assert same_bits(found.total, expected.total)
        assert torch.allclose(own.grad, whole.grad[4 * rank : 4 * rank + 4], rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return embeddings.sum(1)", r"returned \(4,\)"),
        ("return 1.0", "returned float"),
        ("return embeddings.detach().sum()", "no gradient"),
        ("return embeddings @ labels", "RuntimeError.*own.py, line 3"),
        ("return (embeddings.sum(),) * 3", "returned"),
    ],
)
def test_losses_that_are_refused(code, body, words):
    file = code(f"def f(embeddings, labels):\n    {body}")
    z, labels = vectors(4)
    with pytest.raises(UserError, match=words):
        OwnLoss(load_object("--objective", f"{file}:f"), f"{file}:f")(z.requires_grad_(), labels)


def test_a_loss_with_parameters_is_refused_and_modules_and_memory_are_passed(code):
    file = code(
        "class Proxies(torch.nn.Linear):\n    def __init__(self): super().__init__(2, 2)\n"
        "class Own(torch.nn.Module):\n    def forward(self, embeddings, labels, memory_labels):\n"
        "        return tuple(x * embeddings.sum() for x in (4, 3, 2, memory_labels.sum()))\n"
    )
    with pytest.raises(UserError, match="parameters of its own"):
        OwnLoss(load_object("--objective", f"{file}:Proxies"), f"{file}:Proxies")
    own = OwnLoss(load_object("--objective", f"{file}:Own"), f"{file}:Own")
    assert own.takes == ("memory_labels",)
    z, labels = vectors(4)
    assert torch.allclose(torch.stack(own(z, labels, z, labels)), z.sum() * torch.tensor([4.0, 3, 2, 3]))


def test_the_projects_own_loss_as_a_users_trains_alike(code):
    file = code(
        "from fastirt import RetrievalLoss\n"
        "loss = RetrievalLoss(0.5, 'anchor_sum', 0.7, normalize=False, finite_slots=True)\n"
        "def f(embeddings, labels, memory, memory_labels, memory_self):\n"
        "    return loss(embeddings, labels, memory, memory_labels, memory_self)\n"
    )
    curves = [
        run_steps(make_step(tiny_config(objective=objective, method="irt-r", engine="eager")), 0, 4)
        for objective in (None, f"{file}:f")
    ]
    assert same_bits(*curves)


def test_a_run_with_own_parts_resumes_to_the_same_bits_and_is_evaluated(photos, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "code"
    folder.mkdir()
    for name in ("own_augmentation.py", "own_loss.py", "own_data_set.py"):
        shutil.copy(EXAMPLES / name, folder)
    monkeypatch.chdir(folder)
    flags = "--augment own_augmentation.py:jitter --objective own_loss.py:supervised_contrastive".split()
    records = ["--dataset", "own_data_set.py:products", "--data-path", photos]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert train_few(photos, whole, *records, *flags) == 0
    assert all(np.isfinite(row["loss"]) and row["koleo"] == 0 for row in loss_rows(whole))
    config = read_config(whole)
    assert config["data"]["dataset"] == f"{folder}/own_data_set.py:products"
    assert config["input"]["augment"].startswith(f"{folder}/own_augmentation.py:jitter@")
    shutil.copytree(whole, killed)
    for name in ("model.safetensors", "metrics.json", "checkpoints/step_00000006.safetensors"):
        (killed / name).unlink()
    monkeypatch.chdir(tmp_path)
    assert run_cli("train", "--resume", killed) == 0
    assert_same_weights(killed, whole)
    assert read_metrics(killed) == read_metrics(whole)
    assert run_cli("evaluate", whole) == 0
    capsys.readouterr()
    newest = killed / "checkpoints/step_00000006.safetensors"
    newest.unlink()
    moved = folder.rename(tmp_path / "moved")
    assert run_cli("train", "--resume", killed) == 2
    assert "own_augmentation.py: no such file" in last_line(capsys)
    places = ["--dataset", "own_data_set.py:products", *flags]
    monkeypatch.chdir(moved)
    assert run_cli("train", "--resume", killed, *places) == 0
    assert_same_weights(killed, whole)
    moved.rename(folder)
    monkeypatch.chdir(tmp_path)
    newest.unlink()
    with open(folder / "own_loss.py", "a") as file:
        file.write("# changed\n")
    capsys.readouterr()
    assert run_cli("train", "--resume", killed, *(f"{folder}/{p}" if ".py:" in p else p for p in places)) == 2
    assert "objective: 'own_loss.py:supervised_contrastive@" in last_line(capsys)
    (folder / "own_loss.py").unlink()
    assert run_cli("evaluate", whole) == 0  # needs the records alone
