// Answers with a bundle of `exaone-export export SOURCE BUNDLE --layout transformersjs`, by transformers.js:
//     node generate.mjs BUNDLE QUESTION [IMAGE ...]
// prints {"text", "token_ids"}. transformers.js has no class for EXAONE, but two of its classes run these graphs as they
// are: that of any decoder for text, and Qwen2.5-VL's, whose images are prepared in the same way.
import { existsSync } from 'node:fs';
import { readFile } from 'node:fs/promises';
import { join, resolve } from 'node:path';
import {
  AutoConfig, AutoImageProcessor, AutoTokenizer, Qwen2_5_VLForConditionalGeneration, Qwen3ForCausalLM, RawImage, cat, env,
} from '@huggingface/transformers';

const NEW_TOKENS = Number(process.env.NEW_TOKENS ?? 128);
env.allowRemoteModels = false; // everything is in the bundle

const [folder, question, ...paths] = process.argv.slice(2);
const bundle = resolve(folder ?? '');
if (question === undefined || !paths.every(existsSync) || !existsSync(join(bundle, 'onnx'))) {
  console.error('error: give a BUNDLE of the layout transformersjs, a QUESTION and files of IMAGES');
  process.exit(question === undefined || !paths.every(existsSync) ? 2 : 4);
}
const config = await AutoConfig.from_pretrained(bundle);
const sees = config.vision_config !== undefined;
config.model_type = sees ? 'llava' : 'qwen3'; // where the numbers of layers and heads stand, and plain positions
if (sees) config.text_config.model_type = 'qwen3';
const model = await (sees ? Qwen2_5_VLForConditionalGeneration : Qwen3ForCausalLM).from_pretrained(bundle, { config });
const tokenizer = await AutoTokenizer.from_pretrained(bundle);

const parts = [...paths.map(() => ({ type: 'image' })), { type: 'text', text: question }];
let prompt = tokenizer.apply_chat_template([{ role: 'user', content: paths.length ? parts : question }], {
  chat_template: await readFile(join(bundle, 'chat_template.jinja'), 'utf-8'),
  add_generation_prompt: true,
  tokenize: false,
});

// Images of different sizes are prepared one by one; each takes as many tokens as its grid has units.
const media = {};
if (paths.length) {
  const prepare = await AutoImageProcessor.from_pretrained(bundle);
  const unit = prepare.config.merge_size ** 2;
  const images = [];
  for (const path of paths) images.push(await prepare(await RawImage.read(path)));
  media.pixel_values = cat(images.map((image) => image.pixel_values), 0);
  media.image_grid_thw = cat(images.map((image) => image.image_grid_thw), 0);
  const counts = images.map((image) => image.pixel_values.dims[0] / unit);
  prompt = prompt.replaceAll('<|image_pad|>', (token) => token.repeat(counts.shift()));
}

const inputs = tokenizer(prompt, { add_special_tokens: false });
const output = await model.generate({ ...inputs, ...media, max_new_tokens: NEW_TOKENS, do_sample: false });
const token_ids = output.tolist()[0].slice(inputs.input_ids.dims[1]).map(Number);
console.log(JSON.stringify({ text: tokenizer.decode(token_ids, { skip_special_tokens: true }), token_ids }));
