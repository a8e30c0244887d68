"""The threads of a decoder: the order of batches, when they rest, their memory."""

import time

import numpy as np
import pytest
import torch

from fastirt.images.decoders.threads import Buffers, ThreadedDecoder
from fastirt.images.formats.header_check import Undecodable

COUNT = 12  # images in a batch


class Recording(ThreadedDecoder):
    """Takes 2 ms for each image, which is a byte, and cannot decode a 9."""

    def __init__(self):
        super().__init__(1, 2)
        self.decoded = []

    def crop(self, data, resized, corner):
        time.sleep(0.002)
        self.decoded.append(int(data[0]))
        if data[0] == 9:
            raise ValueError("a nine")
        return np.full((1, 1, 3), data[0])

    def whole(self, data, resized):
        return self.crop(data, resized, None)

    def begin(self, value, count=COUNT):
        places = np.zeros((count, 2), int)
        return self.start([np.array([value], np.uint8)] * count, places, places, np.arange(count) % 2 == 1)


def test_threads_rest_once_a_batch_is_complete():
    """They begin with the next one while the last images of the first are decoded."""
    decoder = Recording()
    first, second = decoder.begin(1), decoder.begin(2)
    assert first().unique().tolist() == [1]
    time.sleep(0.05)
    after = len(decoder.decoded)
    time.sleep(0.05)
    assert COUNT <= len(decoder.decoded) == after < 2 * COUNT
    decoder.resume()
    assert second().unique().tolist() == [2]
    # the last image of the first may be written down behind an image of the second
    assert sorted(decoder.decoded) == [1] * COUNT + [2] * COUNT and decoder.decoded[: COUNT - 1] == [1] * (COUNT - 1)
    decoder.close()


def test_a_broken_image_fails_its_own_batch_alone():
    decoder = Recording()
    broken, whole = decoder.begin(9, count=2), decoder.begin(3)
    with pytest.raises(Undecodable) as failed:
        broken()
    assert failed.value.reasons == {i: "cannot be decoded: a nine" for i in range(2)}
    decoder.resume()
    assert whole().unique().tolist() == [3]
    assert [image.flatten().tolist() for image in decoder.decode_whole([np.array([4])], None, np.zeros((1, 2)))] == [
        [4, 4, 4]
    ]
    decoder.begin(5)
    decoder.close()  # ends, with images to decode left
    assert len(decoder.decoded) < 2 + 2 * COUNT + 1


def test_memory_of_a_batch_is_used_again_once_nothing_shows_it():
    buffers = Buffers()
    first = torch.from_numpy(buffers.take((2, 3)))
    at, view = first.data_ptr(), first.view(-1)[2:]
    del first
    assert buffers.take((2, 3)).ctypes.data != at
    del view
    assert buffers.take((2, 3)).ctypes.data == at
    held = [buffers.take((2, 3)) for _ in range(2 * buffers.LIMIT)]
    assert len({buffer.ctypes.data for buffer in held}) == len(held)
    assert buffers.take((1, 3)).shape == (1, 3)
