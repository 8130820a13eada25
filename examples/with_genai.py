"""Answers with a bundle for the CPU by stock onnxruntime-genai: python with_genai.py BUNDLE QUESTION [IMAGE ...]

Prints {"text", "token_ids"}. The bundle's genai_config.json tells onnxruntime-genai which graph takes what. Its own
processors know no EXAONE, so the prompt is rendered and tokenized here, and images are cut into patches; what goes into
the graphs is handed over by name.
"""

import json
import sys
from math import ceil, floor, sqrt
from pathlib import Path

import jinja2
import numpy as np
import onnxruntime_genai as og
from PIL import Image
from tokenizers import Tokenizer

NEW_TOKENS = 128


def patches(image: Image.Image, raw: dict) -> tuple[np.ndarray, list[int]]:
    """Patches [patches, 3 * frames * side * side] of an image, those of a token together, and their grid."""
    side, merge, sides, area = raw["patch_size"], raw["merge_size"], image.size[::-1], image.width * image.height
    unit, low, high = side * merge, raw["min_pixels"], raw["max_pixels"]
    rows, columns = (round(size / unit) for size in sides)
    if rows * columns * unit**2 > high:
        rows, columns = (max(1, floor(size / sqrt(area / high) / unit)) for size in sides)
    elif rows * columns * unit**2 < low:
        rows, columns = (ceil(size * sqrt(low / area) / unit) for size in sides)
    pixels = np.asarray(image.resize((columns * unit, rows * unit), raw["resample"])) * raw["rescale_factor"]
    values = (pixels.astype("f4") - np.float32(raw["image_mean"])) / np.float32(raw["image_std"])
    split = values.reshape(rows, merge, side, columns, merge, side, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    frames = split.reshape(-1, 3, 1, side, side).repeat(raw["temporal_patch_size"], 2)
    return frames.reshape(len(frames), -1), [1, rows * merge, columns * merge]


def main(folder: Path, question: str, paths: list[str]) -> None:
    """Renders, prepares, generates greedily and prints."""
    config = json.loads((folder / "config.json").read_text())
    template = jinja2.Template((folder / "chat_template.jinja").read_text(), trim_blocks=True, lstrip_blocks=True)
    parts = [*({"type": "image"} for _ in paths), {"type": "text", "text": question}]
    message = {"role": "user", "content": parts if paths else question}
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    prompt = template.render(messages=[message], add_generation_prompt=True)
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    tensors = og.NamedTensors()
    if paths:
        raw = json.loads((folder / "preprocessor_config.json").read_text())
        images = [patches(Image.open(path).convert("RGB"), raw) for path in paths]
        counts = [rows * columns // raw["merge_size"] ** 2 for _, (_, rows, columns) in images]
        half = json.loads((folder / "exaone_export.json").read_text())["dtype"] == "fp16"
        pixels = np.concatenate([values for values, _ in images])
        tensors["pixel_values"] = pixels.astype(np.float16) if half else pixels
        tensors["image_grid_thw"] = np.array([grid for _, grid in images], np.int64)
        tensors["num_image_tokens"] = np.array([sum(counts)], np.int64)
        of_each = iter(counts)
        ids = [token for token in ids for _ in range(next(of_each) if token == config["image_token_id"] else 1)]
        tensors["input_ids"] = np.array([ids], np.int32)

    model = og.Model(str(folder))
    options = og.GeneratorParams(model)
    # Room for keys and values is taken at once; without a length it would be that of the model's whole context.
    options.set_search_options(max_length=len(ids) + NEW_TOKENS, do_sample=False)
    generator = og.Generator(model, options)
    if paths:
        generator.set_inputs(tensors)
    else:
        generator.append_tokens(np.array(ids, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    found = [int(token) for token in generator.get_sequence(0)[len(ids) :]]
    print(json.dumps({"text": tokenizer.decode(found), "token_ids": found}))  # noqa: T201


def checked(arguments: list[str]) -> tuple[Path, str, list[str]]:
    """The arguments; what cannot be right ends the program with one line, and the exit code of exaone-export."""
    code = 2 if len(arguments) < 2 or not all(Path(path).is_file() for path in arguments[2:]) else 4
    if code == 2 or not (Path(arguments[0]) / "genai_config.json").is_file():
        sys.stderr.write("error: give a BUNDLE with a genai_config.json, a QUESTION and files of IMAGES\n")
        sys.exit(code)
    return Path(arguments[0]), arguments[1], arguments[2:]


if __name__ == "__main__":
    main(*checked(sys.argv[1:]))
