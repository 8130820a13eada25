"""One pass of a bundle that does not generate: ids and image features in, the head's outputs out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from model.bundle import DECODER, EMBEDDING
from model.errors import BundleError, NumericalError, UsageError
from model.tasks import CLASSIFICATION
from runtime.encoder_inputs import PASS_TOKENS, Ids, Mask, batches
from runtime.graphs import Graphs
from runtime.image import Grid, PixelValues
from runtime.memory import check_pass
from runtime.request import RequestBuilder
from runtime.session import Array

Floats = npt.NDArray[np.float32]
Outputs = dict[str, Floats]
Found = TypeVar("Found")


class EncoderPass:
    """Runs the graphs of one bundle; every method raises BundleError, ResourceError and NumericalError."""

    def __init__(self, graphs: Graphs, requests: RequestBuilder) -> None:
        self._graphs, self._requests = graphs, requests
        self._config = graphs.config

    def __call__(self, ids: Ids, mask: Mask, features: Floats | None = None) -> Outputs:
        """The outputs by name, float32, for ids [batch, sequence].

        Args:
            ids: checked ones.
            mask: the same shape; padding may stand on either side.
            features: [image tokens, hidden] for the placeholders in `ids`, in order.

        Raises:
            UsageError: there are more or fewer placeholders than features.
        """
        check_pass(self._config.text, *ids.shape)
        decoder = self._graphs.session(DECODER)
        feeds: dict[str, Array] = {"attention_mask": mask.astype(np.int64)}
        if decoder.has_input("input_ids"):
            feeds["input_ids"] = ids
        else:
            feeds["inputs_embeds"] = self._embedded(ids, features)
        names = [tensor.name for tensor in decoder.graph.outputs]
        found = dict(zip(names, decoder.run(feeds, names), strict=True))
        labels = len(self._config.labels.names)
        if self._config.task in CLASSIFICATION and found["logits"].shape[-1] != labels:
            why = f"it gives {found['logits'].shape[-1]} logits, config.json has {labels} labels"
            raise BundleError("damaged bundle", decoder.graph.file, why, "Export the model again")
        for name, values in found.items():
            if not np.isfinite(values[mask] if values.shape[:2] == mask.shape else values).all():
                raise NumericalError("model failed", name, "it holds NaN or Inf", "Check the bundle with verify")
        return {name: values.astype(np.float32, copy=False) for name, values in found.items()}

    def rows(
        self,
        rows: Sequence[Sequence[int]],
        pick: Callable[[Outputs, int, Mask], Found],
        images: Sequence[Sequence[Image.Image]] = (),
        together: bool = True,
    ) -> list[Found]:
        """What `pick` takes from the outputs for every row: it gets them with the number and the mask of the row.

        Args:
            rows: token ids, placeholders expanded.
            pick: see above.
            images: scaled ones for each row; none at all where there are no images.
            together: whether several rows may share a pass.
        """
        found: list[Found] = []
        for batch in batches(rows, self._graphs.pad_id, PASS_TOKENS if together else 0):
            pictures = [picture for row in batch.rows for picture in images[row]] if images else []
            features = np.concatenate([self.image(picture) for picture in pictures]) if pictures else None
            outputs = self(batch.ids, batch.mask, features)
            found += [pick(outputs, i, mask) for i, mask in enumerate(batch.mask)]
        return found

    def image(self, scaled: Image.Image) -> Floats:
        """Features [image tokens, hidden] of one image."""
        processor = self._requests.image_processor
        pixels, grid = processor.patches(scaled)
        return self._encoded(pixels, grid, processor.token_count(scaled))

    def patches(self, pixel_values: Any, image_grid_thw: Any) -> Floats:
        """Features [image tokens, hidden] of images given as patches, one after the other.

        Args:
            pixel_values: numbers [patches, patch width].
            image_grid_thw: whole numbers [images, 3].

        Raises:
            UsageError: the model does not see, or the arrays do not fit it or each other.
        """
        vision = self._config.vision
        if vision is None:
            raise UsageError("cannot run", "pixel_values", "this model reads text only", "Leave them out")
        pixels, grids = _array(pixel_values, "pixel_values", "fiu"), _array(image_grid_thw, "image_grid_thw", "iu")
        if pixels.shape[1] != vision.patch_dim:
            why = f"{pixels.shape[1]} values in a patch, the model's have {vision.patch_dim}"
            raise UsageError("cannot run", "pixel_values", why)
        merge = vision.spatial_merge_size
        if grids.shape[1] != 3 or (grids < 1).any() or (grids[:, 1:] % merge).any():
            why = f"each image needs frames, rows and columns, the last two multiples of {merge}"
            raise UsageError("cannot run", "image_grid_thw", why)
        sizes = grids.prod(1)
        if sizes.sum() != len(pixels):
            why = f"it means {int(sizes.sum())} patches, pixel_values has {len(pixels)}"
            raise UsageError("cannot run", "image_grid_thw", why)
        parts = np.split(pixels.astype(np.float32), np.cumsum(sizes)[:-1])
        return np.concatenate(
            [self._encoded(part, grid[None], len(part) // merge**2) for part, grid in zip(parts, grids, strict=True)]
        )

    def _encoded(self, pixels: PixelValues, grid: Grid, tokens: int) -> Floats:
        return self._graphs.encode(pixels, grid, tokens).astype(np.float32, copy=False)

    def _embedded(self, ids: Ids, features: Floats | None) -> Array:
        """The decoder's inputs; without features, placeholders are ordinary tokens, as in transformers."""
        embedding = self._graphs.session(EMBEDDING)
        info = next(tensor for tensor in embedding.graph.inputs if tensor.name == "image_features")
        if features is None:
            features = np.zeros((0, self._config.text.hidden_size), np.float32)
        else:
            media = int(np.isin(ids, list(self._graphs.media_ids)).sum())
            if media != len(features) or (ids == self._config.video_token_id).any():
                why = f"{media} placeholders, the images have {len(features)} tokens"
                raise UsageError("cannot use token ids", "input_ids", why, "Expand one placeholder to each image token")
        feeds = {"input_ids": ids, "image_features": features.astype(info.dtype, copy=False)}
        return embedding.run(feeds, ["inputs_embeds"])[0]


def _array(given: Any, name: str, kinds: str) -> Array:
    try:
        array = np.asarray(given)
    except ValueError:
        raise UsageError("cannot run", name, "its rows differ in length") from None
    if array.dtype.kind not in kinds or array.ndim != 2 or not array.size:
        raise UsageError("cannot run", name, f"{array.dtype} of shape {list(array.shape)} is not what the model takes")
    return array.astype(np.int64) if "f" not in kinds else array
