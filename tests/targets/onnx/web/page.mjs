// Use the example page in Chromium: page.mjs NODE_MODULES CHROMIUM URL.
// Prints JSON: the status lines after loading, testing and a chat, and the conversation.

import { pathToFileURL } from "node:url";

const [modules, chromium, url] = process.argv.slice(2);
const entry = `${modules}/puppeteer-core/lib/esm/puppeteer/puppeteer-core.js`;
const { default: puppeteer } = await import(pathToFileURL(entry).href);

const browser = await puppeteer.launch({
  executablePath: chromium,
  headless: true,
  args: [
    "--no-sandbox",
    "--enable-unsafe-webgpu",
    "--use-webgpu-adapter=swiftshader",
    "--enable-features=Vulkan",
  ],
  protocolTimeout: 600_000,
});
try {
  const page = await browser.newPage();
  page.on("console", (message) => console.error(message.text()));
  page.on("requestfailed", (request) => console.error(`failed: ${request.url()}`));
  const requests = [];
  page.on("request", (request) => requests.push(new URL(request.url()).origin));
  await page.goto(url);
  const status = () => page.$eval("#status", (element) => element.textContent);

  /** Click, and return the status line when the page accepts input again. */
  async function click(selector) {
    await page.click(selector);
    await page.waitForSelector("#controls:enabled", { timeout: 300_000 });
    return status();
  }

  const result = { loaded: await click("#loading button") };
  if (!result.loaded.startsWith("error")) {
    result.tested = await click("#test");
    await page.type("#message", "Who are you?");
    result.chat = await click("#say");
  }
  result.conversation = await page.$$eval("#conversation p", (elements) =>
    elements.map((element) => [element.className, element.textContent]),
  );
  result.origins = [...new Set(requests)];
  console.log(JSON.stringify(result));
} finally {
  await browser.close();
}
