"""The training forward computes what the model computes."""

import pytest
import torch

from training.forward import decode, encode_images
from training.shape import new_model

TOLERANCE = 2e-5


@pytest.mark.parametrize(("rows", "columns"), [(2, 4), (4, 18), (6, 24)])
def test_images_of_one_size_encode_as_packed(rows: int, columns: int) -> None:
    encoder = new_model(0).vision_encoder
    assert encoder is not None
    patches = torch.randn(2, rows * columns, 3, 14 * 14)
    packed = patches[:, :, :, None].expand(-1, -1, -1, 2, -1).reshape(2 * rows * columns, -1)
    with torch.no_grad():
        expected = encoder(packed, torch.tensor([[1, rows, columns]] * 2))
        found = encode_images(encoder, patches.flatten(2), rows, columns).flatten(0, 1)
    assert (found - expected).abs().max() < TOLERANCE * expected.abs().max()


def test_padded_batch_decodes_as_with_cache() -> None:
    decoder = new_model(0).decoder
    x, lengths = torch.randn(2, 50, 256), torch.tensor([50, 37])
    mask = (torch.arange(50)[None] < lengths[:, None]).long()
    with torch.no_grad():
        _, expected, _ = decoder(x, mask, decoder.empty_cache(2), torch.zeros(1, dtype=torch.int64))
        found, _ = decode(decoder, x, 2)
    for row, length in enumerate(lengths):
        assert (found[row, :length] - expected[row, :length]).abs().max() < TOLERANCE * expected.abs().max()
