// Run a bundle with transformers.js in Node: node.mjs NODE_MODULES MODEL.JS BUNDLE.
// Prints JSON: the golden prompts that differ, the reply to a message, and its pieces.

import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const [modules, code, bundle] = process.argv.slice(2);
const library = `${modules}/@huggingface/transformers/dist/transformers.node.mjs`;
const transformers = await import(pathToFileURL(library).href);
const model = await import(pathToFileURL(code).href);

const generator = await model.loadBundle(transformers, bundle, "cpu");
const golden = JSON.parse(readFileSync(`${bundle}/golden.json`, "utf8"));
const failed = await model.failedPrompts(transformers, generator, golden);
const messages = [{ role: "user", content: "Who are you?" }];
let streamed = "";
const reply = await model.reply(transformers, generator, messages, {
  maxTokens: 12,
  onText: (piece) => (streamed += piece),
});
const length = model.countTokens(generator, messages);
console.log(JSON.stringify({ count: golden.length, failed, reply, streamed, length }));
