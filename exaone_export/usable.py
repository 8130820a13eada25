"""Whether the runtime can use what a checkpoint brings beside its weights, found out before hours of export."""

from __future__ import annotations

from pathlib import Path

from exporter.assets import find_assets
from model.config import load_config
from model.errors import BundleError, CheckpointError
from model.jsonfile import read_json_object
from runtime.options import GenerationOptions
from runtime.request import RequestBuilder
from runtime.template import load_chat_template

# Read by others than `read_json_object`: the tokenizer may be larger.
_OWN_READERS = ("config.json", "tokenizer.json")
_WHAT = "cannot read checkpoint"
_REMEDY = "Take the file from the model's source"


def check_usable(folder: Path) -> None:
    """Reads a checkpoint's tokenizer, template, generation and preprocessor configuration as the runtime will.

    A file that is missing is no fault: the bundle then runs without what it gives.

    Raises:
        CheckpointError: one is damaged, or belongs to another model.
        BundleError: a link leads outside the folder.
        UsageError: it is another kind of model.
    """
    config = load_config(folder)
    found = find_assets(folder)
    parsed = {
        name: read_json_object(path, CheckpointError, _WHAT)
        for name, path in found.items()
        if name.endswith(".json") and name not in _OWN_READERS
    }
    generation = parsed.get("generation_config.json", {})
    _check_eos(generation.get("eos_token_id"), config.text.vocab_size)
    builder = RequestBuilder(folder, config)
    try:
        GenerationOptions.from_generation_config(generation)
        if "tokenizer.json" in found:
            builder.tokenizer  # noqa: B018 - reading it is the check
        if "chat_template.jinja" in found:
            load_chat_template(folder)
        if config.vision is not None:
            builder.image_processor  # noqa: B018
    except BundleError as reason:
        raise CheckpointError(_WHAT, reason.where, reason.why, _REMEDY) from None


def _check_eos(value: object, vocab_size: int) -> None:
    tokens = value if isinstance(value, list) else [] if value is None else [value]
    for token in tokens:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            why = f"eos_token_id: {str(token)[:40]!r} is no id of a vocabulary of {vocab_size}"
            raise CheckpointError(_WHAT, "generation_config.json", why, _REMEDY)
