"""Samplers and crops: pure functions of (seed, step, bad images)."""

import numpy as np
import pytest

from fastirt.config.random_streams import Purpose, drop_path_stream, stream, torch_seed
from fastirt.errors import UserError
from fastirt.loading import sampler as sampler_module
from fastirt.loading.augment import draw_crops
from fastirt.loading.sampler import make_sampler

LABELS = np.repeat(np.arange(10), 7)


def test_shuffled_stream_is_epochs_cut_into_full_batches():
    sampler = make_sampler(LABELS, 16, 0, seed=3)
    stream = np.concatenate([sampler.batch(step) for step in range(70)])
    for epoch in range(len(stream) // 70):
        assert sorted(stream[epoch * 70 : (epoch + 1) * 70]) == list(range(70))
    assert not np.array_equal(stream[:70], stream[70:140])
    fresh = make_sampler(LABELS, 16, 0, seed=3)
    assert np.array_equal(fresh.batch(41), sampler.batch(41))  # whatever was drawn before
    assert not np.array_equal(make_sampler(LABELS, 16, 0, seed=4).batch(41), sampler.batch(41))


def test_a_batch_larger_than_the_data_set_spans_epochs():
    assert np.array_equal(np.bincount(make_sampler(LABELS[:5], 15, 0, seed=0).batch(2)), [3] * 5)


def test_m_per_class():
    sampler = make_sampler(LABELS, 12, 3, seed=0)
    seen = set()
    for step in range(40):
        rows = sampler.batch(step)
        groups = rows.reshape(4, 3)
        assert len({*LABELS[groups[:, 0]]}) == 4
        assert all(len({*LABELS[group]}) == 1 and len({*group}) == 3 for group in groups)
        seen |= set(rows.tolist())
    assert len(seen) == 70
    assert np.array_equal(make_sampler(LABELS, 12, 3, seed=0).batch(17), sampler.batch(17))


@pytest.mark.parametrize("m", [0, 2])
def test_a_batch_takes_few_generators_and_none_a_second_time(m, monkeypatch):
    """A generator costs as much as the rows of several classes."""
    made = []
    monkeypatch.setattr(sampler_module, "stream", lambda *key: made.append(key) or stream(*key))
    sampler = make_sampler(np.repeat(np.arange(100), 3), 64, m, seed=0)
    for step in range(20):
        made.clear()
        rows, following = sampler.batch(step), sampler.batch(step + 1)
        assert len(made) <= (4 if step == 0 else 2)
        made.clear()
        assert np.array_equal(rows, sampler.batch(step))
        assert np.array_equal(following, sampler.batch(step + 1))
        assert not made


def test_small_classes_repeat_and_are_said(caplog):
    labels = np.array([0, 0, 0, 0, 1, 2, 2])
    rows = make_sampler(labels, 12, 4, seed=0).batch(0)
    assert np.array_equal(np.bincount(labels[rows]), [4, 4, 4])
    assert "fewer than m = 4" in caplog.text


@pytest.mark.parametrize("m", [0, 2])
def test_replacements_stay_in_the_class_and_do_not_depend_on_when_they_were_found(m):
    sampler = make_sampler(LABELS, 14, m, seed=1)
    rng = np.random.default_rng(0)
    bad = set(rng.choice(70, 20, replace=False).tolist()) - set(range(7))
    for step in range(30):
        plain, final = sampler.batch(step), sampler.batch(step, bad)
        assert not bad & set(final.tolist()) and np.array_equal(LABELS[plain], LABELS[final])
        changed = np.isin(plain, list(bad))
        assert np.array_equal(plain[~changed], final[~changed])
        known: set = set()  # found one by one, in the order of encounter
        while encounter := bad & set(sampler.batch(step, known).tolist()):
            known.add(encounter.pop())
        assert np.array_equal(sampler.batch(step, known), final)


@pytest.mark.parametrize("m", [0, 2])
def test_a_class_without_images_leaves_and_nothing_left_is_an_error(m):
    sampler = make_sampler(LABELS, 14, m, seed=1)
    for step in range(20):
        rows = sampler.batch(step, set(range(7)))
        assert len(rows) == 14 and 0 not in LABELS[rows]
    with pytest.raises(UserError, match="bad_pictures.csv"):
        sampler.batch(0, set(range(70)))


@pytest.mark.parametrize(
    "labels, batch, m, saying",
    [
        (LABELS, 15, 2, "multiple of --m"),
        (LABELS, 24, 2, "needs 12 classes"),
        ([], 4, 0, "empty"),
        (LABELS, 0, 0, "--batch-size"),
    ],
)
def test_impossible_settings(labels, batch, m, saying):
    with pytest.raises(UserError, match=saying):
        make_sampler(np.array(labels), batch, m, seed=0)


def test_crops_belong_to_positions():
    crops = draw_crops(5, 9, 64)
    again = draw_crops(5, 9, 16)
    assert np.array_equal(crops.x[:16], again.x) and np.array_equal(crops.flip[:16], again.flip)
    many = [draw_crops(0, step, 256) for step in range(20)]
    x, flip = np.concatenate([c.x for c in many]), np.concatenate([c.flip for c in many])
    assert 0 <= x.min() < 0.01
    assert 0.99 < x.max() < 1
    assert abs(flip.mean() - 0.5) < 0.03
    assert not np.array_equal(draw_crops(5, 10, 64).x, crops.x)


def test_streams_are_what_stored_checkpoints_go_on_to_draw():
    """Values of version 0.1.0: another number here would make a resumed run another run."""
    assert (
        stream(7, Purpose.SHUFFLE, 3).integers(0, 1000, 4).tolist()
        == np.random.default_rng([7, 101, 3]).integers(0, 1000, 4).tolist()
    )
    key = np.array([7, 0x57], dtype=np.uint64)
    philox = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, 5]))
    assert drop_path_stream(7, 5, "encoder").random() == philox.random()
    assert torch_seed(7, 5, 0) == int(np.random.SeedSequence([7, 5]).generate_state(1)[0])
    assert torch_seed(7, 5, 2) == int(np.random.SeedSequence([7, 5, 2]).generate_state(1)[0])
