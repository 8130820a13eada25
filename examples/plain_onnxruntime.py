"""Answers with a bundle by onnxruntime alone: python plain_onnxruntime.py BUNDLE QUESTION [IMAGE ...]"""

import json
import sys
from pathlib import Path

import jinja2
import numpy as np
import onnxruntime as ort
from PIL import Image
from tokenizers import Tokenizer

NEW_TOKENS, TYPES = 128, {"tensor(float)": "f4", "tensor(float16)": "f2", "tensor(uint8)": "u1", "tensor(int8)": "i1"}


def patches(image: Image.Image, raw: dict) -> tuple[np.ndarray, list[int]]:
    """Patches [patches, 3 * frames * side * side] of an image, those of a token together, and their grid."""
    side, merge, sides, area = raw["patch_size"], raw["merge_size"], image.size[::-1], image.width * image.height
    unit, low, high = side * merge, raw["min_pixels"], raw["max_pixels"]
    rows, cols = (round(size / unit) for size in sides)
    if rows * cols * unit**2 > high:
        rows, cols = (max(1, int(size / np.sqrt(area / high) / unit)) for size in sides)
    elif rows * cols * unit**2 < low:
        rows, cols = (int(np.ceil(size * np.sqrt(low / area) / unit)) for size in sides)
    pixels = np.asarray(image.resize((cols * unit, rows * unit), raw["resample"])) * raw["rescale_factor"]
    values = (pixels.astype("f4") - np.float32(raw["image_mean"])) / np.float32(raw["image_std"])
    split = values.reshape(rows, merge, side, cols, merge, side, 3, 1).repeat(raw["temporal_patch_size"], 7)
    return split.transpose(0, 3, 1, 4, 6, 7, 2, 5).reshape(rows * cols * merge**2, -1), [1, rows * merge, cols * merge]


code = 2 if len(sys.argv) < 3 or not all(Path(path).is_file() for path in sys.argv[3:]) else 4
if code == 2 or not (Path(sys.argv[1]) / "exaone_export.json").is_file():
    sys.exit(sys.stderr.write("error: give a BUNDLE of exaone-export, a QUESTION and files of IMAGES\n") and code)
folder, question, images = Path(sys.argv[1]), sys.argv[2], [Image.open(path).convert("RGB") for path in sys.argv[3:]]
config, bundle = (json.loads((folder / name).read_text()) for name in ("config.json", "exaone_export.json"))
graphs = {graph["name"]: ort.InferenceSession(folder / graph["file"]) for graph in bundle["graphs"]}
config, decoder = config.get("text_config", {}) | config, graphs["decoder"]
tokenizer, kind = Tokenizer.from_file(f"{folder}/tokenizer.json"), "f2" if bundle["dtype"] == "fp16" else "f4"
content = [*({"type": "image"} for _ in images), {"type": "text", "text": question}] if images else question
template = jinja2.Template((folder / "chat_template.jinja").read_text(), trim_blocks=True, lstrip_blocks=True)
prompt = template.render(messages=[{"role": "user", "content": content}], add_generation_prompt=True)
ids, features = tokenizer.encode(prompt, add_special_tokens=False).ids, np.zeros((0, config["hidden_size"]), kind)
if images:
    raw = json.loads((folder / "preprocessor_config.json").read_text())
    pixels, grids = zip(*(patches(image, raw) for image in images), strict=True)
    feeds = {"pixel_values": np.concatenate(pixels).astype(kind), "image_grid_thw": np.array(grids)}
    features, counts = graphs["vision_encoder"].run(None, feeds)[0], iter(np.prod(grids, 1) // raw["merge_size"] ** 2)
    ids = [token for token in ids for _ in range(next(counts) if token == config["image_token_id"] else 1)]
# Layers with a window keep no more than it, in a buffer with room for what comes; the others keep everything.
sizes = {"window_cache_length": (config["sliding_window"] or 0) + 64, "past_sequence_length": len(ids) + NEW_TOKENS}
past = {node.name: node for node in decoder.get_inputs() if node.name.startswith("past_key_values")}
cache = {n: np.zeros([1, *(sizes.get(d, d) for d in i.shape[1:])], TYPES[i.type]) for n, i in past.items()}
names, found = ["logits", *(name.replace("past_key_values", "present") for name in cache)], []
while len(found) < NEW_TOKENS and not np.isin(found[-1:], config["eos_token_id"]).any():
    feeds, mask = {"input_ids": np.array([found[-1:] or ids])}, np.ones((1, len(ids) + len(found)), np.int64)
    if "embedding" in graphs:  # the images' features take the place of their tokens in the prompt
        feeds = {"inputs_embeds": graphs["embedding"].run(None, feeds | {"image_features": features})[0]}
    logits, *kept = decoder.run(names, feeds | cache | {"attention_mask": mask})
    cache, found, features = dict(zip(cache, kept, strict=True)), [*found, int(logits[0, -1].argmax())], features[:0]
print(tokenizer.decode(found))  # noqa: T201
