"""The check of headers and structure: what it refuses before a decoder sees it, and what passes."""

import pytest

from fastirt.images.formats.header_check import BadImage, inspect
from tests.images.broken_files import broken_files, encoded, undecodable


@pytest.mark.parametrize("name", broken_files())
def test_each_kind_is_refused_before_decoding(name):
    with pytest.raises(BadImage) as error:
        inspect(broken_files()[name], "x.jpg")
    assert error.value.path == "x.jpg"
    assert error.value.reason
    assert "\n" not in error.value.reason


@pytest.mark.parametrize(
    "kind, options", [("JPEG", {}), ("JPEG", dict(progressive=True)), ("PNG", {}), ("WEBP", {}), ("BMP", {})]
)
def test_whole_images_pass_also_with_bytes_after_the_end(kind, options):
    data = encoded(kind, **options)
    assert inspect(data)[:2] == (30, 40)
    if kind == "JPEG":
        assert inspect(data + bytes(100))[:2] == (30, 40)


def test_what_only_a_decoder_finds_passes_the_check():
    assert inspect(undecodable())[:2] == (30, 40)
